"""Operations that give one wrong result, and the record of `imf_kernels.verify` that should tell of it."""

import json

import torch

import imf_kernels as ik
from imf_kernels import Dual, verify
from imf_kernels.testing.cases import SMALL

NAMES = (
    "square, width 33, width 37, digits, other value width, width 45, a gate a sample, matrix, dim 256",
    "one group",
)
CASES = {case.operation: case for case in SMALL if case.name in ", ".join(NAMES).split(", ")}


def only(monkeypatch, *cases):
    """Makes `verify` check these cases alone."""
    monkeypatch.setattr(verify, "corners", lambda on_gpu: cases)


def results_in(cache):
    """Returns the results of the only record in a folder."""
    (file,) = cache.iterdir()
    return json.loads(file.read_text())["results"]


def wrong(x):
    """x with 10 % of its size added to the last row, differentiated as x is."""
    change = torch.zeros_like(x)
    change[-1] = 0.1 * x.detach().square().mean().sqrt()
    return x + change


def bent(x):
    """x, whose gradient is wrong."""
    x = x.view_as(x)
    if x.requires_grad:
        x.register_hook(wrong)
    return x


def break_result(monkeypatch, case, result, dtype, backend, through_tangents=False):
    """Makes the operation give one wrong result, of one dtype on one backend.

    through_tangents: only where gradients flow through tangents.
    """
    call = getattr(ik, case.operation)
    kind, _, which = result.partition(" ")

    def hooked(name, x):
        which_part = which.removeprefix("of ")
        if not isinstance(x, Dual):
            return bent(x) if name == which_part else x
        primal = bent(x.primal) if name == which_part else x.primal
        tangent = bent(x.tangent_rows) if f"tangent of {name}" == which_part else x.tangent_rows
        return Dual(primal, tangent, differentiable=x.differentiable)

    def changed(y):
        if not isinstance(y, Dual):
            return wrong(y) if kind == "output" else y
        primal = wrong(y.primal) if kind == "output" else y.primal
        tangent = y.tangent_rows if kind == "output" else wrong(y.tangent_rows)
        return Dual(primal, tangent, differentiable=y.differentiable)

    def broken(*positional, **options):
        leaves = torch.utils._pytree.tree_leaves((positional, options), is_leaf=lambda x: isinstance(x, Dual))
        inputs = [x for x in leaves if isinstance(x, (torch.Tensor, Dual))]
        differentiable = any(isinstance(x, Dual) and x.differentiable for x in inputs)
        if options["backend"] != backend or inputs[0].dtype != dtype or through_tangents > differentiable:
            return call(*positional, **options)
        if kind != "gradient":
            results = call(*positional, **options)
            if not isinstance(results, tuple):
                return changed(results)
            return tuple(changed(y) if str(i) == which else y for i, y in enumerate(results))
        options = {name: hooked(name, x) for name, x in options.items()}
        if case.operation == "prepend_tokens":
            x, groups = positional
            groups = [
                (hooked(f"tokens_{i}", tokens), hooked(f"embedding_{i}", embedding))
                for i, (tokens, embedding) in enumerate(groups)
            ]
            positional = hooked("x", x), groups
        return call(*positional, **options)

    monkeypatch.setattr(ik, case.operation, broken)

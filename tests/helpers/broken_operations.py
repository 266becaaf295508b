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


def break_result(monkeypatch, case, result, dtype, backend):
    """Makes the operation give one wrong result, of one dtype on one backend."""
    call = getattr(ik, case.operation)
    kind, _, which = result.partition(" ")

    def hooked(name, x):
        if name != which.removeprefix("of "):
            return x
        primal = ik.primal(x)
        bent = primal.view_as(primal)
        if bent.requires_grad:
            bent.register_hook(wrong)
        return Dual(bent, x.tangent_rows) if isinstance(x, Dual) else bent

    def changed(y):
        if not isinstance(y, Dual):
            return wrong(y) if kind == "output" else y
        if kind == "output":
            return Dual(wrong(y.primal), y.tangent_rows)
        return Dual(y.primal, wrong(y.tangent_rows))

    def broken(*positional, **options):
        inputs = [x for x in (*positional, *options.values()) if isinstance(x, (torch.Tensor, Dual))]
        if options["backend"] != backend or inputs[0].dtype != dtype:
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

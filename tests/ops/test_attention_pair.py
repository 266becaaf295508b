"""The backward of attention's pair, of the output and its tangent, against autograd through `torch.func.jvp`.

The exact gradients are autograd's in float64, PyTorch's errors those of the same computation in float32.
"""

import functools
import itertools
import math

import pytest
import torch

from imf_kernels.backends.operators import OPERATIONS
from imf_kernels.ops import attention_pair
from imf_kernels.testing import cases, errors
from imf_kernels.testing.cases import BF16, FP16, FP32, Input
from tests.helpers.backends import DTYPES, KERNELS, running_on, threads

NAMES = ("query", "query tangent", "key", "key tangent", "value", "value tangent")
OPERATION = OPERATIONS["scaled_dot_product_attention"]
SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations(("query", "key", "value"), n)]
OFFSETS = [{"offset": 2.0}, {"offset": 4.0}]


def cases_of_the_pair():
    attention = cases.attention
    yield from (
        attention(f"tangents of {'+'.join(s)}", 2, 2, 21, 24, keys=18, value_width=16, tangents=s)
        for s in SUBSETS
    )
    yield from (attention(f"width {d}", 1, 2, 37, d, keys=50) for d in (1, 7, 40, 72))
    yield attention("length 1", 3, 2, 1, 24)
    yield attention("one key", 2, 1, 50, 16, keys=1)
    yield attention("length 276", 1, 1, 276, 64)
    yield attention("length 276, tangents of q", 1, 1, 276, 64, tangents=("query",))
    yield attention("keys in several sums", 1, 1, 20, 16, keys=1100)
    yield attention("queries in several sums", 1, 1, 1600, 16, keys=20)
    yield attention("heads first", 2, 2, 19, 32, positions_first=False)
    yield attention("last samples", 3, 2, 19, 32, tangent_rows=2)
    yield attention("scale -0.3", 2, 2, 9, 16, options={"scale": -0.3})
    for offset in OFFSETS:
        name = f"offset {offset['offset']:.0f}"
        yield attention(name, 2, 2, 40, 64, k=offset, v=offset)
        yield attention(
            f"{name}, tangents of q", 1, 2, 40, 64, keys=276, k=offset, v=offset, tangents=("query",)
        )
    yield attention("logits far apart", 2, 2, 20, 16, q={"scale": 5.0}, k={"scale": 5.0})


CASES = {case.name: case for case in cases_of_the_pair()}


def draw(case, dtype, seed):
    """Primals, tangents or None, the mask, cotangents of the output and of its tangent's stored samples."""
    generator = torch.Generator("cpu").manual_seed(seed)
    primals, tangents = case.draw(generator, dtype)
    shape = case.outputs[0]
    rows = next(iter(tangents.values())).shape[0]
    cotangents = [torch.randn(n, *shape[1:], generator=generator).to(dtype) for n in (shape[0], rows)]
    arguments = [x for name in ("query", "key", "value") for x in (primals[name], tangents.get(name))]
    return arguments, primals.get("attn_mask"), cotangents


def options_of(case):
    return case.options.get("is_causal", False), case.options.get(
        "scale", 1 / math.sqrt(case.inputs["query"].shape[-1])
    )


def formula(mask, is_causal, scale, q, k, v):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    s = scale * (q @ k.mT)
    if is_causal:
        mask = torch.ones(s.shape[-2:], dtype=torch.bool).tril()
    if mask is not None and mask.dtype != torch.bool:
        return torch.softmax(s + mask, dim=-1) @ v
    if mask is None:
        return torch.softmax(s, dim=-1) @ v
    return (torch.softmax(s.masked_fill(~mask, -1e30), dim=-1) * mask.any(-1, keepdim=True)) @ v


def by_autograd(case, data, dtype):
    """The gradients that autograd derives from `torch.func.jvp`, of tangents that are given."""
    arguments, mask, cotangents = data
    leaves = [None if x is None else x.to(dtype, copy=True).requires_grad_() for x in arguments]
    primals, tangents = leaves[0::2], leaves[1::2]
    samples, moving = primals[0].shape[0], cotangents[1].shape[0]
    whole = [
        torch.zeros_like(x) if t is None else torch.cat([torch.zeros_like(x[: samples - moving]), t])
        for x, t in zip(primals, tangents, strict=True)
    ]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    run = functools.partial(formula, mask, *options_of(case))
    out, out_dot = torch.func.jvp(run, tuple(primals), tuple(whole))
    wanted = [x for x in leaves if x is not None]
    results = (out, out_dot[samples - moving :])
    found = torch.autograd.grad(results, wanted, [c.to(dtype) for c in cotangents], allow_unused=True)
    named = [name for name, x in zip(NAMES, leaves, strict=True) if x is not None]
    return {
        name: torch.zeros_like(x) if g is None else g for name, x, g in zip(named, wanted, found, strict=True)
    }


@functools.cache
def expected(case, dtype):
    """The exact gradients of the first draw, and PyTorch's largest errors in float32 over several."""
    exact, yardsticks = None, {name: [] for name in NAMES}
    for seed in range(8):
        data = draw(case, dtype, seed)
        fp64, fp32 = (by_autograd(case, data, d) for d in (torch.float64, torch.float32))
        exact = exact or fp64
        for name, x in fp32.items():
            yardsticks[name].append(errors.Yardstick.of(x, fp64[name]))
    return exact, {name: errors.Yardstick.largest(y) for name, y in yardsticks.items() if y}


def by_kernels(case, data, backend, needs=(True,) * 6):
    """The gradients of a backend, from its own forward."""
    (q, q_dot, k, k_dot, v, v_dot), mask, (dout, dout_dot) = data
    is_causal, scale = options_of(case)
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2])
    kernels = OPERATION.backend_for(backend, q, q_dot, k, k_dot, v, v_dot, mask, is_causal, scale).kernels
    out, lse = torch.empty_like(dout), torch.empty(q.shape[:3])
    kernels.forward(
        q, k, v, q_dot, k_dot, v_dot, mask, out, torch.empty_like(dout_dot), lse, scale, is_causal
    )
    found = attention_pair.pair_backward(
        kernels, q, q_dot, k, k_dot, v, v_dot, mask, lse, dout, dout_dot, is_causal, scale, needs
    )  # fmt: skip
    return {name: x for name, x in zip(NAMES, found, strict=True) if x is not None}


def check(case, dtype, backend):
    exact, yardsticks = expected(case, dtype)
    got = by_kernels(case, draw(case, dtype, 0), backend)
    assert got.keys() == exact.keys()
    for name, x in got.items():
        assert x.dtype == dtype
        errors.check(f"{case}, gradient of {name}", x, exact[name], yardsticks[name])


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernels", KERNELS)
def test_gradients_obey_the_error_rule(kernels, name, dtype):
    with running_on(kernels) as backend:
        if dtype not in DTYPES[backend]:
            pytest.skip("not one of its dtypes")
        check(CASES[name], dtype, backend)

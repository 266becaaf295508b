"""What a call costs on the host in eager mode: rows so small that the arithmetic takes next to nothing.

Each operation with its tangent and a weight that requires grad; PyTorch's own function without a tangent, and
with one under `torch.autograd.forward_ad`. `ik.jvp` and `torch.func.jvp` of one linear layer. One thread.

    pytest benchmarks/ops/bench_host.py --benchmark-only
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor

import imf_kernels as ik
from imf_kernels import Dual

WIDTH = 16
SHAPE = (1, 1, 2, WIDTH)  # one head of two positions
# By operation: ours, and PyTorch's own, of x [1, 1, 2, 16] and a weight.
CALLS: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[int, ...]]] = {
    "linear": (ik.linear, F.linear, (WIDTH, WIDTH)),
    "rms_norm": (ik.rms_norm, lambda x, w: F.rms_norm(x, (WIDTH,), w, 1e-6), (WIDTH,)),
    "layer_norm": (
        lambda x, w: ik.layer_norm(x, (WIDTH,), w),
        lambda x, w: F.layer_norm(x, (WIDTH,), w),
        (WIDTH,),
    ),
    "silu": (lambda x, w: ik.silu(x), lambda x, w: F.silu(x), (WIDTH,)),
    "gelu": (lambda x, w: ik.gelu(x), lambda x, w: F.gelu(x), (WIDTH,)),
    "gated_residual": (
        lambda x, w: ik.gated_residual(x, x, w),
        lambda x, w: torch.addcmul(x, x, w),
        (WIDTH,),
    ),
    "attention": (
        lambda x, w: ik.scaled_dot_product_attention(x, x, x),
        lambda x, w: F.scaled_dot_product_attention(x, x, x),
        (WIDTH,),
    ),
}
FORMS = ("ours, with tangent", "ours, no tangent", "PyTorch's, no tangent", "PyTorch's, with tangent")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form)
@pytest.mark.parametrize("operation", CALLS)
def test_host(benchmark: Any, operation: str, form: str) -> None:
    benchmark.group = f"a call on the host, {operation}"
    benchmark.extra_info |= {"torch": torch.__version__, "host": operation, "form": form}
    ours, pytorchs, shape = CALLS[operation]
    x, x_dot = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    weight: Tensor = torch.randn(shape, requires_grad=True)
    if form == "ours, with tangent":
        benchmark.pedantic(ours, (Dual(x, x_dot), weight), rounds=50, iterations=1000, warmup_rounds=2)
    elif form == "ours, no tangent":
        benchmark.pedantic(ours, (x, weight), rounds=50, iterations=1000, warmup_rounds=2)
    elif form == "PyTorch's, no tangent":
        benchmark.pedantic(pytorchs, (x, weight), rounds=50, iterations=1000, warmup_rounds=2)
    else:
        math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # the one that has a rule
        with fwAD.dual_level(), math if operation == "attention" else contextlib.nullcontext():
            dual = fwAD.make_dual(x, x_dot)
            benchmark.pedantic(pytorchs, (dual, weight), rounds=50, iterations=1000, warmup_rounds=2)


@pytest.mark.parametrize("jvp", [ik.jvp, torch.func.jvp], ids=["ik.jvp", "torch.func.jvp"])
def test_jvp_of_a_linear_layer(benchmark: Any, jvp: Callable[..., Any]) -> None:
    benchmark.group = "a call on the host, jvp of F.linear"
    form = "ours, with tangent" if jvp is ik.jvp else "PyTorch's, with tangent"
    benchmark.extra_info |= {"torch": torch.__version__, "host": "jvp of F.linear", "form": form}
    x, x_dot = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    weight = torch.randn(WIDTH, WIDTH, requires_grad=True)
    arguments = (lambda x: F.linear(x, weight)), (x,), (x_dot,)
    benchmark.pedantic(jvp, arguments, rounds=50, iterations=200, warmup_rounds=2)

"""What a call costs on the host in eager mode: rows so small that the arithmetic takes next to nothing.

Beside each operation, with its tangent and a weight that requires grad, PyTorch's own function without any
tangent, and with one under `torch.autograd.forward_ad`. One thread.

    pytest benchmarks/bench_host.py --benchmark-only
"""

from __future__ import annotations

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
# By operation: ours, and PyTorch's own, of x [2, 16] and a weight.
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
    x, x_dot = torch.randn(2, WIDTH, requires_grad=True), torch.randn(2, WIDTH)
    weight: Tensor = torch.randn(shape, requires_grad=True)
    if form == "ours, with tangent":
        benchmark.pedantic(ours, (Dual(x, x_dot), weight), rounds=50, iterations=1000, warmup_rounds=2)
    elif form == "ours, no tangent":
        benchmark.pedantic(ours, (x, weight), rounds=50, iterations=1000, warmup_rounds=2)
    elif form == "PyTorch's, no tangent":
        benchmark.pedantic(pytorchs, (x, weight), rounds=50, iterations=1000, warmup_rounds=2)
    else:
        with fwAD.dual_level():
            dual = fwAD.make_dual(x, x_dot)
            benchmark.pedantic(pytorchs, (dual, weight), rounds=50, iterations=1000, warmup_rounds=2)

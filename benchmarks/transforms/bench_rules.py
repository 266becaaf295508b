"""Calls whose tangents have rules of their own inside `jvp`: a convolution, a product, softmax and the like.

Inputs move, weights do not, and both require grad: the primal alone, with its tangent, and with that by
PyTorch's own rule. fp32, one thread.

    pytest benchmarks/transforms/bench_rules.py --benchmark-only
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import imf_kernels as ik

SQUARE, BIAS, CUBE = (torch.randn(384, 384) / 20, torch.randn(384), torch.randn(32, 64, 64))
for _weight in (SQUARE, BIAS, CUBE):
    _weight.requires_grad_()
HEADS, GROUPS = nn.MultiheadAttention(256, 8, batch_first=True), nn.GroupNorm(16, 64)
IMAGE, ROWS, TOKENS = (4, 64, 32, 32), (8, 128, 384), (1, 6, 1024, 64)
CALLS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "conv1d, 3": (nn.Conv1d(128, 128, 3, padding=1), (8, 128, 256)),
    "conv2d, 3 × 3": (nn.Conv2d(64, 64, 3, padding=1), IMAGE),
    "conv2d, 1 × 1": (nn.Conv2d(64, 128, 1), IMAGE),
    "conv2d, depthwise 7 × 7": (nn.Conv2d(64, 64, 7, padding=3, groups=64), IMAGE),
    "conv3d, 3": (nn.Conv3d(16, 16, 3, padding=1), (2, 16, 8, 16, 16)),
    "conv_transpose2d, 4 × 4": (nn.ConvTranspose2d(64, 32, 4, 2, 1), (4, 64, 16, 16)),
    "x @ w": (lambda x: x @ SQUARE, ROWS),
    "addmm": (lambda x: torch.addmm(BIAS, x, SQUARE), (1024, 384)),
    "einsum": (lambda x: torch.einsum("bld,de->ble", x, SQUARE), ROWS),
    "baddbmm, both move": (lambda x: torch.baddbmm(BIAS[:128], x, x.mT), ROWS),
    "bilinear, both move": (lambda x: F.bilinear(x, x, CUBE), (512, 64)),
    "softmax": (lambda x: x.softmax(-1), (8, 8, 128, 128)),
    "log_softmax": (lambda x: x.log_softmax(-1), (8, 8, 128, 128)),
    "normalize": (lambda x: F.normalize(x, dim=-1), (8, 256, 384)),
    "group_norm": (GROUPS, IMAGE),
    "silu, channels last": (lambda x: F.silu(x.permute(0, 3, 1, 2)), (4, 32, 32, 64)),
    "attention, 1,024 keys": (lambda x: F.scaled_dot_product_attention(x, x, x), TOKENS),
    "attention, causal": (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), TOKENS),
    "nn.MultiheadAttention": (lambda x: HEADS(x, x, x, need_weights=False)[0], (4, 128, 256)),
    "nn.MultiheadAttention, weights": (lambda x: HEADS(x, x, x)[0], (4, 128, 256)),
}
FORMS = ("the primal alone", "ours", "PyTorch's rule")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CALLS)
def test_call(benchmark: Any, name: str, form: str) -> None:
    benchmark.group = name
    benchmark.extra_info |= {"torch": torch.__version__, "host": name, "form": form}
    function, shape = CALLS[name]
    x, x_dot = torch.randn(shape).requires_grad_(), torch.randn(shape)

    def by_pytorch() -> Tensor:
        with fwAD.dual_level(), sdpa_kernel(SDPBackend.MATH):  # the attention that has a rule
            return fwAD.unpack_dual(function(fwAD.make_dual(x, x_dot))).tangent

    def by_us() -> Tensor:
        return ik.jvp(function, (x,), (x_dot,))[1]

    torch.testing.assert_close(by_us(), by_pytorch(), rtol=1e-4, atol=1e-4)
    call = {"the primal alone": lambda: function(x), "ours": by_us, "PyTorch's rule": by_pytorch}[form]
    benchmark.pedantic(call, rounds=25, iterations=5, warmup_rounds=3)

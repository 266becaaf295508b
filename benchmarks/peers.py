"""What is measured beside our operations: the same computations in plain PyTorch, and their bounds."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from imf_kernels import gemm
from imf_kernels.testing.cases import Case
from imf_kernels.testing.errors import Problem

Outputs = tuple[Tensor, ...]

# Formulas as a training program has them: operands in their dtype, norms in fp32.


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, dtype: torch.dtype | None = None) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight).to(dtype or x.dtype)


def layer_norm(
    x: Tensor, normalized_shape: tuple[int, ...], weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> Tensor:
    return (_normalized(x, eps) * weight + bias).to(x.dtype)


def _normalized(x: Tensor, eps: float) -> Tensor:
    """In the place of F.layer_norm, whose torch.func.jvp PyTorch 2.13 cannot compile."""
    centered = x.float() - x.float().mean(-1, keepdim=True)
    return centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return (_normalized(x, 1e-6) * (1 + scale[:, None]) + shift[:, None]).to(dtype or x.dtype)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    def one(x: Tensor, weight: Tensor) -> Tensor:
        n = rms_norm(x.float(), weight)
        even, odd = n[..., 0::2], n[..., 1::2]
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
        return turned.flatten(-2).to(x.dtype)

    return one(q, q_weight), one(k, k_weight)


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: bool
) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):  # the only one that torch.func.jvp goes through
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return x + (branch * (gate if gate.dim() == 1 else gate[:, None])).to(x.dtype)


def gelu(x: Tensor, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate)


def silu(x: Tensor) -> Tensor:
    return F.silu(x)


def sinusoidal_embedding(t: Tensor, dim: int) -> Tensor:
    f = torch.exp(-math.log(10000.0) * torch.arange(dim // 2, dtype=torch.float32) / (dim // 2))
    angle = t[:, None].float() * f
    return torch.cat([angle.cos(), angle.sin()], dim=-1).to(t.dtype)


def prepend_tokens(x: Tensor, *groups: Tensor) -> Tensor:
    pairs = zip(groups[0::2], groups[1::2], strict=True)
    return torch.cat([tokens + embedding[:, None] for tokens, embedding in pairs] + [x], dim=1)


def formula(case: Case) -> Callable[[dict[str, Any]], Outputs]:
    """A case's plain formula, as a function of its arguments."""
    call: Callable[..., Any] = globals()[case.operation]
    if case.operation == "prepend_tokens":
        return lambda arguments: (call(*arguments.values()),)
    options = {**case.options, **case.output_options}

    def run(arguments: dict[str, Any]) -> Outputs:
        result = call(**arguments, **options)
        return result if isinstance(result, tuple) else (result,)

    return run


def derivative(
    problem: Problem, means: str, primals: dict[str, Tensor] | None = None
) -> Callable[[], tuple[Outputs, Outputs]]:
    """A case's outputs and their tangents by other means: both, as ours gives both.

    Args:
        problem: what is computed.
        means: "torch.func.jvp", "compiled" (the same, as one graph) or "finite differences" (central ones).
        primals: in the place of the problem's, such as leaves of a graph.
    """
    primals, names = primals or problem.primals, list(problem.tangents)
    x, x_dot = tuple(primals[n] for n in names), tuple(problem.tangents.values())
    plain = formula(problem.case)

    def of(*moving: Tensor) -> Outputs:
        return plain({**primals, **dict(zip(names, moving, strict=True))})

    def forward_mode(*both: Tensor) -> tuple[Outputs, Outputs]:
        outputs, tangents = torch.func.jvp(of, both[: len(x)], both[len(x) :])
        return outputs, tuple(t.detach() for t in tangents)  # as training does: no gradient goes through them

    def differences() -> tuple[Outputs, Outputs]:
        step = 1e-2
        above = of(*(a + step * b for a, b in zip(x, x_dot, strict=True)))
        below = of(*(a - step * b for a, b in zip(x, x_dot, strict=True)))
        return of(*x), tuple((a - b) / (2 * step) for a, b in zip(above, below, strict=True))

    if means == "finite differences":
        return differences
    if means == "compiled":
        torch._dynamo.reset()
        forward_mode = torch.compile(forward_mode, dynamic=False, fullgraph=True)  # else it may stay eager
    return lambda: forward_mode(*x, *x_dot)


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.detach().double() - exact).norm() / exact.norm().clamp(min=1e-300))


PRODUCTS = ("linear", "scaled_dot_product_attention")  # bound by multiplications, the others by memory


def copy(size: int) -> Callable[[], Any]:
    """Reads and writes `size` bytes in all: what an operation bound by memory is held against."""
    source, target = torch.ones(size // 2, dtype=torch.uint8), torch.empty(size // 2, dtype=torch.uint8)
    return lambda: target.copy_(source)


def _best(call: Callable[[], Any], repeats: int = 7) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


@functools.cache
def gemm_rate(dtype: torch.dtype) -> float:
    """FLOPs a second of the fastest of PyTorch's products of 2048 rows, 1024 → 4096."""
    x, w = torch.ones(2048, 1024, dtype=dtype), torch.ones(4096, 1024, dtype=dtype)
    seconds = min(_best(functools.partial(run, x, w)) for run in (gemm.forward, F.linear))
    return 2 * 2048 * 1024 * 4096 / seconds

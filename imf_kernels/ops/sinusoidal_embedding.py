"""Sinusoidal embedding of scalars: y = [cos(t f_0) … cos(t f_{n−1}), sin(t f_0) … sin(t f_{n−1})] with
f_i = P^(−i/n), n = dim / 2.

Tangent:  ẏ = [−sin(t f_i) f_i ṫ, cos(t f_i) f_i ṫ].
Backward: dt = Σ_i f_i (cos(t f_i) dy_{n+i} − sin(t f_i) dy_i).
Source: Vaswani et al., "Attention Is All You Need" (2017), with cosines first as in ADM and DiT.
Plain PyTorch: a separate kernel gained at most 1 % of a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from imf_kernels.backends.operators import Operation
from imf_kernels.dual import TensorOrDual, last_rows, tangent_graph
from imf_kernels.ops import check
from imf_kernels.transforms.dual_tensors import takes_dual_tensors


def _frequencies(half: int, max_period: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    steps = torch.arange(half, dtype=torch.float64, device=device)
    return torch.exp(steps * (-math.log(max_period) / half)).to(dtype)


def _without_float64(tensors: Sequence[Tensor]) -> str | None:
    """Returns why the `reference` backend cannot run; `None` if it can."""
    if tensors[0].device.type == "mps":
        return "it computes frequencies in float64, which MPS does not have"
    return None


def _reference(
    differentiable: bool, t: Tensor, t_dot: Tensor | None, dim: int, max_period: float
) -> tuple[Tensor, Tensor | None]:
    dtype, exact = t.dtype, torch.promote_types(t.dtype, torch.float32)
    f = _frequencies(dim // 2, max_period, exact, t.device)
    angle = t[:, None].to(exact) * f
    cos, sin = angle.cos(), angle.sin()
    y = torch.cat([cos, sin], dim=-1).to(dtype)
    if t_dot is None:
        return y, None
    with tangent_graph(differentiable):
        angle_dot = t_dot[:, None].to(exact) * f
        y_dot = torch.cat([-last_rows(sin, t_dot) * angle_dot, last_rows(cos, t_dot) * angle_dot], dim=-1)
        return y, y_dot.to(dtype)


def _check(t: Tensor, t_dot: Tensor | None, dim: int, max_period: float) -> Sequence[Tensor]:
    check.is_tensor("sinusoidal_embedding", t=t)
    if t.dim() != 1:
        raise ValueError(f"sinusoidal_embedding: t must be [B], got {list(t.shape)}")
    if not isinstance(dim, int) or dim < 2 or dim % 2:
        raise ValueError(f"sinusoidal_embedding: dim must be an even int of at least 2, got {dim!r}")
    check.number("sinusoidal_embedding", 1.0, max_period=max_period)
    return (t,)


_OPERATION = Operation(
    "sinusoidal_embedding",
    _reference,
    _check,
    reference_unavailable=_without_float64,
    reference_aliases=("cpu", "triton", "cuda"),
)


@takes_dual_tensors
def sinusoidal_embedding(
    t: TensorOrDual, dim: int, max_period: float = 10000.0, *, backend: str | None = None
) -> TensorOrDual:
    """Computes cosines and sines of scalars at geometrically spaced frequencies, with their tangent.

    Args:
        t: [B], any floating-point type; not scaled here.
        dim: the width of the embedding, even: dim / 2 cosines, then as many sines.
        max_period: 2π times the longest period that the frequencies 1 … 1/max_period approach.
        backend: every name means "reference", plain PyTorch.

    Returns:
        [B, dim] of t's dtype; a `Dual` if `t` is one.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    return _OPERATION(backend, (t,), dim, max_period)

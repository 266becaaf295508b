"""Sinusoidal embedding of scalars: y = [cos(t f_0) … cos(t f_{n−1}), sin(t f_0) … sin(t f_{n−1})] with
f_i = P^(−i/n), n = dim / 2.

Tangent:  ẏ = [−sin(t f_i) f_i ṫ, cos(t f_i) f_i ṫ].
Backward: dt = Σ_i f_i (cos(t f_i) dy_{n+i} − sin(t f_i) dy_i).
Source: Vaswani et al., "Attention Is All You Need" (2017), in the form of ADM and DiT: cosines first.
Kernels: csrc/cpu/sinusoidal_embedding.cpp, imf_kernels/_triton/sinusoidal_embedding.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from imf_kernels import _C, cpu, triton_backend
from imf_kernels.dispatch import Backend, choose
from imf_kernels.dual import Dual, TensorOrDual, no_gradient, pack, tail, unpack
from imf_kernels.dual_tensors import takes_dual_tensors
from imf_kernels.layout import DTYPES, pointer
from imf_kernels.operators import Operation
from imf_kernels.ops import check
from imf_kernels.triton_backend import Kernels


def _frequencies(half: int, max_period: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    steps = torch.arange(half, dtype=torch.float64, device=device)
    return torch.exp(steps * (-math.log(max_period) / half)).to(dtype)


def _without_float64(tensors: Sequence[Tensor]) -> str | None:
    """The availability of the `reference` backend."""
    if tensors[0].device.type == "mps":
        return "it computes frequencies in float64, which MPS does not have"
    return None


def _reference(t: Tensor, t_dot: Tensor | None, dim: int, max_period: float) -> tuple[Tensor, Tensor | None]:
    dtype, exact = t.dtype, torch.promote_types(t.dtype, torch.float32)
    f = _frequencies(dim // 2, max_period, exact, t.device)
    angle = t[:, None].to(exact) * f
    cos, sin = angle.cos(), angle.sin()
    y = torch.cat([cos, sin], dim=-1).to(dtype)
    if t_dot is None:
        return y, None
    with torch.no_grad():
        angle_dot = t_dot[:, None].to(exact) * f
        y_dot = torch.cat([-tail(sin, t_dot) * angle_dot, tail(cos, t_dot) * angle_dot], dim=-1)
        return y, y_dot.to(dtype)


def _check(t: Tensor | Dual, dim: int, max_period: float) -> None:
    check.is_tensor_or_dual("sinusoidal_embedding", t=t)
    t, _ = unpack(t)
    if t.dim() != 1:
        raise ValueError(f"sinusoidal_embedding: t must be [B], got {list(t.shape)}")
    if not isinstance(dim, int) or dim < 2 or dim % 2:
        raise ValueError(f"sinusoidal_embedding: dim must be an even int of at least 2, got {dim!r}")
    check.number("sinusoidal_embedding", 1.0, max_period=max_period)


class _SinusoidalEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Any, t: Tensor, t_dot: Tensor | None, dim: int, max_period: float
    ) -> tuple[Tensor, Tensor | None]:
        t = t.contiguous()
        f = _frequencies(dim // 2, max_period, torch.float32, t.device)
        y, y_dot = t.new_empty((t.numel(), dim)), None
        if t_dot is not None:
            t_dot = t_dot.contiguous()
            y_dot = t.new_empty((t_dot.numel(), dim))
            no_gradient(ctx, y_dot)
        kernels.forward(t, t_dot, f, y, y_dot)
        ctx.save_for_backward(t, f)
        return y, y_dot

    @staticmethod
    @check.backward_of("sinusoidal_embedding")
    def backward(ctx: Any, dy: Tensor, dy_dot: Tensor | None) -> tuple[Tensor | None, ...]:
        t, f = ctx.saved_tensors
        angle, (dcos, dsin) = t[:, None].float() * f, dy.float().chunk(2, dim=-1)
        # A sum, not a product with f: BLAS adds in an order that depends on the number of threads.
        dt = ((angle.cos() * dsin - angle.sin() * dcos) * f).sum(-1)
        return None, dt.to(t.dtype), None, None, None


class _CPU:
    @staticmethod
    def forward(t: Tensor, t_dot: Tensor | None, f: Tensor, y: Tensor, y_dot: Tensor | None) -> None:
        _C.sinusoidal_embedding_forward(
            *(DTYPES[t.dtype], pointer(t), pointer(t_dot), pointer(f), pointer(y), pointer(y_dot)),
            *(t.numel(), 0 if t_dot is None else t_dot.numel(), f.numel(), torch.get_num_threads()),
        )


_OPERATION = Operation(
    "sinusoidal_embedding",
    _SinusoidalEmbedding,
    "(Tensor t, Tensor? t_dot, SymInt dim, float max_period)",
    {"forward": "(Tensor t, Tensor? t_dot, Tensor f, Tensor(a!) y, Tensor(b!)? y_dot) -> ()"},
)
_BACKENDS = (
    _OPERATION.backend("cpu", _CPU, cpu.unavailable),
    _OPERATION.backend("triton", Kernels("sinusoidal_embedding"), triton_backend.unavailable, also=("cuda",)),
    Backend("reference", _reference, _without_float64),
)


@takes_dual_tensors
def sinusoidal_embedding(
    t: TensorOrDual, dim: int, max_period: float = 10000.0, *, backend: str | None = None
) -> TensorOrDual:
    """Cosines and sines of scalars at geometrically spaced frequencies, with their tangent.

    Args:
        t: [B], float32, bfloat16 or float16 (`reference`: any floating-point type; `cpu`: not float16); not
            scaled here.
        dim: the width of the embedding, even: dim / 2 cosines, then as many sines.
        max_period: 2π times the longest period that the frequencies 1 … 1/max_period approach.
        backend: "cpu", "triton", "reference", or the best one that can run; "cuda" means "triton".

    Returns:
        [B, dim] of t's dtype; a `Dual` if `t` is one.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    _check(t, dim, max_period)
    primal, tangent = unpack(t)
    run = choose("sinusoidal_embedding", _BACKENDS, backend, primal).run
    return pack(*run(primal, tangent, dim, float(max_period)), t)

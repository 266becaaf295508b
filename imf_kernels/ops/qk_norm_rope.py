"""Per-head RMSNorm of queries and keys, then rotary positions.

y = R_l n with n = x · r · w, r = (mean(x²) + ε)^(−½) over the head dimension, and R_l rotating each pair
(2i, 2i+1) by the angle of position l:  y_2i = n_2i c − n_2i+1 s,  y_2i+1 = n_2i+1 c + n_2i s.
Tangent:  ẏ = R_l ṅ, ṅ as in rms_norm.
Backward: dn = R_lᵀ dy, then as in rms_norm.
Pair:     dn = R_lᵀ dy and dṅ = R_lᵀ dẏ, then as in rms_norm.
Source: Su et al., "RoFormer" (2021), interleaved pairs; Dehghani et al., "Scaling Vision Transformers to 22
Billion Parameters" (2023), for the normalisation.
Kernels: csrc/ops/qk_norm_rope.h, csrc/cpu/qk_norm_rope.cpp, backends/triton_kernels/qk_norm_rope.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from imf_kernels import _C
from imf_kernels.backends.layout import as_floats, in_dtype, last_contiguous, positions_first, sums
from imf_kernels.backends.operators import Operation, PairCall, compiled
from imf_kernels.dual import Dual, TensorOrDual, last_rows, no_gradient, tangent_graph
from imf_kernels.ops import check
from imf_kernels.transforms.dual_tensors import takes_dual_tensors

OtherTensorOrDual = TypeVar("OtherTensorOrDual", bound="Tensor | Dual")


def rope_tables(length: int, width: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines of l · theta^(−2i / width), each [length, width / 2] in float32 on the CPU.

    Raises:
        ValueError: a negative length, or a width that is not even and positive.
    """
    if length < 0 or width < 2 or width % 2:
        raise ValueError(
            f"rope_tables: length must be at least 0 and width even and positive, got {length}, {width}"
        )
    exact: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    frequencies = theta ** (-torch.arange(0, width, 2, **exact) / width)
    angles = torch.arange(length, **exact)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def _rotate(n: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = n[..., 0::2], n[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def _reference(
    differentiable: bool, x: Tensor, x_dot: Tensor | None, weight: Tensor, cos: Tensor, sin: Tensor,
    eps: float, name: str,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    dtype, exact = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, w, cos, sin = x.to(exact), weight.to(exact), cos.to(exact), sin.to(exact)
    r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = _rotate(x * r * w, cos, sin).to(dtype)
    if x_dot is None:
        return y, None
    with tangent_graph(differentiable):
        x, r, x_dot = last_rows(x, x_dot), last_rows(r, x_dot), x_dot.to(exact)
        r_dot = -(r**3) * (x * x_dot).mean(-1, keepdim=True)
        return y, _rotate((x_dot * r + x * r_dot) * w, cos, sin).to(dtype)


def _check(
    x: Tensor, x_dot: Tensor | None, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, name: str
) -> Sequence[Tensor]:
    operation, weights = "qk_norm_rope", {f"{name}_weight": weight, "cos": cos, "sin": sin}
    check.is_tensor(operation, **{name: x})
    check.is_weight(operation, **weights)
    if x.dim() != 4 or x.shape[-1] % 2:
        raise ValueError(f"{operation}: {name} must be [B, H, L, D] with an even D, got {list(x.shape)}")
    length, width = x.shape[2:]
    check.has_shape(operation, f"{name}_weight", weight, (width,), **{name: x})
    for table in ("cos", "sin"):
        check.has_shape(operation, table, weights[table], (length, width // 2), **{name: x})
    check.same_device(operation, x, **weights)
    check.last_contiguous(operation, **{name: x, f"{name}_dot": x_dot})
    check.number(operation, 0.0, eps=eps)
    return (x,)


def _forward(
    ctx: Any, kernels: _C.qk_norm_rope, x: Tensor, x_dot: Tensor | None, weight: Tensor, cos: Tensor,
    sin: Tensor, eps: float, name: str,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    batch, heads, length, width = x.shape
    cos, sin = as_floats(cos), as_floats(sin)
    y, y_dot = positions_first(x, batch, length, width), None
    rstd = x.new_empty(batch * length * heads, dtype=torch.float32)
    if x_dot is not None:
        y_dot = positions_first(x, x_dot.shape[0], length, width)
        no_gradient(ctx, y_dot)
    kernels.forward(x, x_dot, as_floats(weight), cos, sin, y, y_dot, rstd, eps)
    ctx.save_for_backward(x, weight, cos, sin, rstd)
    ctx.kernels = kernels
    return y, y_dot


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, cos, sin, rstd = ctx.saved_tensors
    kernels: _C.qk_norm_rope = ctx.kernels
    dx = positions_first(x, x.shape[0], x.shape[2], x.shape[3])
    partial, dweight = sums(kernels, x, 1, rstd.numel(), x.shape[3], weight.shape)
    kernels.backward(x, last_contiguous(dy), as_floats(weight), cos, sin, rstd, dx, partial, dweight)
    return None, dx, None, in_dtype(dweight, weight.dtype), None, None, None, None


def _pair_backward(call: PairCall, dy: Tensor | None, dy_dot: Tensor | None) -> list[Tensor | None]:
    x, x_dot, weight, cos, sin, *_ = call.arguments
    rstd = call.saved[4]
    dx, dx_dot = (positions_first(x, t.shape[0], t.shape[2], t.shape[3]) for t in (x, x_dot))
    partial, dweight = sums(call.kernels, x, 1, rstd.numel(), x.shape[3], weight.shape)
    cotangents = (
        torch.zeros_like(t) if c is None else last_contiguous(c) for t, c in ((dx, dy), (dx_dot, dy_dot))
    )
    call.kernels.pair_backward(
        *(x, x_dot, *cotangents, as_floats(weight), as_floats(cos), as_floats(sin), rstd),
        *(dx, dx_dot, partial, dweight),
    )
    return [dx, dx_dot, in_dtype(dweight, weight.dtype), None, None, None, None]


_BACKENDS = compiled("qk_norm_rope", reduces=True)
_OPERATION = Operation("qk_norm_rope", _reference, _check, _BACKENDS, _forward, _backward, _pair_backward)


@takes_dual_tensors
def qk_norm_rope(
    q: TensorOrDual,
    k: OtherTensorOrDual,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> tuple[TensorOrDual, OtherTensorOrDual]:
    """Applies RMSNorm over the head dimension, then rotary positions, to queries and keys, with tangents.

    Args:
        q, k: [B, H, L, D] of one length, D even, any strides with the last dimension contiguous; float32,
            bfloat16 or float16 (`reference`: any floating-point type; `cpu`: not float16). The numbers of
            heads may differ.
        q_weight, k_weight: [D], weights of the norms.
        cos, sin: [L, D / 2] in float32, from `rope_tables`; pair (2i, 2i + 1) is rotated by angle i.
        eps: added to the mean square.
        backend: "cpu", "triton", "reference", or the best one that can run. "cuda" means "triton".

    Returns:
        The new q and k, each a `Dual` if it came as one; from kernels in the memory order [B, L, H, D].
        Computed in fp32, rounded once.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    new_q = _OPERATION(backend, (q,), q_weight, cos, sin, eps, "q")
    return new_q, _OPERATION(backend, (k,), k_weight, cos, sin, eps, "k")

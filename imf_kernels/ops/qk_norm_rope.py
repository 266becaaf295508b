"""Splits a projection into queries, keys and values; per-head RMSNorm and rotary positions of the first two.

For a head x of queries, and of keys with their weight:
y = R_l n with n = x · r · w, r = (mean(x²) + ε)^(−½) over the head dimension, and R_l rotating each pair
(2i, 2i+1) by the angle of position l:  y_2i = n_2i c − n_2i+1 s,  y_2i+1 = n_2i+1 c + n_2i s.
Tangent:  ẏ = R_l ṅ, ṅ as in rms_norm.
Backward: dn = R_lᵀ dy, then as in rms_norm.
Pair:     dn = R_lᵀ dy and dṅ = R_lᵀ dẏ, then as in rms_norm.
Values are a view of the projection; backward writes their cotangent into that of the projection.
Source: Su et al., "RoFormer" (2021), interleaved pairs; Dehghani et al., "Scaling Vision Transformers to 22
Billion Parameters" (2023), for the normalisation.
Kernels: csrc/ops/qk_norm_rope.h, csrc/cpu/qk_norm_rope.cpp, backends/triton_kernels/qk_norm_rope.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imf_kernels import _C
from imf_kernels.backends.layout import as_floats, in_dtype, last_contiguous, positions_first, sums
from imf_kernels.backends.operators import Operation, PairCall, compiled
from imf_kernels.dual import TensorOrDual, last_rows, no_gradient, tangent_graph
from imf_kernels.ops import check
from imf_kernels.transforms.dual_tensors import takes_dual_tensors

_NAME = "qk_norm_rope"
Results = tuple[Tensor, Tensor, Tensor, "Tensor | None", "Tensor | None", "Tensor | None"]


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


class _Sizes(NamedTuple):
    """Sizes of a projection's heads."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    width: int

    @property
    def rows(self) -> int:
        """Number of all heads of all positions."""
        return self.batch * self.length * (self.heads + 2 * self.kv_heads)

    @staticmethod
    def of(qkv: Tensor, cos: Tensor, weight: Tensor, kv_heads: int | None) -> _Sizes:
        length, width = cos.shape[0], weight.shape[0]
        batch, heads = qkv.shape[0] if qkv.dim() == 3 else qkv.shape[0] // length, qkv.shape[-1] // width
        kv_heads = heads // 3 if kv_heads is None else kv_heads
        return _Sizes(batch, length, heads - 2 * kv_heads, kv_heads, width)

    def packed(self, qkv: Tensor) -> Tensor:
        """Returns a contiguous projection of any number of samples as [B, all heads, L, D]."""
        # Not −1 for the batch: of no elements its size would be unknown.
        batch = qkv.shape[0] if qkv.dim() == 3 else qkv.shape[0] // self.length
        return qkv.view(batch, self.length, self.heads + 2 * self.kv_heads, self.width).transpose(1, 2)

    def values(self, qkv: Tensor) -> Tensor:
        """Returns a contiguous projection's values, [B, H_kv, L, D], in a third of `narrow`'s time."""
        heads = self.heads + 2 * self.kv_heads
        batch = qkv.shape[0] if qkv.dim() == 3 else qkv.shape[0] // self.length
        return qkv.as_strided(
            (batch, self.kv_heads, self.length, self.width),
            (self.length * heads * self.width, self.width, heads * self.width, 1),
            qkv.storage_offset() + (self.heads + self.kv_heads) * self.width,
        )

    def empty(self, qkv: Tensor, batch: int, heads: int) -> Tensor:
        """Returns an empty [batch, heads, L, D] in the memory order of the projection."""
        return positions_first(qkv, batch, heads, self.length, self.width)

    def cotangents(self, qkv: Tensor, batch: int, *given: Tensor | None) -> list[Tensor]:
        """Returns the cotangents of q, k and v as kernels read them: zeros for a missing one."""
        return [
            self.empty(qkv, batch, heads).zero_() if c is None else last_contiguous(c)
            for c, heads in zip(given, (self.heads, self.kv_heads, self.kv_heads), strict=True)
        ]


def _reference(
    differentiable: bool, qkv: Tensor, qkv_dot: Tensor | None, q_weight: Tensor, k_weight: Tensor,
    cos: Tensor, sin: Tensor, eps: float, kv_heads: int | None,
) -> Results:  # fmt: skip
    dtype, exact = qkv.dtype, torch.promote_types(qkv.dtype, torch.float32)
    cos, sin = cos.to(exact), sin.to(exact)

    sizes = _Sizes.of(qkv, cos, q_weight, kv_heads)
    counts = [sizes.heads, sizes.kv_heads, sizes.kv_heads]
    *heads, value = sizes.packed(qkv.contiguous()).split(counts, 1)
    parts = [(x.to(exact), weight.to(exact)) for x, weight in zip(heads, (q_weight, k_weight), strict=True)]
    scales = [(x.square().mean(-1, keepdim=True) + eps).rsqrt() for x, _ in parts]
    q, k = (_rotate(x * r * w, cos, sin).to(dtype) for (x, w), r in zip(parts, scales, strict=True))
    if qkv_dot is None:
        return q, k, value, None, None, None
    with tangent_graph(differentiable):
        *heads_dot, value_dot = sizes.packed(qkv_dot.contiguous()).split(counts, 1)
        rotated = []
        for (x, w), r, x_dot in zip(parts, scales, heads_dot, strict=True):
            x, r, x_dot = last_rows(x, x_dot), last_rows(r, x_dot), x_dot.to(exact)
            r_dot = -(r**3) * (x * x_dot).mean(-1, keepdim=True)
            rotated.append(_rotate((x_dot * r + x * r_dot) * w, cos, sin).to(dtype))
        q_dot, k_dot = rotated
        return q, k, value, q_dot, k_dot, value_dot


def _check(
    qkv: Tensor, qkv_dot: Tensor | None, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    eps: float, kv_heads: int | None,
) -> Sequence[Tensor]:  # fmt: skip
    weights = {"q_weight": q_weight, "k_weight": k_weight, "cos": cos, "sin": sin}
    check.is_tensor(_NAME, qkv=qkv)
    check.is_weight(_NAME, **weights)
    width = q_weight.numel()
    if q_weight.dim() != 1 or width < 2 or width % 2:
        raise ValueError(f"{_NAME}: q_weight must be [D] with an even D, got {list(q_weight.shape)}")
    check.has_shape(_NAME, "k_weight", k_weight, (width,), q_weight=q_weight)
    if cos.dim() != 2:
        raise ValueError(f"{_NAME}: cos must be [L, D / 2], got {list(cos.shape)}")
    length = len(cos)
    for table in ("cos", "sin"):
        check.has_shape(_NAME, table, weights[table], (length, width // 2), q_weight=q_weight)
    in_samples = qkv.dim() == 3 and qkv.shape[1] == length
    in_rows = qkv.dim() == 2 and length > 0 and qkv.shape[0] % length == 0
    heads, rest = divmod(qkv.shape[-1], width) if qkv.dim() else (0, 0)
    shared = heads % 3 == 0 and heads > 0 if kv_heads is None else 0 < 2 * kv_heads < heads
    if not (in_samples or in_rows) or rest or not shared:
        of_keys = "a third of them" if kv_heads is None else f"{kv_heads}"
        raise ValueError(
            f"{_NAME}: qkv must be [B, L, N D] or [B · L, N D] with L = {length} like cos, D = {width} like "
            f"q_weight, and N heads: of queries, then {of_keys} of keys, then as many of values; "
            f"got {list(qkv.shape)}"
        )
    if qkv_dot is not None and in_rows and qkv_dot.shape[0] % length:
        raise ValueError(
            f"{_NAME}: the tangent of qkv [B · L, N D] must be of complete samples, of {length} rows each, "
            f"got {list(qkv_dot.shape)}"
        )
    check.same_device(_NAME, qkv, **weights)
    check.number(_NAME, 0.0, eps=eps)
    return (qkv,)


def _forward(
    ctx: Any, kernels: _C.qk_norm_rope, qkv: Tensor, qkv_dot: Tensor | None, q_weight: Tensor,
    k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, kv_heads: int | None,
) -> Results:  # fmt: skip
    qkv, cos, sin = qkv.contiguous(), as_floats(cos), as_floats(sin)
    sizes = _Sizes.of(qkv, cos, q_weight, kv_heads)
    batch, length, heads, kv_heads, _ = sizes
    q, k, v = sizes.empty(qkv, batch, heads), sizes.empty(qkv, batch, kv_heads), sizes.values(qkv)
    q_dot = k_dot = v_dot = None
    if qkv_dot is not None:
        qkv_dot = qkv_dot.contiguous()
        v_dot = sizes.values(qkv_dot)
        moving = v_dot.shape[0]
        q_dot, k_dot = sizes.empty(qkv, moving, heads), sizes.empty(qkv, moving, kv_heads)
        no_gradient(ctx, q_dot, k_dot, v_dot)
    else:
        ctx.set_materialize_grads(False)
    rstd = qkv.new_empty(batch * length * (heads + kv_heads), dtype=torch.float32)
    of_q, of_k = as_floats(q_weight), as_floats(k_weight)
    kernels.forward(qkv, qkv_dot, of_q, of_k, cos, sin, q, q_dot, k, k_dot, rstd, eps)
    ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin, rstd)
    ctx.kernels, ctx.sizes = kernels, sizes
    return q, k, v, q_dot, k_dot, v_dot


def _backward(ctx: Any, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None) -> tuple[Tensor | None, ...]:
    qkv, q_weight, k_weight, cos, sin, rstd = ctx.saved_tensors
    kernels: _C.qk_norm_rope = ctx.kernels
    sizes: _Sizes = ctx.sizes
    dqkv = torch.empty_like(qkv)
    partial, total = sums(kernels, qkv, 1, sizes.rows, sizes.width, (1, 2, sizes.width), 2)
    dq, dk, dv = sizes.cotangents(qkv, sizes.batch, dq, dk, dv)
    weights = as_floats(q_weight), as_floats(k_weight)
    kernels.backward(qkv, dq, dk, dv, *weights, cos, sin, rstd, dqkv, partial, total)
    return None, dqkv, None, *_of_weights(total, q_weight, k_weight), None, None, None, None


def _of_weights(total: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
    dq_weight, dk_weight = total.view(2, -1).unbind()
    return in_dtype(dq_weight, q_weight.dtype), in_dtype(dk_weight, k_weight.dtype)


def _pair_backward(call: PairCall, *cotangents: Tensor | None) -> list[Tensor | None]:
    _, qkv_dot, q_weight, k_weight, cos, sin, _, kv_heads = call.arguments
    qkv, qkv_dot, rstd = call.saved[0], qkv_dot.contiguous(), call.saved[5]
    sizes, of_dot = (_Sizes.of(x, cos, q_weight, kv_heads) for x in (qkv, qkv_dot))
    given = sizes.cotangents(qkv, sizes.batch, *cotangents[:3])
    given_dot = sizes.cotangents(qkv, of_dot.batch, *cotangents[3:])
    dqkv, dqkv_dot = torch.empty_like(qkv), torch.empty_like(qkv_dot)
    partial, total = sums(call.kernels, qkv, 1, sizes.rows, sizes.width, (1, 2, sizes.width), 2)
    call.kernels.pair_backward(
        qkv, qkv_dot, *(c for pair in zip(given, given_dot, strict=True) for c in pair),
        *map(as_floats, (q_weight, k_weight, cos, sin)), rstd, dqkv, dqkv_dot, partial, total,
    )  # fmt: skip
    return [dqkv, dqkv_dot, *_of_weights(total, q_weight, k_weight), None, None, None, None]


def _lay_out(x: Tensor) -> Tensor:
    """Heads [B, H, L, D] may have any strides, all else is contiguous."""
    return last_contiguous(x) if x.dim() == 4 else x.contiguous()


_OPERATION = Operation(
    _NAME,
    _reference,
    _check,
    compiled(_NAME, reduces=True),
    _forward,
    _backward,
    _pair_backward,
    results=3,
    lay_out=_lay_out,
)


@takes_dual_tensors
def qk_norm_rope(
    qkv: TensorOrDual,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    *,
    kv_heads: int | None = None,
    backend: str | None = None,
) -> tuple[TensorOrDual, TensorOrDual, TensorOrDual]:
    """Splits a projection into queries, keys and values; normalises and rotates the heads of the first two.

    To queries and keys it applies RMSNorm over the head dimension, then rotary positions.

    Args:
        qkv: [B, L, (H + 2 H_kv) D] or [B · L, (H + 2 H_kv) D], heads of queries, then of keys, then of
            values; float32, bfloat16 or float16 (`reference`: any floating-point type; `cpu`: not float16).
        q_weight, k_weight: [D], weights of the norms; D is even.
        cos, sin: [L, D / 2] in float32, from `rope_tables`; pair (2i, 2i + 1) is rotated by angle i.
        eps: added to the mean square.
        kv_heads: H_kv; by default H, a third of all heads.
        backend: "cpu", "triton", "reference", or the best one that can run. "cuda" means "triton".

    Returns:
        q [B, H, L, D], k and v [B, H_kv, L, D], each a `Dual` if `qkv` is one; in the memory order of the
        projection, v a view of it. q and k are computed in fp32, rounded once.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    result: Any = _OPERATION(backend, (qkv,), q_weight, k_weight, cos, sin, eps, kv_heads)
    return result

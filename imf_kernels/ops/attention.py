"""Scaled dot-product attention: O = P V with P = softmax(S), S = c Q Kᵀ.

Tangent:  Ȯ = P V̇ + (P ∘ Ṡ) V − μ ∘ O with Ṡ = c (Q̇ Kᵀ + Q K̇ᵀ), μ_i = Σ_j P_ij Ṡ_ij.
Backward: dV = Pᵀ dO,  dS = P ∘ (dP − δ) with dP = dO Vᵀ, δ_i = Σ_j P_ij dP_ij,  dQ = c dS K,  dK = c dSᵀ Q.
Source: Vaswani et al., "Attention Is All You Need" (2017); the online softmax and the recomputing backward of
Dao et al., "FlashAttention" (2022), extended to the tangent.
Kernels: csrc/cpu/attention.cpp.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from imf_kernels import _C, cpu
from imf_kernels.dispatch import Backend, always, choose
from imf_kernels.dual import Dual, align, no_gradient, pack, tail, unpack
from imf_kernels.layout import DTYPES, last_contiguous, pointer, positions_first
from imf_kernels.ops import check

_NAME = "scaled_dot_product_attention"


def _reference(
    q: Tensor,
    q_dot: Tensor | None,
    k: Tensor,
    k_dot: Tensor | None,
    v: Tensor,
    v_dot: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    dtype, exact = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(exact), k.to(exact), v.to(exact)
    p = torch.softmax(scale * (q @ k.mT), dim=-1)
    o = p @ v
    out = o.to(dtype)
    stored = next((t for t in (q_dot, k_dot, v_dot) if t is not None), None)
    if stored is None:
        return out, None
    with torch.no_grad():
        q, k, v, p, o = (tail(x, stored) for x in (q, k, v, p, o))
        out_dot = torch.zeros_like(o) if v_dot is None else p @ v_dot.to(exact)
        if q_dot is not None or k_dot is not None:
            s_dot = torch.zeros_like(p)
            if q_dot is not None:
                s_dot += q_dot.to(exact) @ k.mT
            if k_dot is not None:
                s_dot += q @ k_dot.to(exact).mT
            p_s_dot = p * (scale * s_dot)
            out_dot += p_s_dot @ v - p_s_dot.sum(-1, keepdim=True) * o
        return out, out_dot.to(dtype)


def _check(
    query: Tensor | Dual,
    key: Tensor | Dual,
    value: Tensor | Dual,
    attn_mask: Any,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> None:
    refused = {
        "attn_mask": attn_mask is not None,
        "dropout_p": dropout_p != 0.0,
        "is_causal": is_causal,
        "enable_gqa": enable_gqa,
    }
    for argument, given in refused.items():
        if given:
            raise NotImplementedError(f"{_NAME}: {argument} is not supported yet")
    arguments = {"query": query, "key": key, "value": value}
    check.is_tensor_or_dual(_NAME, **arguments)
    for name, x in arguments.items():
        if len(x.shape) != 4:
            raise ValueError(f"{_NAME}: {name} must be [B, H, L, D], got {list(x.shape)}")
    q, k, v = (unpack(x)[0] for x in arguments.values())
    hint = "; did you pass [B, L, H, D]?" if q.shape[1] != k.shape[1] else ""
    batch, heads, keys, width = q.shape[0], q.shape[1], k.shape[2], q.shape[3]
    if tuple(k.shape) != (batch, heads, keys, width):
        raise ValueError(
            f"{_NAME}: key must be [{batch}, {heads}, L, {width}] for query of shape {list(q.shape)}, "
            f"got {list(k.shape)}{hint}"
        )
    if tuple(v.shape[:3]) != (batch, heads, keys):
        raise ValueError(
            f"{_NAME}: value must be [{batch}, {heads}, {keys}, D] for key of shape {list(k.shape)}, "
            f"got {list(v.shape)}"
        )
    check.same_device(_NAME, q, key=k, value=v)
    check.same_dtype(_NAME, q, key=k, value=v)
    for name, x in arguments.items():
        x_primal, x_dot = unpack(x)
        check.last_contiguous(_NAME, **{name: x_primal, f"{name}_dot": x_dot})


def _heads(x: Tensor | None) -> tuple[int, int, int, int]:
    """A tensor as the compiled module takes it: pointer, strides of batch, head and position."""
    return (0, 0, 0, 0) if x is None else (pointer(x), x.stride(0), x.stride(1), x.stride(2))


class _AttentionCPU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        q_dot: Tensor | None,
        k: Tensor,
        k_dot: Tensor | None,
        v: Tensor,
        v_dot: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor | None]:
        (batch, heads, queries, width), keys, value_width = q.shape, k.shape[2], v.shape[3]
        out = positions_first(q, batch, queries, value_width)
        lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
        stored = next((t for t in (q_dot, k_dot, v_dot) if t is not None), None)
        out_dot, rows = None, 0
        if stored is not None:
            rows = stored.shape[0]
            out_dot = positions_first(q, rows, queries, value_width)
            no_gradient(ctx, out_dot)
        _C.attention_forward(
            *(DTYPES[q.dtype], _heads(q), _heads(k), _heads(v), _heads(out)),
            *(_heads(q_dot), _heads(k_dot), _heads(v_dot), _heads(out_dot), pointer(lse)),
            *(batch, rows, heads, queries, keys, width, value_width),
            scale,
            torch.get_num_threads(),
        )
        ctx.save_for_backward(q, k, v, lse)
        ctx.scale = scale
        return out, out_dot

    @staticmethod
    @check.backward_of(_NAME)
    def backward(ctx: Any, dout: Tensor, dout_dot: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, lse = ctx.saved_tensors
        (batch, heads, queries, width), keys, value_width = q.shape, k.shape[2], v.shape[3]
        dout = last_contiguous(dout)
        need_q, _, need_k, _, need_v, *_ = ctx.needs_input_grad
        dq = positions_first(q, batch, queries, width) if need_q else None
        dk = positions_first(k, batch, keys, width) if need_k else None
        dv = positions_first(v, batch, keys, value_width) if need_v else None
        _C.attention_backward(
            *(DTYPES[q.dtype], _heads(q), _heads(k), _heads(v), _heads(dout)),
            *(_heads(dq), _heads(dk), _heads(dv), pointer(lse)),
            *(batch, heads, queries, keys, width, value_width, ctx.scale, torch.get_num_threads()),
        )
        return dq, None, dk, None, dv, None, None


def _cpu_unavailable(tensors: Any) -> str | None:
    _, key, _ = tensors
    return cpu.unavailable(tensors) or ("it needs at least one key" if key.shape[2] == 0 else None)


_BACKENDS = (
    Backend("cpu", _AttentionCPU.apply, _cpu_unavailable),
    Backend("reference", _reference, always),
)


def scaled_dot_product_attention(
    query: Tensor | Dual,
    key: Tensor | Dual,
    value: Tensor | Dual,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str | None = None,
) -> Any:
    """softmax(scale · query keyᵀ) value, with its tangent in the same pass.

    Any of the three may carry a tangent; what is a structural zero is not computed (tangents of the query
    alone cost 4 matrix products instead of 6).

    Args:
        query: [B, H, L_q, D], any strides with the last dimension contiguous; float32 or bfloat16
            (`reference`: any floating-point type).
        key: [B, H, L_k, D].
        value: [B, H, L_k, D_v].
        attn_mask, dropout_p, is_causal, enable_gqa: as in `torch.nn.functional`; not supported yet, and
            refused unless left at their defaults.
        scale: 1 / √D by default.
        backend: "cpu", "reference", or the best one that can run.

    Returns:
        [B, H, L_q, D_v] of the query's dtype; a `Dual` if any of the three is one. From the kernels it comes
        in the memory order [B, L_q, H, D_v], so that `.transpose(1, 2).flatten(2)` costs nothing.

    Raises:
        NotImplementedError: for what is not supported yet.
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    _check(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    (q, q_dot), (k, k_dot), (v, v_dot) = unpack(query), unpack(key), unpack(value)
    q_dot, k_dot, v_dot = align(q_dot, k_dot, v_dot)
    if scale is not None:
        check.number(_NAME, -math.inf, scale=scale)
    else:
        scale = 1.0 / math.sqrt(q.shape[-1]) if q.shape[-1] else 1.0
    run = choose(_NAME, _BACKENDS, backend, q, k, v).run
    return pack(*run(q, q_dot, k, k_dot, v, v_dot, float(scale)), query, key, value)

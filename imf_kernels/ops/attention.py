"""Scaled dot-product attention: O = P V with P = softmax(S), S = c Q Kᵀ.

Tangent:  Ȯ = P V̇ + (P ∘ Ṡ) V − μ ∘ O with Ṡ = c (Q̇ Kᵀ + Q K̇ᵀ), μ_i = Σ_j P_ij Ṡ_ij.
Backward: dV = Pᵀ dO,  dS = P ∘ (dP − δ) with dP = dO Vᵀ, δ_i = Σ_j P_ij dP_ij,  dQ = c dS K,  dK = c dSᵀ Q.
Source: Vaswani et al., "Attention Is All You Need" (2017); the online softmax and the recomputing backward of
Dao et al., "FlashAttention" (2022), extended to the tangent.
Kernels: csrc/ops/attention.h, csrc/cpu/attention.cpp, csrc/cuda/attention_sm90.cu (forward only),
backends/triton_kernels/attention.py.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from imf_kernels import _C
from imf_kernels.backends import cpu, cuda, flash, triton_launch
from imf_kernels.backends.dispatch import FLASH, Backend, in_graph
from imf_kernels.backends.layout import in_order_of, last_contiguous, unfit
from imf_kernels.backends.operators import Operation, PairCall
from imf_kernels.dual import Dual, NoTangent, last_rows, no_gradient, primal, stored, tangent_graph
from imf_kernels.ops import attention_pair, check
from imf_kernels.transforms.dual_tensors import takes_dual_tensors

NAME = "scaled_dot_product_attention"


def _softmax(logits: Tensor) -> Tensor:
    """Applies softmax along the last dimension; a row of -inf only gives zeros, and zero gradients."""
    empty = (logits == -math.inf).all(-1, keepdim=True)
    return torch.softmax(logits.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)


def _reference(
    differentiable: bool, q: Tensor, q_dot: Tensor | None, k: Tensor, k_dot: Tensor | None,
    v: Tensor, v_dot: Tensor | None, mask: Tensor | None, is_causal: bool, scale: float,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    dtype, exact = q.dtype, torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // max(k.shape[1], 1)  # query heads per head of keys and values
    # In `exact`, so that gradients of a head's copies are summed there.
    q, q_dot = q.to(exact), None if q_dot is None else q_dot.to(exact)
    k, v = (_repeated(x.to(exact), group) for x in (k, v))
    k_dot, v_dot = (None if x is None else _repeated(x.to(exact), group) for x in (k_dot, v_dot))
    s = scale * (q @ k.mT)
    if is_causal:
        mask = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask
    p = _softmax(s)
    out = (p @ v).to(dtype)
    moving = stored(q_dot, k_dot, v_dot)
    if moving is None:
        return out, None
    with tangent_graph(differentiable):
        q, k, v, p = (last_rows(x, moving) for x in (q, k, v, p))
        out_dot = p.new_zeros((*p.shape[:-1], v.shape[-1])) if v_dot is None else p @ v_dot
        if q_dot is not None or k_dot is not None:
            s_dot = torch.zeros_like(p)
            if q_dot is not None:
                s_dot += q_dot @ k.mT
            if k_dot is not None:
                s_dot += q @ k_dot.mT
            p_s_dot = p * (scale * s_dot)
            # (P ∘ (Ṡ − μ)) V = (P ∘ Ṡ) V − μ ∘ O, exactly zero with a single key, gradients too.
            out_dot += (p_s_dot - p * p_s_dot.sum(-1, keepdim=True)) @ v
        return out, out_dot.to(dtype)


def _repeated(x: Tensor, group: int) -> Tensor:
    return x if group == 1 else x.repeat_interleave(group, dim=1)


class _Asked(NamedTuple):
    """Arguments that backends inspect."""

    q: Tensor
    k: Tensor
    v: Tensor
    masked: bool
    is_causal: bool
    moving: bool  # any of the three carries a tangent
    scale: float


def _check_heads(q: Tensor, k: Tensor) -> None:
    if _have_heads(q, k) and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"{NAME}: key must be [{q.shape[0]}, {q.shape[1]}, L, {q.shape[3]}] for query of shape "
            f"{list(q.shape)}, got {list(k.shape)}; did you pass [B, L, H, D]?"
        )


def _have_heads(q: Any, k: Any) -> bool:
    return isinstance(q, Tensor) and isinstance(k, Tensor) and q.dim() == k.dim() == 4


def _check(
    q: Tensor, q_dot: Tensor | None, k: Tensor, k_dot: Tensor | None, v: Tensor, v_dot: Tensor | None,
    mask: Tensor | None, is_causal: bool, scale: float,
) -> _Asked:  # fmt: skip
    arguments = {"query": q, "key": k, "value": v}
    check.is_tensor(NAME, **arguments)
    for name, x in arguments.items():
        if x.dim() != 4:
            raise ValueError(f"{NAME}: {name} must be [B, H, L, D], got {list(x.shape)}")
    batch, heads, keys, width = q.shape[0], q.shape[1], k.shape[2], q.shape[3]
    kv_heads = k.shape[1] if k.shape[1] and heads % k.shape[1] == 0 else heads
    if tuple(k.shape) != (batch, kv_heads, keys, width):
        hint = f"; with enable_gqa H must divide {heads}" if heads != k.shape[1] else ""
        raise ValueError(
            f"{NAME}: key must be [{batch}, {heads}, L, {width}] for query of shape {list(q.shape)}, "
            f"got {list(k.shape)}{hint}"
        )
    if tuple(v.shape[:3]) != (batch, kv_heads, keys):
        raise ValueError(
            f"{NAME}: value must be [{batch}, {kv_heads}, {keys}, D] for key of shape {list(k.shape)}, "
            f"got {list(v.shape)}"
        )
    check.same_device(NAME, q, key=k, value=v)
    check.same_dtype(NAME, q, key=k, value=v)
    check.last_contiguous(NAME, query=q, query_dot=q_dot, key=k, key_dot=k_dot, value=v, value_dot=v_dot)
    check.number(NAME, -math.inf, scale=scale)
    if mask is not None:
        _check_mask(mask, is_causal, q)
    moving = stored(q_dot, k_dot, v_dot) is not None
    return _Asked(q, k, v, mask is not None, is_causal, moving, scale)


def _expanded(attn_mask: Any, q: Tensor, k: Tensor) -> Any:
    """Expands a mask to all logits, [B, H, L_q, L_k], without a copy."""
    if isinstance(attn_mask, Dual):
        raise NoTangent(f"{NAME}: attn_mask carries no tangent; pass a tensor, got a Dual")
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"{NAME}: attn_mask must be a tensor, got {type(attn_mask).__name__}")
    if attn_mask.requires_grad:
        raise ValueError(
            f"{NAME}: attn_mask requires grad, but no gradient flows to a mask; pass attn_mask.detach()"
        )
    if not _have_heads(q, k):
        return attn_mask  # refused by the checks of query and key
    shape = (*q.shape[:3], k.shape[2])
    try:
        return attn_mask.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{NAME}: attn_mask must broadcast to [B, H, L_q, L_k] = {list(shape)}, "
            f"got {list(attn_mask.shape)}"
        ) from None


def _check_mask(mask: Tensor, is_causal: bool, q: Tensor) -> None:
    if is_causal:
        raise ValueError(f"{NAME}: is_causal is a mask already; pass attn_mask or is_causal=True, not both")
    if mask.dtype not in (torch.bool, torch.float32, q.dtype):
        raise TypeError(
            f"{NAME}: attn_mask must be bool (True: the key takes part) or, to be added to the logits, "
            f"float32 or {q.dtype} like the query; got {mask.dtype}"
        )
    check.same_device(NAME, q, attn_mask=mask)


def _forward(
    ctx: Any, kernels: _C.attention, q: Tensor, q_dot: Tensor | None, k: Tensor, k_dot: Tensor | None,
    v: Tensor, v_dot: Tensor | None, mask: Tensor | None, is_causal: bool, scale: float,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    out, out_dot = in_order_of(q, q.shape[0], q.shape[2], v.shape[3]), None
    moving = stored(q_dot, k_dot, v_dot)
    if moving is not None:
        out_dot = in_order_of(q, moving.shape[0], q.shape[2], v.shape[3])
        no_gradient(ctx, out_dot)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    kernels.forward(q, k, v, q_dot, k_dot, v_dot, mask, out, out_dot, lse, scale, is_causal)
    ctx.save_for_backward(q, k, v, mask, lse)
    ctx.kernels, ctx.scale, ctx.is_causal = kernels, scale, is_causal
    return out, out_dot


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, mask, lse = ctx.saved_tensors
    _, need_q, _, need_k, _, need_v, *_ = ctx.needs_input_grad
    dq = in_order_of(q, q.shape[0], q.shape[2], q.shape[3]) if need_q else None
    dk = in_order_of(k, k.shape[0], k.shape[2], k.shape[3]) if need_k else None
    dv = in_order_of(v, v.shape[0], v.shape[2], v.shape[3]) if need_v else None
    kernels: _C.attention = ctx.kernels
    kernels.backward(q, k, v, mask, lse, last_contiguous(dout), dq, dk, dv, ctx.scale, ctx.is_causal)
    return None, dq, None, dk, None, dv, None, None, None, None


def _pair_backward(call: PairCall, dout: Tensor | None, dout_dot: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of attention_pair.py."""
    q, q_dot, k, k_dot, v, v_dot, mask, is_causal, scale = call.arguments
    inputs, needed = (q, q_dot, k, k_dot, v, v_dot, mask, call.saved[-1]), tuple(call.needed[:6])
    gradients = attention_pair.pair_backward(call.kernels, *inputs, dout, dout_dot, is_causal, scale, needed)
    return *gradients, None, None, None


def _cpu_unavailable(asked: _Asked) -> str | None:
    return cpu.unavailable(asked[:3])


def _triton_unavailable(asked: _Asked) -> str | None:
    if reason := triton_launch.unavailable(asked[:3]):
        return reason
    width = max(x.shape[3] for x in asked[:3])  # a program keeps complete rows in its registers
    return None if width <= 256 else f"it takes head dims of at most 256, got {width}"


_TRITON = triton_launch.Kernels("attention")


class _CUDA:
    """The forward of csrc/cuda; backward is Triton's, from the same lse."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, q_dot: Tensor | None, k_dot: Tensor | None, v_dot: Tensor | None,
        *rest: Any,
    ) -> None:  # fmt: skip
        # Tangents, and in graphs primals, may come in any layout.
        inputs: Any = (
            x if x is None or _aligned(x) else x.clone(memory_format=torch.contiguous_format)
            for x in (q, k, v, q_dot, k_dot, v_dot)
        )
        _C.attention_forward(*inputs, *rest)

    @staticmethod
    def backward(*arguments: Any) -> None:
        _TRITON.backward(*arguments)


def _aligned(x: Tensor) -> bool:
    """Returns whether TMA can copy boxes of x, of a head dim that fits."""
    sample, head, position, _ = x.stride()
    if min(sample, head, position) > 0 and not (sample | head | position) % 8 | x.data_ptr() % 16:
        return True  # found in a tenth of the time
    return _cuda_layout(x) is None


def _cuda_layout(x: Tensor) -> str | None:
    """Returns why TMA cannot copy boxes of x [B, H, L, D]; `None` if it can."""
    if x.shape[3] > 128 or x.shape[3] % 8:
        return f"it takes head dims that are multiples of 8 up to 128, got {x.shape[3]}"
    for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True):
        if size > 1 and (stride <= 0 or stride % 8):
            return f"it takes strides that are multiples of 8 elements and not 0, got {x.stride()}"
    if not in_graph() and x.data_ptr() % 16:  # a traced tensor has no address yet
        return f"it takes addresses that are multiples of 16 bytes, got {x.data_ptr():#x}"
    return None


_CUDA_HAS_NO_PAIR = (
    "its tangents carry no gradients: backend='triton' and 'reference' have differentiable ones"
)


def _cuda_unavailable(asked: _Asked) -> str | None:
    if asked.masked or asked.is_causal:
        return "it has no masks and no is_causal"
    if reason := unfit(asked[:3], "cuda", (torch.bfloat16,)):
        return reason
    for x in asked[:3]:
        if reason := _cuda_layout(x):
            return reason
    if asked.k.shape[2] == 0:
        return "it needs at least one key"
    if reason := cuda.missing():
        return reason
    capability = torch.cuda.get_device_capability(asked.q.device)
    if capability != (9, 0):
        return f"it runs on compute capability 9.0, got {capability[0]}.{capability[1]}"
    reason = triton_launch.missing()
    return f"its backward is Triton's: {reason}" if reason else None


def _flash(
    q: Tensor, q_dot: None, k: Tensor, k_dot: None, v: Tensor, v_dot: None, mask: None, is_causal: bool,
    scale: float,
) -> tuple[Tensor, None]:  # fmt: skip
    return flash.attention(q, k, v, is_causal, scale), None


def _flash_unavailable(asked: _Asked) -> str | None:
    if asked.masked:
        return "it has no attn_mask"
    return flash.unavailable(asked.q, asked.k, asked.v, asked.is_causal, asked.scale)


def _flash_concerns(asked: _Asked) -> bool:
    return not asked.moving


_OPERATION = Operation(
    NAME,
    _reference,
    _check,
    (
        Backend("cpu", cpu.kernels("attention"), _cpu_unavailable),
        Backend("cuda", _CUDA(), _cuda_unavailable, not_differentiable=_CUDA_HAS_NO_PAIR),
        Backend("triton", _TRITON, _triton_unavailable),
        Backend(FLASH, function=_flash, unavailable=_flash_unavailable, concerns=_flash_concerns),
    ),
    _forward,
    _backward,
    _pair_backward,
    kind="attention",
    kernels="attention",
)


@overload
def scaled_dot_product_attention(  # type: ignore[overload-overlap]
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = ..., dropout_p: float = ...,
    is_causal: bool = ..., scale: float | None = ..., enable_gqa: bool = ..., *, backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def scaled_dot_product_attention(
    query: Tensor | Dual, key: Tensor | Dual, value: Tensor | Dual, attn_mask: Tensor | None = ...,
    dropout_p: float = ..., is_causal: bool = ..., scale: float | None = ..., enable_gqa: bool = ...,
    *, backend: str | None = ...,
) -> Dual: ...  # fmt: skip
@takes_dual_tensors
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
    """Computes softmax(scale · query keyᵀ) value, with its tangent in the same pass.

    Any of the three may carry a tangent; structural zeros are skipped (tangents of the query alone cost 4
    matrix products instead of 6).

    Args:
        query: [B, H, L_q, D], any strides with the last dimension contiguous; float32 or bfloat16, for
            `triton` float16 too (`reference`: any floating-point type; `cuda`: bfloat16, D and strides
            multiples of 8, D up to 128).
        key: [B, H, L_k, D], or fewer heads with `enable_gqa`.
        value: [B, H, L_k, D_v], as many heads as the key.
        attn_mask: broadcasts to [B, H, L_q, L_k] and is never made that large in memory; of bool (True: the
            key takes part) or, added to the scaled logits, of float32 or the query's dtype. It carries no
            tangent and gets no gradient. A query that sees no key gives zero, its tangent too. Not for
            `cuda`.
        dropout_p: not supported yet, and refused unless 0.
        is_causal: query i sees the keys 0 to i; excludes `attn_mask`. Not for `cuda`.
        scale: 1 / √D by default.
        enable_gqa: allows fewer heads of key and value, each shared by as many neighbouring heads of the
            query.
        backend: "cpu", "cuda" (on compute capability 9.0; the default where a record shows it faster),
            "triton", "reference", "flash" (flash-attn, for bfloat16 and float16 on NVIDIA's GPUs, without
            a tangent and `attn_mask`; named by `use_backend`, calls with a tangent run on the default), or
            the best one that can run.

    Returns:
        [B, H, L_q, D_v] of the query's dtype; a `Dual` if any of the three is one. Kernels return it in the
        memory order [B, L_q, H, D_v], so that `.transpose(1, 2).flatten(2)` is free.

    Raises:
        NotImplementedError: for dropout.
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    q, k = primal(query), primal(key)
    if backend == FLASH and any(
        isinstance(x, Dual) and x.tangent_rows is not None for x in (query, key, value)
    ):
        raise RuntimeError(
            f"{NAME}: backend 'flash' cannot run: it has no tangents, and the query, key or value has "
            "one; inside imf_kernels.use_backend('flash') such calls run on the default backend"
        )
    if dropout_p != 0.0:
        raise NotImplementedError(f"{NAME}: dropout_p is not supported yet")
    if not enable_gqa:
        _check_heads(q, k)
    mask = attn_mask if attn_mask is None else _expanded(attn_mask, q, k)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1]) if isinstance(q, Tensor) and q.dim() and q.shape[-1] else 1.0
    return _OPERATION(backend, (query, key, value), mask, is_causal, scale)

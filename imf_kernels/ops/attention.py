"""Scaled dot-product attention: O = P V with P = softmax(S), S = c Q Kᵀ.

Tangent:  Ȯ = P V̇ + (P ∘ Ṡ) V − μ ∘ O with Ṡ = c (Q̇ Kᵀ + Q K̇ᵀ), μ_i = Σ_j P_ij Ṡ_ij.
Backward: dV = Pᵀ dO,  dS = P ∘ (dP − δ) with dP = dO Vᵀ, δ_i = Σ_j P_ij dP_ij,  dQ = c dS K,  dK = c dSᵀ Q.
Source: Vaswani et al., "Attention Is All You Need" (2017); the online softmax and the recomputing backward of
Dao et al., "FlashAttention" (2022), extended to the tangent.
Kernels: csrc/cpu/attention.cpp, _triton/attention.py, csrc/cuda/attention_sm90.cu (forward only).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from imf_kernels import _C, cpu, cuda, triton_backend
from imf_kernels.dispatch import Backend, always, choose
from imf_kernels.dual import Dual, NoTangent, align, no_gradient, pack, tail, unpack
from imf_kernels.dual_tensors import takes_dual_tensors
from imf_kernels.layout import DTYPES, in_order_of, last_contiguous, pointer, without_memory
from imf_kernels.operators import Operation
from imf_kernels.ops import check
from imf_kernels.triton_backend import Kernels

_NAME = "scaled_dot_product_attention"


def _softmax(logits: Tensor) -> Tensor:
    """Along the last dimension; a row of nothing but -inf gives zeros, and zero gradients."""
    empty = (logits == -math.inf).all(-1, keepdim=True)
    return torch.softmax(logits.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)


def _reference(
    q: Tensor,
    q_dot: Tensor | None,
    k: Tensor,
    k_dot: Tensor | None,
    v: Tensor,
    v_dot: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    dtype, exact = q.dtype, torch.promote_types(q.dtype, torch.float32)
    group = _group(q, k)
    k, k_dot, v, v_dot = (_repeated(x, group) for x in (k, k_dot, v, v_dot))
    q, k, v = q.to(exact), k.to(exact), v.to(exact)
    s = scale * (q @ k.mT)
    if is_causal:
        mask = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask
    p = _softmax(s)
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


def _group(q: Tensor, k: Tensor) -> int:
    """How many heads of the query share one of the keys and values."""
    return q.shape[1] // max(k.shape[1], 1)


def _repeated(x: Any, group: int) -> Any:
    return x if x is None or group == 1 else x.repeat_interleave(group, dim=1)


def _check(
    query: Tensor | Dual,
    key: Tensor | Dual,
    value: Tensor | Dual,
    dropout_p: float,
    enable_gqa: bool,
) -> None:
    if dropout_p != 0.0:
        raise NotImplementedError(f"{_NAME}: dropout_p is not supported yet")
    arguments = {"query": query, "key": key, "value": value}
    check.is_tensor_or_dual(_NAME, **arguments)
    for name, x in arguments.items():
        if len(x.shape) != 4:
            raise ValueError(f"{_NAME}: {name} must be [B, H, L, D], got {list(x.shape)}")
    q, k, v = (unpack(x)[0] for x in arguments.values())
    batch, heads, keys, width = q.shape[0], q.shape[1], k.shape[2], q.shape[3]
    kv_heads = k.shape[1] if enable_gqa and k.shape[1] and heads % k.shape[1] == 0 else heads
    if tuple(k.shape) != (batch, kv_heads, keys, width):
        hint = ""
        if heads != k.shape[1]:
            hint = (
                f"; with enable_gqa H must divide {heads}" if enable_gqa else "; did you pass [B, L, H, D]?"
            )
        raise ValueError(
            f"{_NAME}: key must be [{batch}, {heads}, L, {width}] for query of shape {list(q.shape)}, "
            f"got {list(k.shape)}{hint}"
        )
    if tuple(v.shape[:3]) != (batch, kv_heads, keys):
        raise ValueError(
            f"{_NAME}: value must be [{batch}, {kv_heads}, {keys}, D] for key of shape {list(k.shape)}, "
            f"got {list(v.shape)}"
        )
    check.same_device(_NAME, q, key=k, value=v)
    check.same_dtype(_NAME, q, key=k, value=v)
    for name, x in arguments.items():
        x_primal, x_dot = unpack(x)
        check.last_contiguous(_NAME, **{name: x_primal, f"{name}_dot": x_dot})


def _check_mask(attn_mask: Any, is_causal: bool, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask as one of all logits, [B, H, L_q, L_k], in the memory that it has."""
    if attn_mask is None:
        return None
    if is_causal:
        raise ValueError(f"{_NAME}: is_causal is a mask already; pass attn_mask or is_causal=True, not both")
    if isinstance(attn_mask, Dual):
        raise NoTangent(f"{_NAME}: attn_mask carries no tangent; pass a tensor, got a Dual")
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"{_NAME}: attn_mask must be a tensor, got {type(attn_mask).__name__}")
    if attn_mask.dtype not in (torch.bool, torch.float32, q.dtype):
        raise TypeError(
            f"{_NAME}: attn_mask must be bool (True: the key takes part) or, to be added to the logits, "
            f"float32 or {q.dtype} like the query; got {attn_mask.dtype}"
        )
    if attn_mask.requires_grad:
        raise ValueError(
            f"{_NAME}: attn_mask requires grad, but no gradient flows to a mask; pass attn_mask.detach()"
        )
    check.same_device(_NAME, q, attn_mask=attn_mask)
    shape = (*q.shape[:3], k.shape[2])
    try:
        return attn_mask.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{_NAME}: attn_mask must broadcast to [B, H, L_q, L_k] = {list(shape)}, "
            f"got {list(attn_mask.shape)}"
        ) from None


def _heads(x: Tensor | None) -> tuple[int, int, int, int]:
    """A tensor as the compiled module takes it: pointer, strides of batch, head and position."""
    return (0, 0, 0, 0) if x is None else (pointer(x), x.stride(0), x.stride(1), x.stride(2))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Any,
        q: Tensor,
        q_dot: Tensor | None,
        k: Tensor,
        k_dot: Tensor | None,
        v: Tensor,
        v_dot: Tensor | None,
        mask: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor | None]:
        out, out_dot = in_order_of(q, q.shape[0], q.shape[2], v.shape[3]), None
        stored = next((t for t in (q_dot, k_dot, v_dot) if t is not None), None)
        if stored is not None:
            out_dot = in_order_of(q, stored.shape[0], q.shape[2], v.shape[3])
            no_gradient(ctx, out_dot)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        kernels.forward(q, k, v, q_dot, k_dot, v_dot, mask, out, out_dot, lse, scale, is_causal)
        ctx.save_for_backward(q, k, v, mask, lse)
        ctx.kernels, ctx.scale, ctx.is_causal = kernels, scale, is_causal
        return out, out_dot

    @staticmethod
    @check.backward_of(_NAME)
    def backward(ctx: Any, dout: Tensor, dout_dot: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, mask, lse = ctx.saved_tensors
        _, need_q, _, need_k, _, need_v, *_ = ctx.needs_input_grad
        dq = in_order_of(q, q.shape[0], q.shape[2], q.shape[3]) if need_q else None
        dk = in_order_of(k, k.shape[0], k.shape[2], k.shape[3]) if need_k else None
        dv = in_order_of(v, v.shape[0], v.shape[2], v.shape[3]) if need_v else None
        dout = last_contiguous(dout)
        ctx.kernels.backward(q, k, v, mask, lse, dout, dq, dk, dv, ctx.scale, ctx.is_causal)
        return None, dq, None, dk, None, dv, None, None, None, None


class _CPU:
    """Keeps, instead of lse, the maximum of each row of Q Kᵀ (csrc/cpu/attention.h)."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_dot: Tensor | None,
        k_dot: Tensor | None,
        v_dot: Tensor | None,
        mask: None,
        out: Tensor,
        out_dot: Tensor | None,
        lse: Tensor,
        scale: float,
        is_causal: bool,
    ) -> None:
        (batch, heads, queries, width), keys, value_width = q.shape, k.shape[2], v.shape[3]
        rows = 0 if out_dot is None else out_dot.shape[0]
        _C.attention_forward(
            *(DTYPES[q.dtype], _heads(q), _heads(k), _heads(v), _heads(out)),
            *(_heads(q_dot), _heads(k_dot), _heads(v_dot), _heads(out_dot), pointer(lse)),
            *(batch, rows, heads, queries, keys, width, value_width),
            scale,
            torch.get_num_threads(),
        )

    @staticmethod
    def backward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: None,
        lse: Tensor,
        dout: Tensor,
        dq: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
        scale: float,
        is_causal: bool,
    ) -> None:
        (batch, heads, queries, width), keys, value_width = q.shape, k.shape[2], v.shape[3]
        _C.attention_backward(
            *(DTYPES[q.dtype], _heads(q), _heads(k), _heads(v), _heads(dout)),
            *(_heads(dq), _heads(dk), _heads(dv), pointer(lse)),
            *(batch, heads, queries, keys, width, value_width),
            scale,
            torch.get_num_threads(),
        )


def _cpu_unavailable(tensors: Any) -> str | None:
    query, key, _ = tensors
    if reason := cpu.unavailable(tensors):
        return reason
    if query.shape[1] != key.shape[1]:
        return f"it has no grouped heads, got {query.shape[1]} of the query and {key.shape[1]} of the key"
    return "it needs at least one key" if key.shape[2] == 0 else None


def _unmasked(tensors: Any) -> str:
    return "it has no masks and no is_causal"


def _triton_unavailable(tensors: Any) -> str | None:
    if reason := triton_backend.unavailable(tensors):
        return reason
    width = max(x.shape[3] for x in tensors)  # a program keeps whole rows in its registers
    return None if width <= 256 else f"it takes head dims of at most 256, got {width}"


class _CUDA:
    """The forward of csrc/cuda; backward is Triton's, from the same lse."""

    _triton = Kernels("attention")

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_dot: Tensor | None,
        k_dot: Tensor | None,
        v_dot: Tensor | None,
        mask: None,
        out: Tensor,
        out_dot: Tensor | None,
        lse: Tensor,
        scale: float,
        is_causal: bool,
    ) -> None:
        names = ("query", "key", "value", "query_dot", "key_dot", "value_dot")
        for name, x in zip(names, (q, k, v, q_dot, k_dot, v_dot), strict=True):
            if x is not None and (reason := _cuda_layout(x)):
                raise RuntimeError(f"{_NAME}: backend 'cuda' cannot run: of {name}, {reason}")
        (batch, heads, queries, width), keys, value_width = q.shape, k.shape[2], v.shape[3]
        rows = 0 if out_dot is None else out_dot.shape[0]
        cuda.call(
            *("attention_forward", q),
            *(DTYPES[q.dtype], _heads(q), _heads(k), _heads(v), _heads(out)),
            *(_heads(q_dot), _heads(k_dot), _heads(v_dot), _heads(out_dot), pointer(lse)),
            *(batch, rows, heads, _group(q, k), queries, keys, width, value_width),
            scale,
        )

    @staticmethod
    def backward(*arguments: Any) -> None:
        _CUDA._triton.backward(*arguments)


def _cuda_layout(x: Tensor) -> str | None:
    """Why TMA cannot copy boxes of x [B, H, L, D]; `None` where it can."""
    if x.shape[3] > 128 or x.shape[3] % 8:
        return f"it takes head dims that are multiples of 8 up to 128, got {x.shape[3]}"
    for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True):
        if size > 1 and (stride <= 0 or stride % 8):
            return f"it takes strides that are multiples of 8 elements and not 0, got {x.stride()}"
    if pointer(x) % 16:
        return f"it takes addresses that are multiples of 16 bytes, got {pointer(x):#x}"
    return None


def _cuda_unavailable(tensors: Any) -> str | None:
    for x in tensors:
        if x.device.type != "cuda":
            return f"it takes CUDA tensors, got one on {x.device}"
        if x.dtype not in check.HALVES:
            return f"it takes bfloat16 and float16, got {str(x.dtype).removeprefix('torch.')}"
        if reason := without_memory(x):
            return f"it takes tensors that lie in memory, got {reason}"
        # Of a tensor in a graph being traced there is no address yet: forward asks again.
        if not torch.compiler.is_compiling() and (reason := _cuda_layout(x)):
            return reason
    if tensors[1].shape[2] == 0:
        return "it needs at least one key"
    if reason := cuda.missing():
        return reason
    if not hasattr(_C, "attention_forward_cuda"):
        return f"it was not built for sm_90a, but for {_C.cuda_architectures}"
    capability = torch.cuda.get_device_capability(tensors[0].device)
    if capability != (9, 0):
        return f"it runs on compute capability 9.0, got {capability[0]}.{capability[1]}"
    if reason := triton_backend.missing():
        return f"its backward is Triton's: {reason}"
    return None


_OPERATION = Operation(
    "scaled_dot_product_attention",
    _Attention,
    "(Tensor q, Tensor? q_dot, Tensor k, Tensor? k_dot, Tensor v, Tensor? v_dot, Tensor? mask, "
    "bool is_causal, float scale)",
    {
        "forward": "(Tensor q, Tensor k, Tensor v, Tensor? q_dot, Tensor? k_dot, Tensor? v_dot, "
        "Tensor? mask, Tensor(a!) out, Tensor(b!)? out_dot, Tensor(c!) lse, float scale, "
        "bool is_causal) -> ()",
        "backward": "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor lse, Tensor dout, Tensor(a!)? dq, "
        "Tensor(b!)? dk, Tensor(c!)? dv, float scale, bool is_causal) -> ()",
    },
)
_TRITON = _OPERATION.backend("triton", Kernels("attention"), _triton_unavailable)
_REFERENCE = Backend("reference", _reference, always)
_BACKENDS = (
    _OPERATION.backend("cpu", _CPU, _cpu_unavailable),
    _OPERATION.backend("cuda", _CUDA, _cuda_unavailable, default=False),
    _TRITON,
    _REFERENCE,
)
_MASKED_BACKENDS = (
    _OPERATION.backend("cpu", _CPU, _unmasked),
    _OPERATION.backend("cuda", _CUDA, _unmasked, default=False),
    _TRITON,
    _REFERENCE,
)


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
    """softmax(scale · query keyᵀ) value, with its tangent in the same pass.

    Any of the three may carry a tangent; what is a structural zero is not computed (tangents of the query
    alone cost 4 matrix products instead of 6).

    Args:
        query: [B, H, L_q, D], any strides with the last dimension contiguous; float32 or bfloat16, for
            `triton` float16 too (`reference`: any floating-point type; `cuda`: bfloat16 or float16, D and
            strides multiples of 8, D up to 128).
        key: [B, H, L_k, D], or fewer heads with `enable_gqa`.
        value: [B, H, L_k, D_v], as many heads as the key.
        attn_mask: broadcasts to [B, H, L_q, L_k] and is never made that large in memory; of bool (True: the
            key takes part) or, added to the scaled logits, of float32 or the query's dtype. It carries no
            tangent and gets no gradient. A query that sees no key gives zero, its tangent too. Not for `cpu`
            and `cuda`.
        dropout_p: not supported yet, and refused unless 0.
        is_causal: query i sees the keys 0 to i; excludes `attn_mask`. Not for `cpu` and `cuda`.
        scale: 1 / √D by default.
        enable_gqa: the heads of query are a multiple of those of key and value, each of which is shared by
            that many neighbouring ones. Not for `cpu`.
        backend: "cpu", "cuda" (on request only, on compute capability 9.0; has not run on hardware yet),
            "triton", "reference", or the best one that can run.

    Returns:
        [B, H, L_q, D_v] of the query's dtype; a `Dual` if any of the three is one. From the kernels it comes
        in the memory order [B, L_q, H, D_v], so that `.transpose(1, 2).flatten(2)` costs nothing.

    Raises:
        NotImplementedError: for dropout.
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    _check(query, key, value, dropout_p, enable_gqa)
    (q, q_dot), (k, k_dot), (v, v_dot) = unpack(query), unpack(key), unpack(value)
    mask = _check_mask(attn_mask, is_causal, q, k)
    q_dot, k_dot, v_dot = align(q_dot, k_dot, v_dot)
    if scale is not None:
        check.number(_NAME, -math.inf, scale=scale)
    else:
        scale = 1.0 / math.sqrt(q.shape[-1]) if q.shape[-1] else 1.0
    backends = _BACKENDS if mask is None and not is_causal else _MASKED_BACKENDS
    run = choose(_NAME, backends, backend, q, k, v).run
    return pack(*run(q, q_dot, k, k_dot, v, v_dot, mask, is_causal, float(scale)), query, key, value)

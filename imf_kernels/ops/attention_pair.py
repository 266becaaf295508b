"""Backward of attention's pair: of O and of its tangent Ȯ, for cotangents G of O and H of Ȯ.

Per query i, with P = softmax(S), S = c Q Kᵀ, Ṡ = c (Q̇ Kᵀ + Q K̇ᵀ), μ = Σ_j P Ṡ and the centred Z = Ṡ − μ:
    O = P V,  Ȯ = P V̇ + (P ∘ Z) V.
The cotangents of P ∘ Z and of P, where it occurs directly, are
    A = H Vᵀ,  B = G Vᵀ + H V̇ᵀ.
μ depends on P and Ṡ too. By Ṡ, with ∂(P ∘ Z)_j/∂Ṡ_k = P_j (δ_jk − P_k),
    dṠ = P ∘ (A − α),  α = Σ_j P A = H·O.
By P, with ∂(P ∘ Z)_j/∂P_k = δ_jk Z_j − P_j Ṡ_k, its cotangent is B + A ∘ Z − α Ṡ. The softmax's backward
subtracts the mean under P, so a constant per row may be added, α μ:
    dS = P ∘ (W − β),  W = B + (A − α) ∘ Z,  β = Σ_j P W = G·O + H·Ȯ,
the latter as Σ_j P Z = 0. The products give
    dV = Pᵀ G + (P ∘ Z)ᵀ H,    dV̇ = Pᵀ H,
    dQ = c (dS K + dṠ K̇),      dQ̇ = c dṠ K,
    dK = c (dSᵀ Q + dṠᵀ Q̇),    dK̇ = c dṠᵀ Q.
With S, Ṡ, A and B they are fifteen products of L × L × D, ten with a tangent of the query alone; the primal's
backward has five. S, Ṡ, A and B are recomputed by tiles: nothing of size L × L is kept.

The kernels take α, β and μ from the rows of A, W and Ṡ, not from H·O and G·O + H·Ȯ, which need neither P nor
a pass of their own: O and Ȯ are rounded to their dtype, and an offset of the values would amplify that
rounding. Then O and Ȯ need not be saved either.

Source: derived here; `plain` is checked in float64 against autograd and central differences.
Kernels: csrc/ops/attention_pair.h, csrc/cpu/attention_pair.cpp, backends/triton_kernels/attention_pair.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from imf_kernels.backends.layout import in_order_of, last_contiguous
from imf_kernels.dual import stored

_QUERIES = 128  # per tile of the plain form


def plain(
    q: Tensor, q_dot: Tensor | None, k: Tensor, k_dot: Tensor | None, v: Tensor, v_dot: Tensor | None,
    mask: Tensor | None, dout: Tensor, dout_dot: Tensor, is_causal: bool, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Computes all six gradients in plain PyTorch, by tiles of queries; `None` stands for a zero tangent."""
    batch, heads, queries, _ = q.shape
    kv_heads, keys = v.shape[1:3]
    exact = torch.promote_types(q.dtype, torch.float32)

    def grouped(x: Tensor | None, like: Tensor) -> Tensor:  # [B, kv_heads, group, L, D]
        x = torch.zeros_like(like) if x is None else x
        return x.to(exact).unflatten(1, (kv_heads, -1))

    q, q_dot, dout, dout_dot = grouped(q, q), grouped(q_dot, q), grouped(dout, dout), grouped(dout_dot, dout)
    k, k_dot, v, v_dot = grouped(k, k), grouped(k_dot, k), grouped(v, v), grouped(v_dot, v)
    if is_causal:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        mask = mask.expand(batch, heads, queries, keys).unflatten(1, (kv_heads, -1))

    dq, dq_dot = torch.zeros_like(q), torch.zeros_like(q)
    dk, dk_dot, dv, dv_dot = (torch.zeros_like(x) for x in (k, k, v, v))
    for first in range(0, queries, _QUERIES):
        tile = slice(first, first + _QUERIES)
        qi, qi_dot, g, h = (x[..., tile, :] for x in (q, q_dot, dout, dout_dot))
        s = scale * (qi @ k.mT)
        if mask is not None:
            bias = mask[..., tile, :]
            s = s.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else s + bias
        lse = torch.logsumexp(s, dim=-1, keepdim=True)
        p = torch.exp(s - lse.masked_fill(lse == -math.inf, 0.0))  # zeros where a query sees no key
        s_dot = scale * (qi_dot @ k.mT + qi @ k_dot.mT)
        z = s_dot - (p * s_dot).sum(-1, keepdim=True)
        a, b = h @ v.mT, g @ v.mT + h @ v_dot.mT
        a = a - (p * a).sum(-1, keepdim=True)
        w = b + a * z
        ds, ds_dot = p * (w - (p * w).sum(-1, keepdim=True)), p * a

        dq[..., tile, :], dq_dot[..., tile, :] = ds @ k + ds_dot @ k_dot, ds_dot @ k
        dk += (ds.mT @ qi + ds_dot.mT @ qi_dot).sum(2, keepdim=True)
        dk_dot += (ds_dot.mT @ qi).sum(2, keepdim=True)
        dv += (p.mT @ g + (p * z).mT @ h).sum(2, keepdim=True)
        dv_dot += (p.mT @ h).sum(2, keepdim=True)
    gradients = scale * dq, scale * dq_dot, scale * dk, scale * dk_dot, dv, dv_dot
    return tuple(x.flatten(1, 2) for x in gradients)


def pair_backward(
    kernels: Any, q: Tensor, q_dot: Tensor | None, k: Tensor, k_dot: Tensor | None, v: Tensor,
    v_dot: Tensor | None, mask: Tensor | None, lse: Tensor, dout: Tensor | None, dout_dot: Tensor | None,
    is_causal: bool, scale: float, needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Computes the gradients of query, its tangent, key, its tangent, value and its tangent.

    Args:
        kernels: those that ran the forward, with `backward` and `pair_backward`.
        q, k, v, mask, lse: as the forward took and wrote them.
        q_dot, k_dot, v_dot: tangents of the last n samples, `None` for zeros; one at least is given.
        dout: [B, H, L_q, D_v], the cotangent of the output; `None` for zeros.
        dout_dot: [n, H, L_q, D_v], that of its tangent; `None` for zeros.
        needs: which of the six are wanted; a tangent that is `None` has no gradient.

    Returns:
        The six, `None` where not wanted, or zero for lack of a cotangent.
    """
    given = (q, q_dot, k, k_dot, v, v_dot)
    tangents = stored(q_dot, k_dot, v_dot)
    moving = 0 if tangents is None or dout_dot is None else tangents.shape[0]
    still = q.shape[0] - moving
    gradients = tuple(
        in_order_of(x, moving if is_tangent else x.shape[0], *x.shape[2:])
        if x is not None and wanted and (moving if is_tangent else moving or dout is not None)
        else None
        for x, wanted, is_tangent in zip(given, needs, (False, True) * 3, strict=True)
    )
    dq, dq_dot, dk, dk_dot, dv, dv_dot = gradients
    dout = None if dout is None else last_contiguous(dout)
    if still and dout is not None:
        head = slice(None, still)
        cotangent, *primals = _samples(head, dout, dq, dk, dv)
        kernels.backward(*_samples(head, q, k, v, mask, lse), cotangent, *primals, scale, is_causal)
    elif still:
        for x in _samples(slice(None, still), dq, dk, dv):
            if x is not None:
                x.zero_()
    if moving:
        assert dout_dot is not None
        tail = slice(still, None)
        kernels.pair_backward(
            *_samples(tail, q, k, v),
            *(q_dot, k_dot, v_dot),
            *_samples(tail, mask, lse, dout),
            last_contiguous(dout_dot),
            *_samples(tail, dq, dk, dv),
            *(dq_dot, dk_dot, dv_dot, scale, is_causal),
        )
    return gradients


def _samples(chosen: slice, *tensors: Tensor | None) -> tuple[Any, ...]:
    if chosen == slice(0, None):  # no views, into which graphs would have to copy
        return tensors
    return tuple(x if x is None else x[chosen] for x in tensors)

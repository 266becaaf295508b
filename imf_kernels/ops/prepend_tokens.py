"""Condition tokens before a sequence: y[b] = [c_1[b]; …; c_G[b]; x[b]] with c_g[b] = T_g + e_g[b].

A group g has n_g learned tokens T_g [n_g, d], to each of which the sample's embedding e_g[b] [d] is added.
Tangent:  ẏ[b] = [ė_1[b] n_1 times; …; ẋ[b]].
Backward: dT_g = Σ_b dc_g[b],  de_g[b] = Σ_i dc_g[b, i],  dx = the rest of dy.
Source: the in-context conditioning of iMF (Geng et al., "Improved Mean Flows", 2025, arXiv 2512.02012).
Kernels: csrc/cpu/prepend_tokens.cpp, imf_kernels/_triton/prepend_tokens.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from imf_kernels import _C, cpu, triton_backend
from imf_kernels.dispatch import Backend, always, choose
from imf_kernels.dual import Dual, align, no_gradient, pack, unpack
from imf_kernels.dual_tensors import takes_dual_tensors
from imf_kernels.layout import DTYPES, pointer
from imf_kernels.operators import Operation
from imf_kernels.ops import check
from imf_kernels.triton_backend import Kernels


def _reference(x: Tensor, x_dot: Tensor | None, count: int, *groups: Any) -> tuple[Tensor, Tensor | None]:
    tokens, embeddings, embedding_dots = groups[:count], groups[count : 2 * count], groups[2 * count :]
    y = torch.cat([t + e[:, None] for t, e in zip(tokens, embeddings, strict=True)] + [x], dim=1)
    stored = next((t for t in (x_dot, *embedding_dots) if t is not None), None)
    if stored is None:
        return y, None
    with torch.no_grad():
        n, d = stored.shape[0], x.shape[2]
        parts = []
        for t, e_dot in zip(tokens, embedding_dots, strict=True):
            zero = x.new_zeros(()) if e_dot is None else e_dot[:, None]
            parts.append(zero.expand(n, t.shape[0], d))
        parts.append(x.new_zeros((n, *x.shape[1:])) if x_dot is None else x_dot)
        return y, torch.cat(parts, dim=1)


def _check(x: Tensor | Dual, groups: Sequence[tuple[Tensor, Tensor | Dual]]) -> None:
    name = "prepend_tokens"
    check.is_tensor_or_dual(name, x=x)
    x, _ = unpack(x)
    if x.dim() != 3:
        raise ValueError(f"{name}: x must be [B, N, d], got {list(x.shape)}")
    for i, group in enumerate(groups):
        if not isinstance(group, (tuple, list)) or len(group) != 2:
            raise TypeError(f"{name}: groups must be (tokens, embedding) pairs, got {group!r} at {i}")
        tokens, embedding = group
        check.is_tensor(name, **{f"tokens of group {i}": tokens})
        check.is_tensor_or_dual(name, **{f"embedding of group {i}": embedding})
        e, _ = unpack(embedding)
        if tokens.dim() != 2 or tokens.shape[1] != x.shape[2]:
            raise ValueError(
                f"{name}: tokens of group {i} must be [n, {x.shape[2]}] for x of shape {list(x.shape)}, "
                f"got {list(tokens.shape)}"
            )
        check.has_shape(name, f"embedding of group {i}", e, (x.shape[0], x.shape[2]))
        arguments = {f"tokens of group {i}": tokens, f"embedding of group {i}": e}
        check.same_device(name, x, **arguments)
        check.same_dtype(name, x, **arguments)


class _PrependTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Any, x: Tensor, x_dot: Tensor | None, count: int, *groups: Any
    ) -> tuple[Tensor, Tensor | None]:
        x, x_dot = x.contiguous(), None if x_dot is None else x_dot.contiguous()
        groups = tuple(None if t is None else t.contiguous() for t in groups)
        tokens, embeddings, embedding_dots = groups[:count], groups[count : 2 * count], groups[2 * count :]
        batch, length, width = x.shape
        ctx.counts = [t.shape[0] for t in tokens]
        total = sum(ctx.counts) + length
        y, y_dot = x.new_empty((batch, total, width)), None
        stored = next((t for t in (x_dot, *embedding_dots) if t is not None), None)
        if stored is not None:
            y_dot = x.new_empty((stored.shape[0], total, width))
            no_gradient(ctx, y_dot)
        kernels.forward(x, x_dot, tokens, embeddings, embedding_dots, y, y_dot)
        return y, y_dot

    @staticmethod
    @check.backward_of("prepend_tokens")
    def backward(ctx: Any, dy: Tensor, dy_dot: Tensor | None) -> tuple[Tensor | None, ...]:
        prefix = sum(ctx.counts)
        groups = dy[:, :prefix].split(ctx.counts, dim=1)
        dtokens = [g.sum(dim=0) for g in groups]
        dembeddings = [g.sum(dim=1) for g in groups]
        return None, dy[:, prefix:], None, None, *dtokens, *dembeddings, *([None] * len(groups))


class _CPU:
    @staticmethod
    def forward(
        x: Tensor,
        x_dot: Tensor | None,
        tokens: Sequence[Tensor],
        embeddings: Sequence[Tensor],
        embedding_dots: Sequence[Tensor | None],
        y: Tensor,
        y_dot: Tensor | None,
    ) -> None:
        batch, length, width = x.shape
        _C.prepend_tokens_forward(
            DTYPES[x.dtype],
            [
                (pointer(t), pointer(e), pointer(e_dot), t.shape[0])
                for t, e, e_dot in zip(tokens, embeddings, embedding_dots, strict=True)
            ],
            *(pointer(x), pointer(x_dot), pointer(y), pointer(y_dot)),
            *(batch, 0 if y_dot is None else y_dot.shape[0], length, width, torch.get_num_threads()),
        )


_OPERATION = Operation(
    "prepend_tokens",
    _PrependTokens,
    "(Tensor x, Tensor? x_dot, int count, Tensor?[] groups)",
    {
        "forward": "(Tensor x, Tensor? x_dot, Tensor[] tokens, Tensor[] embeddings, "
        "Tensor?[] embedding_dots, Tensor(a!) y, Tensor(b!)? y_dot) -> ()"
    },
    contiguous=True,
)
_BACKENDS = (
    _OPERATION.backend("cpu", _CPU, cpu.unavailable),
    _OPERATION.backend("triton", Kernels("prepend_tokens"), triton_backend.unavailable, also=("cuda",)),
    Backend("reference", _reference, always),
)


@takes_dual_tensors
def prepend_tokens(
    x: Tensor | Dual, groups: Iterable[tuple[Tensor, Tensor | Dual]], *, backend: str | None = None
) -> Any:
    """Learned condition tokens, each plus its sample's embedding, put before a sequence, with the tangent.

    Args:
        x: [B, N, d], float32, bfloat16 or float16 (`reference`: any floating-point type; `cpu`: not float16).
        groups: (tokens, embedding) pairs in their order in the sequence: tokens [n, d] are weights, the
            embedding [B, d], a tensor or a `Dual`, is added to each of them.
        backend: "cpu", "triton", "reference", or the best one that can run; "cuda" means "triton".

    Returns:
        [B, Σn + N, d] of x's dtype; a `Dual` if `x` or an embedding is one.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    groups = list(groups)
    _check(x, groups)
    primal, x_dot = unpack(x)
    pairs = [unpack(e) for _, e in groups]
    x_dot, *embedding_dots = align(x_dot, *(e_dot for _, e_dot in pairs))
    tokens = [t for t, _ in groups]
    run = choose("prepend_tokens", _BACKENDS, backend, primal).run
    result = run(primal, x_dot, len(groups), *tokens, *(e for e, _ in pairs), *embedding_dots)
    return pack(*result, x, *(e for _, e in groups))

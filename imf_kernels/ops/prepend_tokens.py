"""Condition tokens before a sequence: y[b] = [c_1[b]; …; c_G[b]; x[b]] with c_g[b] = T_g + e_g[b].

A group g has n_g learned tokens T_g [n_g, d], to each of which the sample's embedding e_g[b] [d] is added.
Tangent:  ẏ[b] = [ė_1[b] n_1 times; …; ẋ[b]].
Backward: dT_g = Σ_b dc_g[b],  de_g[b] = Σ_i dc_g[b, i],  dx = the rest of dy.
Source: the in-context conditioning of iMF (Geng et al., "Improved Mean Flows", 2025, arXiv 2512.02012).
Plain PyTorch: a separate kernel gained 0.1 to 1 % of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from imf_kernels.backends.operators import Operation
from imf_kernels.dual import Dual, align, is_differentiable, pack, stored, tangent_graph, unpack
from imf_kernels.ops import check
from imf_kernels.transforms.dual_tensors import takes_dual_tensors


def _reference(
    differentiable: bool, x: Tensor, x_dot: Tensor | None, count: int, *groups: Any
) -> tuple[Tensor, Tensor | None]:
    tokens, embeddings, embedding_dots = groups[:count], groups[count : 2 * count], groups[2 * count :]
    y = torch.cat([t + e[:, None] for t, e in zip(tokens, embeddings, strict=True)] + [x], dim=1)
    moving = stored(x_dot, *embedding_dots)
    if moving is None:
        return y, None
    with tangent_graph(differentiable):
        y_dot, first = x.new_zeros((moving.shape[0], *y.shape[1:])), 0
        for t, e_dot in zip(tokens, embedding_dots, strict=True):
            if e_dot is not None:
                y_dot[:, first : first + t.shape[0]] = e_dot[:, None]
            first += t.shape[0]
        if x_dot is not None:
            y_dot[:, first:] = x_dot
    return y, y_dot


def _pairs(groups: Iterable[tuple[Tensor, Tensor | Dual]]) -> list[tuple[Tensor, Tensor | Dual]]:
    pairs = list(groups)
    for i, group in enumerate(pairs):
        if not isinstance(group, (tuple, list)) or len(group) != 2:
            raise TypeError(f"prepend_tokens: groups must be (tokens, embedding) pairs, got {group!r} at {i}")
    return pairs


def _check(x: Tensor, x_dot: Tensor | None, count: int, *groups: Any) -> Sequence[Tensor]:
    name = "prepend_tokens"
    check.is_tensor(name, x=x)
    if x.dim() != 3:
        raise ValueError(f"{name}: x must be [B, N, d], got {list(x.shape)}")
    for i, (tokens, embedding) in enumerate(zip(groups[:count], groups[count : 2 * count], strict=True)):
        check.is_weight(name, **{f"tokens of group {i}": tokens})
        check.is_tensor(name, **{f"embedding of group {i}": embedding})
        if tokens.dim() != 2 or tokens.shape[1] != x.shape[2]:
            raise ValueError(
                f"{name}: tokens of group {i} must be [n, {x.shape[2]}] for x of shape {list(x.shape)}, "
                f"got {list(tokens.shape)}"
            )
        check.has_shape(name, f"embedding of group {i}", embedding, (x.shape[0], x.shape[2]))
        arguments = {f"tokens of group {i}": tokens, f"embedding of group {i}": embedding}
        check.same_device(name, x, **arguments)
        check.same_dtype(name, x, **arguments)
    return (x,)


_OPERATION = Operation("prepend_tokens", _reference, _check, reference_aliases=("cpu", "triton", "cuda"))


@overload
def prepend_tokens(  # type: ignore[overload-overlap]
    x: Tensor, groups: Iterable[tuple[Tensor, Tensor]], *, backend: str | None = None
) -> Tensor: ...
@overload
def prepend_tokens(
    x: Tensor | Dual, groups: Iterable[tuple[Tensor, Tensor | Dual]], *, backend: str | None = None
) -> Dual: ...
@takes_dual_tensors
def prepend_tokens(
    x: Tensor | Dual, groups: Iterable[tuple[Tensor, Tensor | Dual]], *, backend: str | None = None
) -> Any:
    """Prepends learned condition tokens, each plus its sample's embedding, to a sequence, with the tangent.

    Args:
        x: [B, N, d], any floating-point type.
        groups: (tokens, embedding) pairs in their order in the sequence: tokens [n, d] are weights, the
            embedding [B, d], a tensor or a `Dual`, is added to each of them.
        backend: every name means "reference", plain PyTorch.

    Returns:
        [B, Σn + N, d] of x's dtype; a `Dual` if `x` or an embedding is one.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    primal, x_dot = unpack(x)
    groups = _pairs(groups)
    pairs = [unpack(e) for _, e in groups]
    x_dot, *embedding_dots = align(x_dot, *(e_dot for _, e_dot in pairs))
    tensors = *(t for t, _ in groups), *(e for e, _ in pairs), *embedding_dots
    inputs = (x, *(e for _, e in groups))
    arguments = (primal, x_dot, len(groups), *tensors)
    return pack(*_OPERATION.run(backend, arguments, is_differentiable(*inputs)), *inputs)

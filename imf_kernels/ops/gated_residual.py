"""Gated residual: y = x + b · g with one gate per channel, shared by all rows or separate per sample.

Tangent:  ẏ = ẋ + ḃ · g + b · ġ (a gate shared by all rows is a weight and carries no tangent).
Backward: dx = dy,  db = dy · g,  dg = Σ dy · b over the rows that share the gate.
Pair:     dẋ = dẏ,  dḃ = dẏ · g,  dġ = Σ dẏ · b,
          dx = dy,  db = dy · g + dẏ · ġ,  dg = Σ dy · b + dẏ · ḃ.
Source: the residual scales of iMF (Geng et al., "Improved Mean Flows", 2025, arXiv 2512.02012); for gates per
sample DiT (Peebles and Xie, "Scalable Diffusion Models with Transformers", 2022, arXiv 2212.09748).
Kernels: csrc/ops/gated_residual.h, csrc/cpu/gated_residual.cpp, backends/triton_kernels/gated_residual.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from imf_kernels import _C
from imf_kernels.backends.layout import (
    as_floats,
    contiguous_like,
    groups_of,
    in_dtype,
    in_rows,
    or_zeros,
    per_position,
    sums,
)
from imf_kernels.backends.operators import Operation, PairCall, compiled
from imf_kernels.dual import Dual, NoTangent, last_rows, no_gradient, stored, tangent_graph
from imf_kernels.ops import check
from imf_kernels.transforms.dual_tensors import takes_dual_tensors


def _reference(
    differentiable: bool, x: Tensor, x_dot: Tensor | None, branch: Tensor, branch_dot: Tensor | None,
    gate: Tensor, gate_dot: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    dtype, exact = x.dtype, torch.promote_types(x.dtype, torch.float32)
    b, g = branch.to(exact), per_position(gate.to(exact), x)
    y = (x.to(exact) + b * g).to(dtype)
    parts = []
    with tangent_graph(differentiable):
        if x_dot is not None:
            parts.append(x_dot.to(exact))
        if branch_dot is not None:
            parts.append(branch_dot.to(exact) * (g if gate.dim() == 1 else last_rows(g, branch_dot)))
        if gate_dot is not None:
            parts.append(last_rows(b, gate_dot) * per_position(gate_dot.to(exact), x))
        return y, sum(parts[1:], parts[0]).to(dtype) if parts else None


def _check(
    x: Tensor, x_dot: Tensor | None, branch: Tensor, branch_dot: Tensor | None,
    gate: Tensor, gate_dot: Tensor | None,
) -> Sequence[Tensor]:  # fmt: skip
    check.is_tensor("gated_residual", x=x, branch=branch, gate=gate)
    check.single_row_is_complete("gated_residual", x=(x, x_dot), branch=(branch, branch_dot))
    if x.dim() == 0:
        raise ValueError("gated_residual: x must have at least one dimension, got a scalar")
    check.has_shape("gated_residual", "branch", branch, x.shape, " like x")
    wanted = [x.shape[-1:]] if x.dim() == 1 else [x.shape[-1:], (x.shape[0], x.shape[-1])]
    # Of one length each: comparing tuples of two would bind an exported graph to batches other than d.
    if not any(gate.dim() == len(shape) and gate.shape == shape for shape in wanted):
        shapes = " or, a row per sample, ".join(str(list(shape)) for shape in wanted)
        raise ValueError(
            f"gated_residual: gate must be {shapes}, one gate per channel of x of shape {list(x.shape)}; "
            f"got {list(gate.shape)}"
        )
    check.same_device("gated_residual", x, branch=branch, gate=gate)
    check.of_stream("gated_residual", x, branch=branch)
    check.last_contiguous("gated_residual", x=x, x_dot=x_dot, branch=branch, branch_dot=branch_dot)
    return (x, branch) if gate.dim() == 1 else (x, branch, gate)


def _forward(
    ctx: Any, kernels: _C.gated_residual, x: Tensor, x_dot: Tensor | None,
    branch: Tensor, branch_dot: Tensor | None, gate: Tensor, gate_dot: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    branch, y, y_dot = in_rows(branch), contiguous_like(x), None
    moving = stored(x_dot, branch_dot, gate_dot)
    if moving is not None:
        y_dot = contiguous_like(last_rows(x, moving))
        no_gradient(ctx, y_dot)
        x_dot, branch_dot = (None if t is None else in_rows(t) for t in (x_dot, branch_dot))
    g_dot = None if gate_dot is None else as_floats(gate_dot)
    kernels.forward(in_rows(x), x_dot, branch, branch_dot, as_floats(gate), g_dot, y, y_dot)
    ctx.save_for_backward(branch, gate)
    ctx.kernels = kernels
    return y, y_dot


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    branch, gate = ctx.saved_tensors
    kernels: _C.gated_residual = ctx.kernels
    dbranch = contiguous_like(branch)
    partial, dgate = sums(kernels, branch, *groups_of(gate, branch), branch.shape[-1], gate.shape)
    kernels.backward(in_rows(dy), branch, as_floats(gate), dbranch, partial, dgate)
    return None, dy, None, dbranch, None, in_dtype(dgate, gate.dtype), None


def _pair_backward(call: PairCall, dy: Tensor | None, dy_dot: Tensor | None) -> list[Tensor | None]:
    x, x_dot, branch, branch_dot, gate, gate_dot = call.arguments
    branch, width = in_rows(branch), branch.shape[-1]
    branch_dot = None if branch_dot is None else in_rows(branch_dot)
    groups, length = groups_of(gate, branch)
    moving = stored(x_dot, branch_dot, gate_dot)
    assert moving is not None
    dy, dy_dot = or_zeros(dy, x), or_zeros(dy_dot, last_rows(x, moving))
    dbranch = contiguous_like(branch)
    dbranch_dot = None if branch_dot is None else contiguous_like(branch_dot)
    partial, total = sums(call.kernels, branch, groups, length, width, (groups, 2, width), 2)
    g_dot = None if gate_dot is None else as_floats(gate_dot)
    call.kernels.pair_backward(
        *(dy, dy_dot, branch, branch_dot, as_floats(gate), g_dot, dbranch, dbranch_dot, partial, total)
    )
    dgate, dgate_dot = total.unbind(1)
    return [
        *(dy, None if x_dot is None else dy_dot, dbranch, dbranch_dot),
        in_dtype(dgate.view(gate.shape), gate.dtype),
        None if gate_dot is None else in_dtype(last_rows(dgate_dot, gate_dot), gate.dtype),
    ]


_BACKENDS = compiled("gated_residual")
_OPERATION = Operation(
    "gated_residual", _reference, _check, _BACKENDS, _forward, _backward, _pair_backward, lay_out=in_rows
)


@overload
def gated_residual(  # type: ignore[overload-overlap]
    x: Tensor, branch: Tensor, gate: Tensor, *, backend: str | None = None
) -> Tensor: ...
@overload
def gated_residual(
    x: Tensor | Dual, branch: Tensor | Dual, gate: Tensor | Dual, *, backend: str | None = None
) -> Dual: ...
@takes_dual_tensors
def gated_residual(
    x: Tensor | Dual, branch: Tensor | Dual, gate: Tensor | Dual, *, backend: str | None = None
) -> Any:
    """Computes x + branch · gate, with its tangent.

    Args:
        x: [..., d], the residual stream; float32, bfloat16 or float16 (`reference`: any floating-point type;
            `cpu`: not float16).
        branch: like x; bfloat16 and float16 may be added to a stream of float32.
        gate: [d], one gate per channel, of any floating-point type and without a tangent; or [B, d], one row
            per sample of x [B, ..., d], of any of x's types.
        backend: "cpu", "triton", "reference", or the best one that can run. "cuda" means "triton".

    Returns:
        Like x; a `Dual` if any argument is one. Computed in fp32, rounded once.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    if isinstance(gate, Dual) and gate.dim() == 1:
        raise NoTangent("gated_residual: gate [d] carries no tangent; pass a tensor, got a Dual")
    return _OPERATION(backend, (x, branch, gate))

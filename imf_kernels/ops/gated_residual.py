"""Gated residual: y = x + b · g with one gate a channel.

Tangent:  ẏ = ẋ + ḃ · g (the gate is a weight and carries no tangent).
Backward: dx = dy,  db = dy · g,  dg = Σ_rows dy · b.
Source: the residual scales of iMF's blocks (Geng et al., "Improved Mean Flows", 2025, arXiv 2512.02012).
Kernels: csrc/cpu/gated_residual.cpp, imf_kernels/_triton/gated_residual.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imf_kernels import _C, cpu, triton_backend
from imf_kernels.dispatch import Backend, always, choose
from imf_kernels.dual import Dual, align, no_gradient, pack, unpack
from imf_kernels.dual_tensors import takes_dual_tensors
from imf_kernels.layout import DTYPES, contiguous_like, count_rows, last_contiguous, pointer, rows_of
from imf_kernels.operators import Operation
from imf_kernels.ops import check
from imf_kernels.triton_backend import Kernels


def _reference(
    x: Tensor, x_dot: Tensor | None, branch: Tensor, branch_dot: Tensor | None, gate: Tensor
) -> tuple[Tensor, Tensor | None]:
    dtype, exact = x.dtype, torch.promote_types(x.dtype, torch.float32)
    g = gate.to(exact)
    y = (x.to(exact) + branch.to(exact) * g).to(dtype)
    if x_dot is None and branch_dot is None:
        return y, None
    with torch.no_grad():
        parts = [] if x_dot is None else [x_dot.to(exact)]
        parts += [] if branch_dot is None else [branch_dot.to(exact) * g]
        return y, sum(parts[1:], parts[0]).to(dtype)


def _check(x: Tensor | Dual, branch: Tensor | Dual, gate: Tensor) -> None:
    check.is_tensor_or_dual("gated_residual", x=x, branch=branch)
    check.is_tensor("gated_residual", gate=gate)
    check.single_row_whole("gated_residual", x=x, branch=branch)
    (x, x_dot), (branch, branch_dot) = unpack(x), unpack(branch)
    if x.dim() == 0:
        raise ValueError("gated_residual: x must have at least one dimension, got a scalar")
    check.has_shape("gated_residual", "branch", branch, x.shape, " like x")
    check.has_shape("gated_residual", "gate", gate, x.shape[-1:], ", one gate a channel")
    check.same_device("gated_residual", x, branch=branch, gate=gate)
    if branch.dtype != x.dtype and not (x.dtype == torch.float32 and branch.dtype in check.HALVES):
        raise TypeError(
            "gated_residual: branch must be of x's dtype, or bfloat16 or float16 beside x of float32; "
            f"got {branch.dtype} beside {x.dtype}"
        )
    check.last_contiguous("gated_residual", x=x, x_dot=x_dot, branch=branch, branch_dot=branch_dot)


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Any,
        x: Tensor,
        x_dot: Tensor | None,
        branch: Tensor,
        branch_dot: Tensor | None,
        gate: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        y, y_dot = contiguous_like(x), None
        tangent = x_dot if x_dot is not None else branch_dot
        if tangent is not None:
            y_dot = contiguous_like(tangent, x.dtype)
            no_gradient(ctx, y_dot)
        kernels.forward(x, x_dot, branch, branch_dot, gate, y, y_dot)
        ctx.save_for_backward(branch, gate)
        ctx.kernels = kernels
        return y, y_dot

    @staticmethod
    @check.backward_of("gated_residual")
    def backward(ctx: Any, dy: Tensor, dy_dot: Tensor | None) -> tuple[Tensor | None, ...]:
        branch, gate = ctx.saved_tensors
        dbranch = contiguous_like(branch)
        dgate = ctx.kernels.backward(last_contiguous(dy), branch, gate, dbranch)
        return None, dy, None, dbranch, None, dgate.to(gate.dtype)


class _CPU:
    @staticmethod
    def forward(
        x: Tensor,
        x_dot: Tensor | None,
        branch: Tensor,
        branch_dot: Tensor | None,
        gate: Tensor,
        y: Tensor,
        y_dot: Tensor | None,
    ) -> None:
        (x_rows, x_stride), (xt_rows, xt_stride) = rows_of(x), rows_of(x_dot)
        (b_rows, b_stride), (bt_rows, bt_stride) = rows_of(branch), rows_of(branch_dot)
        g = gate.float().contiguous()
        _C.gated_residual_forward(
            *(DTYPES[x.dtype], DTYPES[branch.dtype], pointer(x_rows), pointer(xt_rows)),
            *(pointer(b_rows), pointer(bt_rows), pointer(g), pointer(y), pointer(y_dot)),
            *(count_rows(x), count_rows(y_dot), x.shape[-1]),
            *(x_stride, xt_stride, b_stride, bt_stride, torch.get_num_threads()),
        )

    @staticmethod
    def backward(dy: Tensor, branch: Tensor, gate: Tensor, dbranch: Tensor) -> Tensor:
        width, threads = branch.shape[-1], torch.get_num_threads()
        (dy_rows, dy_stride), (b_rows, b_stride) = rows_of(dy), rows_of(branch)
        g = gate.float().contiguous()
        dgate = branch.new_empty((threads, width), dtype=torch.float32)
        _C.gated_residual_backward(
            *(DTYPES[dy.dtype], DTYPES[branch.dtype], pointer(dy_rows), pointer(b_rows)),
            *(pointer(g), pointer(dbranch), pointer(dgate)),
            *(count_rows(branch), width, dy_stride, b_stride, threads),
        )
        return dgate[0]


_OPERATION = Operation(
    "gated_residual",
    _GatedResidual,
    "(Tensor x, Tensor? x_dot, Tensor branch, Tensor? branch_dot, Tensor gate)",
    {
        "forward": "(Tensor x, Tensor? x_dot, Tensor branch, Tensor? branch_dot, Tensor gate, Tensor(a!) y, "
        "Tensor(b!)? y_dot) -> ()",
        "backward": "(Tensor dy, Tensor branch, Tensor gate, Tensor(a!) dbranch) -> Tensor",
    },
    {"backward": lambda dy, branch, gate, dbranch: gate.new_empty(gate.shape, dtype=torch.float32)},
)
_BACKENDS = (
    _OPERATION.backend("cpu", _CPU, cpu.unavailable),
    _OPERATION.backend("triton", Kernels("gated_residual"), triton_backend.unavailable),
    Backend("reference", _reference, always),
)


@takes_dual_tensors
def gated_residual(
    x: Tensor | Dual, branch: Tensor | Dual, gate: Tensor, *, backend: str | None = None
) -> Any:
    """x + branch · gate, with its tangent.

    Args:
        x: [..., d], the residual stream; float32, bfloat16 or float16 (`reference`: any floating-point type;
            `cpu`: not float16).
        branch: like x; bfloat16 and float16 may be added to a stream of float32.
        gate: [d], one gate a channel, of any floating-point type.
        backend: "cpu", "triton", "reference", or the best one that can run.

    Returns:
        Like x; a `Dual` if `x` or `branch` is one. Computed in fp32, rounded once.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    _check(x, branch, gate)
    (x_primal, x_dot), (b_primal, b_dot) = unpack(x), unpack(branch)
    x_dot, b_dot = align(x_dot, b_dot)
    run = choose("gated_residual", _BACKENDS, backend, x_primal, b_primal).run
    return pack(*run(x_primal, x_dot, b_primal, b_dot, gate), x, branch)

"""Gated residual: y = x + b · g with one gate a channel, the same for all rows or each sample's own.

Tangent:  ẏ = ẋ + ḃ · g + b · ġ (a gate for all rows is a weight and carries no tangent).
Backward: dx = dy,  db = dy · g,  dg = Σ dy · b over the rows that have the gate in common.
Source: the residual scales of iMF's blocks (Geng et al., "Improved Mean Flows", 2025, arXiv 2512.02012); a
sample's own in DiT (Peebles and Xie, "Scalable Diffusion Models with Transformers", 2022, arXiv 2212.09748).
Kernels: csrc/cpu/gated_residual.cpp, csrc/cuda/gated_residual.cu, imf_kernels/_triton/gated_residual.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imf_kernels import _C, cpu, cuda, triton_backend
from imf_kernels.dispatch import Backend, always, choose
from imf_kernels.dual import Dual, align, no_gradient, pack, tail, unpack
from imf_kernels.dual_tensors import takes_dual_tensors
from imf_kernels.layout import (
    DTYPES,
    beside,
    contiguous_like,
    count_rows,
    groups_of,
    last_contiguous,
    pointer,
    rows_of,
)
from imf_kernels.operators import Operation
from imf_kernels.ops import check
from imf_kernels.triton_backend import Kernels


def _reference(
    x: Tensor,
    x_dot: Tensor | None,
    branch: Tensor,
    branch_dot: Tensor | None,
    gate: Tensor,
    gate_dot: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    dtype, exact = x.dtype, torch.promote_types(x.dtype, torch.float32)
    b, g = branch.to(exact), beside(gate.to(exact), x)
    y = (x.to(exact) + b * g).to(dtype)
    parts = []
    with torch.no_grad():
        if x_dot is not None:
            parts.append(x_dot.to(exact))
        if branch_dot is not None:
            parts.append(branch_dot.to(exact) * (g if gate.dim() == 1 else tail(g, branch_dot)))
        if gate_dot is not None:
            parts.append(tail(b, gate_dot) * beside(gate_dot.to(exact), x))
        return y, sum(parts[1:], parts[0]).to(dtype) if parts else None


def _check(x: Tensor | Dual, branch: Tensor | Dual, gate: Tensor | Dual) -> None:
    check.is_tensor_or_dual("gated_residual", x=x, branch=branch, gate=gate)
    check.single_row_whole("gated_residual", x=x, branch=branch)
    (x, x_dot), (branch, branch_dot), (g, _) = unpack(x), unpack(branch), unpack(gate)
    if x.dim() == 0:
        raise ValueError("gated_residual: x must have at least one dimension, got a scalar")
    check.has_shape("gated_residual", "branch", branch, x.shape, " like x")
    wanted = [x.shape[-1:]] if x.dim() == 1 else [x.shape[-1:], (x.shape[0], x.shape[-1])]
    if g.shape not in wanted:
        shapes = " or, a row a sample, ".join(str(list(shape)) for shape in wanted)
        raise ValueError(
            f"gated_residual: gate must be {shapes}, one gate a channel of x of shape {list(x.shape)}; "
            f"got {list(g.shape)}"
        )
    if g.dim() == 1:
        check.is_tensor("gated_residual", gate=gate)
    check.same_device("gated_residual", x, branch=branch, gate=g)
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
        gate_dot: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        y, y_dot = contiguous_like(x), None
        stored = next((t for t in (x_dot, branch_dot, gate_dot) if t is not None), None)
        if stored is not None:
            y_dot = contiguous_like(tail(x, stored))
            no_gradient(ctx, y_dot)
        kernels.forward(x, x_dot, branch, branch_dot, gate, gate_dot, y, y_dot)
        ctx.save_for_backward(branch, gate)
        ctx.kernels = kernels
        return y, y_dot

    @staticmethod
    @check.backward_of("gated_residual")
    def backward(ctx: Any, dy: Tensor, dy_dot: Tensor | None) -> tuple[Tensor | None, ...]:
        branch, gate = ctx.saved_tensors
        dbranch = contiguous_like(branch)
        dgate = ctx.kernels.backward(last_contiguous(dy), branch, gate, dbranch)
        return None, dy, None, dbranch, None, dgate.view(gate.shape).to(gate.dtype), None


class _CPU:
    call = staticmethod(cpu.call)

    @classmethod
    def forward(
        cls,
        x: Tensor,
        x_dot: Tensor | None,
        branch: Tensor,
        branch_dot: Tensor | None,
        gate: Tensor,
        gate_dot: Tensor | None,
        y: Tensor,
        y_dot: Tensor | None,
    ) -> None:
        (x_rows, x_stride), (xt_rows, xt_stride) = rows_of(x), rows_of(x_dot)
        (b_rows, b_stride), (bt_rows, bt_stride) = rows_of(branch), rows_of(branch_dot)
        g, g_dot = (None if t is None else t.float().contiguous() for t in (gate, gate_dot))
        _, length = groups_of(gate, x)
        cls.call(
            *("gated_residual_forward", x, DTYPES[x.dtype], DTYPES[branch.dtype]),
            *(pointer(x_rows), pointer(xt_rows), pointer(b_rows), pointer(bt_rows)),
            *(pointer(g), pointer(g_dot), pointer(y), pointer(y_dot)),
            *(count_rows(x), count_rows(y_dot), length, x.shape[-1]),
            *(x_stride, xt_stride, b_stride, bt_stride),
        )

    @staticmethod
    def backward(dy: Tensor, branch: Tensor, gate: Tensor, dbranch: Tensor) -> Tensor:
        """Fills dbranch; the gradient of the gate, [groups, d] in fp32."""
        (groups, length), width, threads = groups_of(gate, branch), branch.shape[-1], torch.get_num_threads()
        (dy_rows, dy_stride), (b_rows, b_stride) = rows_of(dy), rows_of(branch)
        g = gate.float().contiguous()
        dgate = branch.new_empty((groups, width), dtype=torch.float32)
        _C.gated_residual_backward(
            *(DTYPES[dy.dtype], DTYPES[branch.dtype], pointer(dy_rows), pointer(b_rows)),
            *(pointer(g), pointer(dbranch), pointer(dgate)),
            *(groups, length, width, dy_stride, b_stride, threads),
        )
        return dgate


class _CUDA(_CPU):
    call = staticmethod(cuda.call)

    @staticmethod
    def backward(dy: Tensor, branch: Tensor, gate: Tensor, dbranch: Tensor) -> Tensor:
        (groups, length), width = groups_of(gate, branch), branch.shape[-1]
        (dy_rows, dy_stride), (b_rows, b_stride) = rows_of(dy), rows_of(branch)
        g = gate.float().contiguous()
        dgate, partial, shares = cuda.sums(branch, groups, length, width)
        cuda.call(
            *("gated_residual_backward", branch, DTYPES[dy.dtype], DTYPES[branch.dtype]),
            *(pointer(dy_rows), pointer(b_rows), pointer(g), pointer(dbranch)),
            *(pointer(partial), pointer(dgate), groups, length, width, dy_stride, b_stride, shares),
        )
        return dgate


_OPERATION = Operation(
    "gated_residual",
    _GatedResidual,
    "(Tensor x, Tensor? x_dot, Tensor branch, Tensor? branch_dot, Tensor gate, Tensor? gate_dot)",
    {
        "forward": "(Tensor x, Tensor? x_dot, Tensor branch, Tensor? branch_dot, Tensor gate, "
        "Tensor? gate_dot, Tensor(a!) y, Tensor(b!)? y_dot) -> ()",
        "backward": "(Tensor dy, Tensor branch, Tensor gate, Tensor(a!) dbranch) -> Tensor",
    },
    {
        "backward": lambda dy, branch, gate, dbranch: gate.new_empty(
            (groups_of(gate, branch)[0], branch.shape[-1]), dtype=torch.float32
        )
    },
)
_BACKENDS = (
    _OPERATION.backend("cpu", _CPU, cpu.unavailable),
    _OPERATION.backend("cuda", _CUDA, cuda.unavailable, on_request=cuda.on_request),
    _OPERATION.backend("triton", Kernels("gated_residual"), triton_backend.unavailable),
    Backend("reference", _reference, always),
)


@takes_dual_tensors
def gated_residual(
    x: Tensor | Dual, branch: Tensor | Dual, gate: Tensor | Dual, *, backend: str | None = None
) -> Any:
    """x + branch · gate, with its tangent.

    Args:
        x: [..., d], the residual stream; float32, bfloat16 or float16 (`reference`: any floating-point type;
            `cpu`: not float16).
        branch: like x; bfloat16 and float16 may be added to a stream of float32.
        gate: [d], one gate a channel, of any floating-point type and without a tangent; or, of x [B, ..., d],
            [B, d], a row for all positions of a sample, of any of x's types.
        backend: "cpu", "cuda", "triton", "reference", or the best one that can run.

    Returns:
        Like x; a `Dual` if any argument is one. Computed in fp32, rounded once.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    _check(x, branch, gate)
    (x_primal, x_dot), (b_primal, b_dot), (g_primal, g_dot) = unpack(x), unpack(branch), unpack(gate)
    x_dot, b_dot, g_dot = align(x_dot, b_dot, g_dot)
    tensors = (x_primal, b_primal) if g_primal.dim() == 1 else (x_primal, b_primal, g_primal)
    run = choose("gated_residual", _BACKENDS, backend, *tensors).run
    return pack(*run(x_primal, x_dot, b_primal, b_dot, g_primal, g_dot), x, branch, gate)

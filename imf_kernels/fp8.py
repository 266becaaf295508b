"""Products in FP8, for what carries no gradient: y = s_x s_w · (x / s_x)(w / s_w)ᵀ with a scale a row.

Operands are rounded to e4m3, of 3 mantissa bits, so that the largest of each row of x and of each row of the
weight becomes 448, the largest number there is: an error of up to 1/16 an element, which a sum over many
averages. Sums are taken in fp32 and rounded once to bfloat16.

Kernels: PyTorch's `_scaled_mm`; imf_kernels/_triton/fp8.py rounds. Not yet run on a GPU; on a CPU, where
`_scaled_mm` has no fast instruction behind it, they serve to know the errors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from imf_kernels import triton_backend
from imf_kernels.dispatch import fact
from imf_kernels.layout import count_rows
from imf_kernels.triton_backend import Kernels

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
# What an element is divided by at least: a row of zeros has no largest one.
SMALLEST_SCALE = 2.0**-100
MULTIPLE = 16  # of both widths of a weight, which the products ask for

_KERNELS = Kernels("fp8")
_where: ContextVar[str | None] = ContextVar("_where", default=None)


@contextlib.contextmanager
def fp8_products(where: str) -> Iterator[None]:
    """Within it `linear` multiplies in FP8 where no gradient is needed; outside of `torch.compile`.

    It does so with operands of bfloat16 and weights whose two widths are multiples of 16; others are
    multiplied as ever.

    Args:
        where: "tangents", or "everything": tangents and primals, which then must not require gradients.

    Raises:
        ValueError: for another `where`.
        RuntimeError: from `linear`, where "everything" meets a gradient, or the GPU has no FP8.
    """
    if where not in ("tangents", "everything"):
        raise ValueError(f"fp8_products: where must be 'tangents' or 'everything', got {where!r}")
    token = _where.set(where)
    try:
        yield
    finally:
        _where.reset(token)


def used_for(x: Tensor, weight: Tensor) -> str | None:
    """What of `linear(x, weight)` is to be multiplied in FP8: "tangents", "everything" or None."""
    if torch.compiler.is_compiling() or (where := _where.get()) is None:
        return None
    fits = x.dtype == torch.bfloat16 and not any(width % MULTIPLE for width in weight.shape)
    if not fits or 0 in (x.numel(), weight.numel()):
        return None
    if where == "everything" and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        raise RuntimeError(
            "linear: inside fp8_products('everything') nothing may require a gradient: wrap the call in "
            "torch.no_grad(), or take fp8_products('tangents')"
        )
    if x.device.type == "cpu" and not cpu_scales_rows():
        raise RuntimeError(
            f"linear: FP8 on a CPU needs a newer PyTorch than {torch.__version__}, whose _scaled_mm takes "
            "one scale for all rows"
        )
    if x.is_cuda and not torch.version.hip and torch.cuda.get_device_capability(x.device) < (8, 9):
        raise RuntimeError(
            f"linear: FP8 needs a GPU of compute capability 8.9 or newer, got "
            f"{torch.cuda.get_device_name(x.device)}"
        )
    return where


@fact
def cpu_scales_rows() -> bool:
    """Whether PyTorch's products in FP8 on a CPU take a scale for each row (2.11's do not)."""
    x, scale = torch.zeros(MULTIPLE, MULTIPLE).to(DTYPE), torch.ones(MULTIPLE, 1)
    try:
        torch._scaled_mm(x, x.t(), scale, scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


@torch.no_grad()
def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias: [..., in] in bfloat16, [out, in], [out] or `None` → [..., out] in bfloat16."""
    rows, scale = quantized(x.reshape(count_rows(x), x.shape[-1]))
    columns, weight_scale = quantized(weight.to(x.dtype))
    # Fast sums have 14 bits on Hopper, which is little beside the error of e4m3.
    y = torch._scaled_mm(
        rows, columns.t(), scale, weight_scale.t(), out_dtype=x.dtype, use_fast_accum=x.is_cuda
    )
    return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], weight.shape[0])


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, d] → the same in e4m3, and the scales, [rows, 1] in fp32, to multiply it by."""
    if triton_backend.unavailable([x]) is None:
        q, scale = x.new_empty(x.shape, dtype=DTYPE), x.new_empty((len(x), 1), dtype=torch.float32)
        _KERNELS.quantize(x, q, scale, LARGEST, SMALLEST_SCALE)
        return q, scale
    exact = x.float()
    # By a tensor: by a Python number PyTorch multiplies with its reciprocal on a GPU, which rounds otherwise.
    scale = (exact.abs().amax(1, keepdim=True) / exact.new_full((), LARGEST)).clamp(min=SMALLEST_SCALE)
    return (exact / scale).to(DTYPE), scale

"""One step of an exponential moving average of many tensors: average ← average + share (weight − average).

On a GPU it is one launch. `torch._foreach_lerp_` launches a kernel per tensor there if `share` is a tensor.
Kernel: triton_kernels/moving_average.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imf_kernels.backends import dispatch, triton_launch
from imf_kernels.backends.dispatch import Backend

_NAME = "moving_average"


def _on_request(tensors: Sequence[Tensor]) -> str | None:
    return None if tensors[0].is_cuda else "Triton's interpreter runs on request only"


_BACKENDS: tuple[Backend[Sequence[Tensor]], ...] = (
    Backend(
        "triton", triton_launch.Kernels(_NAME), triton_launch.unavailable, _on_request, aliases=("cuda",)
    ),
    Backend("reference", aliases=("cpu",)),
)


class MovingAverage:
    """Averages of weights, updated in place by the backend that `use_backend` sets, on a GPU else Triton's.

    A call inside the capture of a CUDA graph needs one before it with tensors at the same addresses.

    Args:
        averages, weights: of the same shapes, on one device; for Triton contiguous, in float32.
    """

    def __init__(self, averages: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        self.averages, self.weights = list(averages), list(weights)
        self._built_for: tuple[object, ...] | None = None
        self._kernels = self._table = None

    @torch.no_grad()
    def __call__(self, share: Tensor) -> None:
        """Moves every average to its weight by `share`, [] float32 on their device.

        Within 1 ulp, of the larger operand, of `torch.lerp`.

        Raises: ValueError if Triton's kernel does not take the tensors.
        """
        if not self.averages:
            return
        # Tensors move: by `.to`, or where an optimizer or FSDP2 replaces their memory.
        now = dispatch.default.backend, *(x.data_ptr() for x in (*self.averages, *self.weights))
        if now != self._built_for:
            self._build()
            self._built_for = now
        if self._kernels is None:
            torch._foreach_lerp_(self.averages, self.weights, [share] * len(self.weights))
        else:
            self._kernels.update(self._table, share)

    def _build(self) -> None:
        tensors = [*self.averages, *self.weights]
        self._kernels = dispatch.choose(_NAME, _BACKENDS, dispatch.default.backend, tensors).kernels
        if self._kernels is None:
            return
        for average, weight in zip(self.averages, self.weights, strict=True):
            for name, x in (("averages", average), ("weights", weight)):
                wanted = f"contiguous {list(average.shape)} of torch.float32 on {tensors[0].device}"
                layout = "contiguous" if x.is_contiguous() else "strided"
                if (got := f"{layout} {list(x.shape)} of {x.dtype} on {x.device}") != wanted:
                    raise ValueError(f"MovingAverage: {name} must be {wanted}, got {got}")
        self._table = self._kernels.table(self.averages, self.weights)

"""Which of PyTorch's matrix products is the fastest here: found by measurement, not by vendor name.

On CPUs, PyTorch's fp32 products go to the BLAS it was built with (MKL in its wheels), while oneDNN, inside
the same PyTorch, is up to twice as fast on some processors and slower on others. Each product is measured at
its first call with a new shape (rows rounded up to a power of two) and the winner is kept.

The two differ in the last bits. A run that must be repeated bitwise keeps its choices: `choices()` goes into
the checkpoint, `load_choices()` puts them back.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _torch(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(a, b, bias)


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def _probe_onednn() -> str | None:
    """Why the private operator behind `_onednn` cannot be used; `None` where it gives the right product."""
    a, b, bias = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3), torch.ones(4)
    try:
        equal = torch.equal(_onednn(a, b, bias), a @ b.t() + bias)
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    return None if equal else "it gave a wrong product"


ONEDNN_UNAVAILABLE = _probe_onednn()
_PRODUCTS: dict[str, Product] = {"torch": _torch}
if ONEDNN_UNAVAILABLE is None:
    _PRODUCTS["onednn"] = _onednn

# Products of less work than this are not worth measuring.
_MIN_FLOPS = 1 << 20
_choices: dict[str, str] = {}


def product(kind: str, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a bᵀ (+ bias), by the fastest product for this shape.

    Args:
        kind: "forward", "grad_input" or "grad_weight": products of one shape but other memory orders.
        a: [m, k], any strides. b: [n, k], any strides. bias: [n] or `None`.

    Returns:
        [m, n] of the dtype of `a`.
    """
    (m, k), n = a.shape, b.shape[0]
    # bf16 products go to oneDNN in PyTorch already; other devices have their own library.
    if (
        a.dtype != torch.float32
        or a.device.type != "cpu"
        or len(_PRODUCTS) == 1
        or 2 * m * n * k < _MIN_FLOPS
    ):
        return _torch(a, b, bias)
    key = f"{kind} {1 << (m - 1).bit_length()}x{k}x{n} threads={torch.get_num_threads()}"
    if (name := _choices.get(key)) is None:
        name = _choices[key] = _fastest(a, b, bias)
    return _PRODUCTS[name](a, b, bias)


def _fastest(a: Tensor, b: Tensor, bias: Tensor | None, repeats: int = 3) -> str:
    best = {}
    for name, run in _PRODUCTS.items():
        run(a, b, bias)
        best[name] = min(_seconds(run, a, b, bias) for _ in range(repeats))
    return min(best, key=best.__getitem__)


def _seconds(run: Product, a: Tensor, b: Tensor, bias: Tensor | None) -> float:
    start = time.perf_counter()
    run(a, b, bias)
    return time.perf_counter() - start


def choices() -> dict[str, str]:
    """The products chosen so far in this process, by kind and shape."""
    return dict(_choices)


def load_choices(saved: dict[str, str]) -> None:
    """Uses the choices of an earlier process instead of measuring anew.

    Raises:
        ValueError: a choice that this PyTorch does not offer.
    """
    for key, name in saved.items():
        if name not in _PRODUCTS:
            raise ValueError(
                f"gemm.load_choices: {key!r} was {name!r}, which cannot be had here: {ONEDNN_UNAVAILABLE}"
            )
    _choices.clear()
    _choices.update(saved)


def fast_dtype() -> torch.dtype:
    """bfloat16 where this processor multiplies it clearly faster than float32, else float32."""
    m, k, n = 1024, 512, 512
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(m, k, dtype=dtype), torch.ones(n, k, dtype=dtype)
        runs = _PRODUCTS.values() if dtype == torch.float32 else [_torch]
        for run in runs:
            run(a, b, None)
        times[dtype] = min(_seconds(run, a, b, None) for run in runs for _ in range(5))
    return torch.bfloat16 if times[torch.bfloat16] < times[torch.float32] / 1.3 else torch.float32

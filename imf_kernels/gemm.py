"""Which of PyTorch's matrix products is the fastest here: found by measurement, not by vendor name.

On CPUs, PyTorch's fp32 products go to the BLAS it was built with (MKL in its wheels), while oneDNN, inside
the same PyTorch, is up to twice as fast on some processors and slower on others. The three products of a
linear layer are measured when a layer of new widths is first met, once with few rows and once with many.

The two differ in the last bits. A run that must be repeated bitwise keeps its choices: `choices()` goes into
the checkpoint, `load_choices()` puts them back. They do not depend on the number of rows that happened to
come first, so those of a run are complete after its first step.
"""

from __future__ import annotations

import math
import threading
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


def _onednn_transposed(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """As the transpose of b aᵀ: the faster way to products of few rows summed over many, weight gradients."""
    y = _onednn(b, a, None).t().contiguous()
    return y if bias is None else y.add_(bias)


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
    _PRODUCTS["onednn transposed"] = _onednn_transposed

# A layer is measured with these numbers of rows; a call takes the choice of the nearer side of the border.
_FEW, _BORDER, _MANY = 256, 1024, 2048
_choices: dict[str, str] = {}
_measuring = threading.Lock()


def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias: [rows, in], [out, in], [out] or `None` → [rows, out]."""
    return _product("forward", x, *weight.shape)(x, weight, bias)


def grad_input(dy: Tensor, weight: Tensor) -> Tensor:
    """dy weight: [rows, out], [out, in] → [rows, in]."""
    return _product("grad_input", dy, *weight.shape)(dy, weight.t(), None)


def grad_weight(dy: Tensor, x: Tensor) -> Tensor:
    """dyᵀ x: [rows, out], [rows, in] → [out, in]."""
    return _product("grad_weight", dy, dy.shape[1], x.shape[1])(dy.t(), x.t(), None)


def _product(kind: str, operand: Tensor, out: int, width: int) -> Product:
    # bf16 products go to oneDNN in PyTorch already; other devices have their own library.
    if operand.dtype != torch.float32 or operand.device.type != "cpu" or len(_PRODUCTS) == 1:
        return _torch
    if operand.shape[0] * out * width == 0:  # oneDNN refuses empty operands
        return _torch
    layer = f"{out}x{width} threads={torch.get_num_threads()}"
    choice = f"{kind} {'few' if operand.shape[0] < _BORDER else 'many'} {layer}"
    if choice not in _choices:
        with _measuring:  # one thread at a time: the others take what the first one finds
            if choice not in _choices:
                _measure(layer, out, width)
    return _PRODUCTS[_choices[choice]]


def _measure(layer: str, out: int, width: int) -> None:
    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.float32, device="cpu")

    weight = ones(out, width)
    for size, rows in (("few", _FEW), ("many", _MANY)):
        x, dy = ones(rows, width), ones(rows, out)
        operands = {"grad_input": (dy, weight.t()), "grad_weight": (dy.t(), x.t()), "forward": (x, weight)}
        for kind, pair in operands.items():
            if (choice := f"{kind} {size} {layer}") not in _choices:
                _choices[choice] = _fastest(*pair)


def _fastest(a: Tensor, b: Tensor) -> str:
    """By the best of rounds that take the products in turn: up to 9 in 50 ms, at least 3."""
    for run in _PRODUCTS.values():
        run(a, b, None)
    best = dict.fromkeys(_PRODUCTS, math.inf)
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or (rounds < 9 and time.perf_counter() - start < 0.05):
        for name, run in _PRODUCTS.items():
            best[name] = min(best[name], _seconds(run, a, b))
        rounds += 1
    return min(best, key=best.__getitem__)


def _seconds(run: Product, a: Tensor, b: Tensor) -> float:
    start = time.perf_counter()
    run(a, b, None)
    return time.perf_counter() - start


def choices() -> dict[str, str]:
    """The products chosen so far in this process, by kind, number of rows and layer."""
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
        a, b = (torch.ones(rows, k, dtype=dtype, device="cpu") for rows in (m, n))
        runs = _PRODUCTS.values() if dtype == torch.float32 else [_torch]
        for run in runs:
            run(a, b, None)
        times[dtype] = min(_seconds(run, a, b) for run in runs for _ in range(5))
    return torch.bfloat16 if times[torch.bfloat16] < times[torch.float32] / 1.3 else torch.float32

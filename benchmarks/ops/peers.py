"""What is measured beside our operations: the same computations in plain PyTorch, and their bounds."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imf_kernels.backends import matmul
from imf_kernels.testing import plain
from imf_kernels.testing.errors import Problem

Outputs = tuple[Tensor, ...]


def derivative(
    problem: Problem, means: str, primals: dict[str, Tensor] | None = None
) -> Callable[[], tuple[Outputs, Outputs]]:
    """A case's outputs and their tangents by other means: both, as ours gives both.

    Args:
        problem: what is computed.
        means: "torch.func.jvp", "compiled" (the same, as one graph) or "finite differences" (central ones).
        primals: in the place of the problem's, such as leaves of a graph.
    """
    primals, names = primals or problem.primals, list(problem.tangents)
    x, x_dot = tuple(primals[n] for n in names), tuple(problem.tangents.values())
    formula = plain.formula(problem.case)

    def of(*moving: Tensor) -> Outputs:
        return formula({**primals, **dict(zip(names, moving, strict=True))})

    def forward_mode(*both: Tensor) -> tuple[Outputs, Outputs]:
        outputs, tangents = torch.func.jvp(of, both[: len(x)], both[len(x) :])
        return outputs, tuple(t.detach() for t in tangents)  # as training does: no gradient goes through them

    def differences() -> tuple[Outputs, Outputs]:
        step = 1e-2
        above = of(*(a + step * b for a, b in zip(x, x_dot, strict=True)))
        below = of(*(a - step * b for a, b in zip(x, x_dot, strict=True)))
        return of(*x), tuple((a - b) / (2 * step) for a, b in zip(above, below, strict=True))

    if means == "finite differences":
        return differences
    if means == "compiled":
        torch._dynamo.reset()
        forward_mode = torch.compile(forward_mode, dynamic=False, fullgraph=True)  # else it may stay eager
    return lambda: forward_mode(*x, *x_dot)


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.detach().double() - exact).norm() / exact.norm().clamp(min=1e-300))


PRODUCTS = ("linear", "scaled_dot_product_attention")  # bound by multiplications, the others by memory


def copy(size: int) -> Callable[[], Any]:
    """Reads and writes `size` bytes in all: what an operation bound by memory is held against."""
    source, target = torch.ones(size // 2, dtype=torch.uint8), torch.empty(size // 2, dtype=torch.uint8)
    return lambda: target.copy_(source)


def _best(call: Callable[[], Any], repeats: int = 7) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


@functools.cache
def gemm_rate(dtype: torch.dtype) -> float:
    """FLOPs a second of the fastest of PyTorch's products of 2048 rows, 1024 → 4096."""
    x, w = torch.ones(2048, 1024, dtype=dtype), torch.ones(4096, 1024, dtype=dtype)
    seconds = min(_best(functools.partial(run, x, w)) for run in (matmul.forward, F.linear))
    return 2 * 2048 * 1024 * 4096 / seconds

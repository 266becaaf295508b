"""Times the tiles that attention's Triton kernels could work in, on the GPU that is here.

    python -m benchmarks.ops.tune_attention OUT.json [--kernel forward] [--row "64 short"] [--jobs 16]

Every candidate is compiled and held to the error rule in one of `jobs` processes, then those that passed are
timed one by one: 20 launches in a CUDA graph. OUT.json has a figure a candidate, or the reason that it has
none; the fastest ones are printed. They are put into attention_table.py by hand: one choice serves several.
"primal" is a forward without a tangent; in the table it has the forward's tiles of keys, so that its results
are the same to the bit, and here tries all.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.ops.bench_gpu import CALLS, replay_of
from imf_kernels.backends import triton_launch
from imf_kernels.backends.triton_kernels import attention as kernels
from imf_kernels.backends.triton_kernels import attention_tiles
from imf_kernels.testing import errors, timer
from imf_kernels.testing.cases import Case, attention

# Rows of the table by shape, and the launches that stand for it: batch, heads, length, head dim, dtype.
BF16, FP32 = torch.bfloat16, torch.float32
ROWS: dict[str, tuple[int, int, int, int, torch.dtype]] = {
    "64 short": (64, 12, 276, 64, BF16),
    "64 long": (4, 16, 2048, 64, BF16),
    "80 short": (32, 16, 276, 72, BF16),
    "80 long": (4, 16, 2048, 72, BF16),
    "128 short": (32, 8, 276, 128, BF16),
    "128 long": (4, 8, 2048, 128, BF16),
    "64 fp32": (16, 12, 276, 64, FP32),
    "80 fp32": (16, 16, 276, 72, FP32),
    "128 fp32": (8, 8, 276, 128, FP32),
}
KERNELS = ("forward", "primal", "backward q", "backward kv")
Tiles = tuple[int, int, int, int, int]
Candidate = tuple[str, str, Tiles]  # kernel, row of the table, tiles


def candidates(kernel: str, row: str) -> Iterator[Tiles]:
    """Those whose sums, logits and tangents come close to fitting the registers of their threads."""
    _, _, _, width, dtype = ROWS[row]
    logits = 1 if kernel == "primal" else 2
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    edges: tuple[int, ...]
    stages: tuple[int, ...]
    if dtype == FP32:
        rows, columns, edges, warps, stages = (16, 32, 64), (16, 32), (16,), (4, 8), (1, 2)
    elif kernel == "backward kv":
        rows, columns, edges, warps, stages = (16, 32, 64), (32, 64, 128), (0,), (4, 8), (1, 2, 3)
    else:
        rows, columns, edges, warps, stages = (64, 128), (32, 64, 128), (32, 64), (4, 8), (1, 2, 3)
    for m, n, edge, w, s in itertools.product(rows, columns, edges, warps, stages):
        kept = n if kernel == "backward kv" else m  # rows whose sums stay in registers
        numbers = (logits * kept * width + logits * m * n) / (32 * w)
        if edge <= n and 16 <= numbers <= 240:
            yield m, n, edge if kernel != "backward kv" else 0, w, s


def use(kernel: str, row: str, tiles: Tiles) -> None:
    """Puts a candidate in its place in the table."""
    rows = attention_tiles.TABLE[triton_launch.architecture(torch.empty(0))]
    if kernel == "primal":
        m, n, edge, warps, stages = tiles
        forward = next(rows["forward"][name] for name in (row, row.split()[0]) if name in rows["forward"])
        rows["forward"][row] = (forward[0], n, edge, *forward[3:])
        rows["primal"][row] = (m, warps, stages)
    else:
        rows[kernel][row] = tiles
    # Launchers remember their tiles, and calls their launchers.
    kernels.launcher_of.cache_clear()
    kernels._forward.clear()
    kernels._backward.clear()


def case_of(row: str, batch: int) -> Case:
    _, heads, length, width, _ = ROWS[row]
    return attention(f"{row}, batch {batch}", batch, heads, length, width)


def check(candidate: Candidate) -> str | None:
    """Why a candidate cannot be used; compiles it on the way. In a process of its own."""
    kernel, row, tiles = candidate
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        with torch.device("cuda"):
            use(kernel, row, tiles)
            problem = errors.problem(case_of(row, 2), ROWS[row][4])
            results = problem.evaluate("triton", tangents=kernel != "primal")
            problem.check(results, tangents=kernel != "primal", draws=1)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def work(kernel: str, row: str) -> Callable[[], Any]:
    """The launches that are timed; those of backward kv have the same backward q before them."""
    batch, heads, length, width, dtype = ROWS[row]

    def draw() -> torch.Tensor:  # in the memory order of projections
        return torch.randn(batch, length, heads, width, dtype=dtype).transpose(1, 2)

    q, k, v, *dots = (draw() for _ in range(6))
    out, out_dot, lse = draw(), draw(), q.new_empty(q.shape[:3], dtype=FP32)
    scale = width**-0.5

    none = (None,) * 3
    forward = functools.partial(kernels.forward, q, k, v)
    if kernel == "primal":
        return lambda: forward(*none, None, out, None, lse, scale, False)
    if kernel == "forward":
        return lambda: forward(*dots, None, out, out_dot, lse, scale, False)
    forward(*none, None, out, None, lse, scale, False)
    gradients = (draw(), draw(), draw()) if kernel == "backward kv" else (draw(), None, None)
    backward = functools.partial(kernels.backward, q, k, v, None, lse, out_dot)
    return lambda: backward(*gradients, scale, False)


def measure(kernel: str, row: str, tried: Mapping[Tiles, str | None]) -> list[dict[str, Any]]:
    """A figure a candidate."""
    figures = []
    call = work(kernel, row)
    for tiles, reason in tried.items():
        figure: dict[str, Any] = {"kernel": kernel, "row": row, "tiles": tiles}
        if reason is None:
            use(kernel, row, tiles)
            turns: dict[str, Any] = {"rounds": 3, "seconds": 0.01, "synchronize": torch.cuda.synchronize}
            times = timer.side_by_side({"": replay_of([call])}, **turns)[""]
            figure["seconds"] = times.median / CALLS
        else:
            figure["left out"] = reason
        figures.append(figure)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="(default: all)")
    parser.add_argument("--row", choices=ROWS, action="append", help="(default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: a core each)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    name = triton_launch.architecture(torch.empty(0, device="cuda"))
    found = attention_tiles.TABLE[attention_tiles.architecture_class(name)]
    attention_tiles.TABLE[name] = {kernel: dict(rows) for kernel, rows in found.items()}
    before = attention_tiles.TABLE[name]
    figures: list[dict[str, Any]] = []
    with (
        torch.device("cuda"),
        warnings.catch_warnings(),
        ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool,
    ):
        warnings.simplefilter("ignore")
        tried = {
            (kernel, row): {
                tiles: pool.submit(check, (kernel, row, tiles)) for tiles in candidates(kernel, row)
            }
            for row, kernel in itertools.product(arguments.row or ROWS, arguments.kernel or KERNELS)
        }
        for (kernel, row), futures in tried.items():
            results = {tiles: future.result() for tiles, future in futures.items()}
            attention_tiles.TABLE[name] = {kernel: dict(rows) for kernel, rows in before.items()}
            figures += measure(kernel, row, results)
            arguments.out.write_text(json.dumps(figures) + "\n")
            timed = [f for f in figures if (f["kernel"], f["row"]) == (kernel, row) and "seconds" in f]
            timed.sort(key=lambda f: float(f["seconds"]))
            best = ", ".join(f"{f['tiles']} {f['seconds'] * 1e6:.1f}" for f in timed[:6])
            print(f"{kernel}, {row}: µs of {len(timed)} of {len(results)}: {best}", flush=True)


if __name__ == "__main__":
    main()

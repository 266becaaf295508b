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
import itertools
import json
import os
import statistics
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
    sums = {"forward": 2, "primal": 1, "backward q": 2, "backward kv": 2}[kernel]
    logits = 1 if kernel == "primal" else 2
    if dtype == FP32:
        sizes, columns, warps, stages = (16, 32, 64), (16, 32), (4, 8), (1, 2)
    else:
        sizes, columns, warps, stages = (32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3)
    for m, n, w, s in itertools.product(sizes, columns, warps, stages):
        kept = n if kernel == "backward kv" else m  # rows whose sums stay in registers
        if kernel == "backward kv" and (n < 32 or (dtype == BF16 and m > 64)):
            continue
        numbers = (sums * kept * width + logits * m * n) / (32 * w)
        if not 16 <= numbers <= 240:
            continue
        for edge in (0,) if kernel == "backward kv" else (16, 32, 64):
            if edge <= n:
                yield m, n, edge, w, s


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
    kernels.launcher_of.cache_clear()  # launchers remember their tiles


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
    batch, _, _, _, dtype = ROWS[row]
    p = errors.Problem.draw(case_of(row, 1), dtype, 0, torch.device("cuda"))
    q, k, v, *dots = (
        x.expand(batch, -1, -1, -1).clone(memory_format=torch.preserve_format)
        for x in (*p.primals.values(), *p.tangents.values())
    )
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=FP32)
    scale = q.shape[3] ** -0.5
    if kernel == "primal":
        return lambda: kernels.forward(q, k, v, None, None, None, None, out, None, lse, scale, False)
    out_dot = torch.empty_like(q)
    forward = lambda: kernels.forward(q, k, v, *dots, None, out, out_dot, lse, scale, False)  # noqa: E731
    if kernel == "forward":
        return forward
    forward()
    dout, dq, dk, dv = (torch.randn_like(q) for _ in range(4))
    dk, dv = (dk, dv) if kernel == "backward kv" else (None, None)  # type: ignore[assignment]
    return lambda: kernels.backward(q, k, v, None, lse, dout, dq, dk, dv, scale, False)


def measure(kernel: str, row: str, tried: Mapping[Tiles, str | None]) -> list[dict[str, Any]]:
    """A figure a candidate."""
    figures = []
    for tiles, reason in tried.items():
        figure: dict[str, Any] = {"kernel": kernel, "row": row, "tiles": tiles}
        if reason is None:
            use(kernel, row, tiles)
            replay = replay_of([work(kernel, row)])
            times = timer.side_by_side(
                {"": replay}, rounds=3, seconds=0.01, synchronize=torch.cuda.synchronize
            )[""]
            figure["seconds"] = statistics.median(times.rounds) / CALLS
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
            use_before = ", ".join(
                f"{f['tiles']} {f['seconds'] * 1e6:.1f}"
                for f in sorted(timed, key=lambda f: f["seconds"])[:6]
            )
            print(f"{kernel}, {row}: µs of {len(timed)} of {len(results)}: {use_before}", flush=True)


if __name__ == "__main__":
    main()

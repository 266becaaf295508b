"""Times the tiles that attention's Triton kernels could work in, on the GPU that is here.

    python -m benchmarks.ops.tune_attention [--quick] [--write]

For every kernel and shape class it tries the candidates that fit the GPU, leaves out those whose results miss
the error rule, prints the times, and with --write puts the fastest into the table, attention_table.py of
triton_kernels. It has not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import itertools
import pprint
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from imf_kernels.backends import triton_launch
from imf_kernels.backends.triton_kernels import attention_table, attention_tiles
from imf_kernels.backends.triton_kernels.attention import launcher_of
from imf_kernels.testing import errors, timer
from imf_kernels.testing.cases import Case, attention

# Lengths, head dims and dtypes that stand for a shape class.
LENGTHS = {"short": 276, "long": 2048, "fp32": 276}
HEAD_DIMS = {64: 64, 80: 72, 128: 128, 256: 256}
Tiles = tuple[int, int, int, int, int]


def candidates(kernel: str, quick: bool) -> Iterator[Tiles]:
    sizes, warps, stages = ((64,), (4,), (2,)) if quick else ((32, 64, 128), (4, 8), (1, 2, 3))
    for m, n, w, s in itertools.product(sizes, sizes, warps, stages):
        for edge in (0,) if kernel == "backward kv" else (16, 32, 64):
            if edge <= n:
                yield m, n, edge, w, s


def work(kernel: str, case: Case, dtype: torch.dtype) -> Callable[[], Any]:
    """What is timed: the forward with every tangent, or the backward of the inputs that the kernel serves."""
    p = errors.Problem.draw(case, dtype, 0)
    if kernel == "forward":
        return lambda: errors.evaluate(case, p.primals, p.tangents, None, "triton")
    wanted = ("query",) if kernel == "backward q" else ("key", "value")
    leaves = {name: x.requires_grad_(name in wanted) for name, x in p.primals.items()}
    (out,) = case.run(leaves, "triton")
    arguments = [leaves[name] for name in wanted]
    return lambda: torch.autograd.grad(out, arguments, p.cotangents, retain_graph=True)


def best(kernel: str, width: int, kind: str, rows: dict[str, Tiles], quick: bool) -> Tiles | None:
    """The fastest candidate of a shape class, tried in its place in the table."""
    dtype, length = torch.float32 if kind == "fp32" else torch.bfloat16, LENGTHS[kind]
    small = errors.Problem.draw(attention("check", 1, 2, length, HEAD_DIMS[width]), dtype, 0)
    timed = attention("timed", 8 if kind != "long" else 2, 16, length, HEAD_DIMS[width])
    name, times = f"{width} {kind}", {}
    for tiles in candidates(kernel, quick):
        rows[name] = tiles
        launcher_of.cache_clear()  # launchers remember their tiles
        try:
            small.check(small.evaluate("triton"), draws=2)
            function = work(kernel, timed, dtype)
            (times[tiles],) = timer.side_by_side({"": function}, synchronize=torch.cuda.synchronize).values()
        except (triton.runtime.errors.OutOfResources, AssertionError) as reason:
            print(f"{kernel}, {name}, {tiles}: left out: {str(reason).splitlines()[0]}")
            continue
        print(f"{kernel}, {name}, {tiles}: {times[tiles].median * 1e6:.1f} us", flush=True)
    return min(times, key=lambda tiles: times[tiles].median) if times else None


def write(table: dict[str, Any]) -> None:
    path = Path(attention_table.__file__)
    before, _, _ = path.read_text().partition("TABLE")
    literal = pprint.pformat(table, width=100, sort_dicts=False)
    path.write_text(
        f"{before}TABLE: dict[str, dict[str, dict[str, tuple[int, int, int, int, int]]]] = {literal}\n"
    )
    print(f"wrote {path}; run `make format`")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few candidates, to see that it runs")
    parser.add_argument("--write", action="store_true", help="put the fastest into the table")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    torch.set_default_device("cuda")
    name = triton_launch.architecture(torch.empty(0))
    found = attention_tiles.TABLE[attention_tiles.architecture_class(name)]
    table = attention_tiles.TABLE[name] = {kernel: dict(rows) for kernel, rows in found.items()}
    for kernel, width, kind in itertools.product(table, attention_tiles.WIDTHS, LENGTHS):
        before = dict(table[kernel])
        fastest = best(kernel, width, kind, table[kernel], arguments.quick)
        table[kernel] = before if fastest is None else before | {f"{width} {kind}": fastest}
    if arguments.write:
        write(attention_tiles.TABLE)


if __name__ == "__main__":
    main()

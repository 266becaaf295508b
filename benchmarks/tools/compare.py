"""Two commits side by side: the working tree and a base, each in a process of its own, in turns.

    make bench-compare BASE=<commit>                           operations on the host, and steps on this CPU
    python -m benchmarks.tools.compare <commit> --only "step digits" --rounds 15

Prints the median of each round's ratio, new over base, and the ratio of the least times; what got slower by
more than 5 % in both is marked, and ends the run with status 1. The base is built in build/compare/<commit>.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SLOWER = 1.05


def timed() -> dict[str, Callable[[], Any]]:
    """What is timed, by name, with the tree that Python imports: public names alone, to fit every commit."""
    import torch
    import torch.nn.functional as F

    import imf_kernels as ik
    from benchmarks.training.bench_step import make
    from benchmarks.training.sizes import SIZES
    from imf_kernels import Dual

    def step(size: str, precision: str) -> Callable[[], Any]:
        made: list[Callable[[], Any]] = []

        def call() -> Any:
            if not made:
                made.append(make("ours", SIZES[size], precision))
            return made[0]()

        return call

    x = Dual(torch.randn(1, 1, 2, 16, requires_grad=True), torch.randn(1, 1, 2, 16))
    w, matrix = torch.randn(16, requires_grad=True), torch.randn(16, 16, requires_grad=True)

    def trained() -> Any:
        return ik.rms_norm(x, w).primal.sum().backward()

    calls: dict[str, Callable[[], Any]] = {
        "host silu": lambda: ik.silu(x),
        "host gelu": lambda: ik.gelu(x),
        "host rms_norm": lambda: ik.rms_norm(x, w),
        "host rms_norm and backward": trained,
        "host layer_norm": lambda: ik.layer_norm(x, (16,), w),
        "host gated_residual": lambda: ik.gated_residual(x, x, w),
        "host linear": lambda: ik.linear(x, matrix),
        "host attention": lambda: ik.scaled_dot_product_attention(x, x, x),
        "host jvp of linear": lambda: ik.jvp(lambda a: F.linear(a, matrix), (x.primal,), (x.tangent_rows,)),
    }
    for size in SIZES:
        for precision in ("fp32", "bf16"):
            calls[f"step {size} {precision}"] = step(size, precision)
    return calls


def serve() -> None:
    """Times what its input names, as many calls as it says; a line of seconds per call for each."""
    calls = timed()
    print("ready", flush=True)
    for line in sys.stdin:
        name, _, count = line.strip().rpartition(" ")
        start = time.perf_counter()
        for _ in range(int(count)):
            calls[name]()
        print((time.perf_counter() - start) / int(count), flush=True)


class Tree:
    """A process that runs the code of a tree."""

    def __init__(self, root: Path) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(root),
            "OMP_WAIT_POLICY": "passive",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.tools.compare", "--serve"],
            env=environment, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"compare: the process of a tree ended with {self._process.wait()}")
        return answer

    def seconds(self, name: str, calls: int) -> float:
        """Seconds of one of so many calls."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name} {calls}\n")
        self._process.stdin.flush()
        return float(self._answer())


def built(commit: str) -> Path:
    """The tree of a commit, built."""
    found = subprocess.run(
        ["git", "rev-parse", "--verify", f"{commit}^{{commit}}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if found.returncode:
        raise SystemExit(f"compare: BASE must be a commit of this repository, got {commit!r}")
    folder = ROOT / "build" / "compare" / found.stdout.strip()[:12]
    if not folder.exists():
        folder.mkdir(parents=True)
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder, check=True)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("base", nargs="?", help="commit to compare with")
    parser.add_argument("--only", default="", help="what begins so")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.2, help="of a turn")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return 0
    if not arguments.base:
        parser.error("a base is needed: make bench-compare BASE=<commit>")
    base, new = Tree(built(arguments.base)), Tree(ROOT)
    slower = []
    print(f"{'':<28} {'base':>10} {'new':>10}   median   least")
    for name in (name for name in timed() if name.startswith(arguments.only)):
        for tree in (base, new):
            tree.seconds(name, 1)  # what the first call makes
        calls = max(1, round(arguments.seconds / base.seconds(name, 1)))
        turns = [(base.seconds(name, calls), new.seconds(name, calls)) for _ in range(arguments.rounds)]
        median = statistics.median(b / a for a, b in turns)
        before, after = (min(times) for times in zip(*turns, strict=True))
        mark = ""
        if min(median, after / before) > SLOWER:
            slower.append(name)
            mark = "   slower"
        figures = f"{before * 1e6:>8.1f} {after * 1e6:>10.1f}"
        print(f"{name:<28} {figures} µs  {median:6.3f}  {after / before:6.3f}{mark}", flush=True)
    print(f"slower by more than 5 %: {', '.join(slower) or 'nothing'}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())

"""The whole training step on a GPU, forward and backward: ours, and what people would run instead.

    python -m benchmarks.training.bench_gpu_step OUT.json              B/2 and XL/2, two batches each
    python -m benchmarks.training.bench_gpu_step OUT.json --only iMF-B/2 --batch 256 --form ours
    python -m benchmarks.training.bench_gpu_step OUT.json --compiled   those that compile, minutes each

The forms are bench_step.py's, in bf16, and beside them:

- `ours, CUDA graph`: as `--cuda-graphs` of imf.train runs it.
- `ours, compiled`: with `--compile`.
- `forward and backward, fused attention, compiled`: the network in plain PyTorch with both heads: what a
  step with no derivative and no guidance would cost with the best of PyTorch. `flow matching, …`: u alone.

Times are medians of rounds in which all forms take turns, and relative to ours. Memory is the peak above what
was there before, gradients among it; a graph takes it when captured, and keeps it. What fails, for want of
memory for one, is said, and left out.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.ops.bench_gpu import reason
from benchmarks.training.bench_step import make
from benchmarks.training.profile_step import peak_bytes, rates, work_of
from benchmarks.training.sizes import DIGITS
from imf.model.config import PRESETS, IMFConfig
from imf.objective.draws import Draws
from imf_kernels.testing import timer

FORMS = ("ours", "ours, CUDA graph", "one forward and backward", "official")
COMPILED = (
    "ours, compiled", "forward and backward, fused attention, compiled",
    "flow matching, fused attention, compiled", "official, compiled",
)  # fmt: skip
# The batch of a GPU of 80 GB, and one at which the official step fits it.
BATCHES = {"iMF-B/2": (128, 64), "iMF-XL/2": (32, 16)}
SIZES: dict[str, IMFConfig] = {"digits": DIGITS} | {name: PRESETS[name] for name in BATCHES}


def flops(config: IMFConfig, batch: int) -> float:
    """Of what the step needs, with the draws that `make` takes."""
    x = torch.zeros(batch, config.in_channels, config.input_size, config.input_size)
    work = work_of(config, Draws.sample(x, seed=0, step=0), 2)
    return work.products + work.attention


def measure(name: str, batch: int, forms: list[str], device: str) -> dict[str, Any]:
    """Seconds and peak bytes of each form that runs."""
    size, on_gpu = (SIZES[name], batch), device == "cuda"
    steps: dict[str, Callable[[], Any]] = {}
    figures: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    for form in forms:
        try:
            step = make(form, size, "bf16", device)
            if "CUDA graph" not in form:  # whose first call captures
                step()
            peak = peak_bytes(step, torch.device(device))
            figures[form] = {"loss": float(step()), "peak bytes": peak}
            steps[form] = step
        except Exception as error:  # of memory, of the compiler: the others go on
            failures[form] = reason(error)
            print(f"{name}, batch {batch}, {form}: FAILED: {failures[form]}", flush=True)
            if on_gpu:
                torch.cuda.empty_cache()
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    for form, times in timer.side_by_side(steps, rounds=7, seconds=0.0, synchronize=synchronize).items():
        figures[form] |= {"seconds": times.median, "rounds": times.rounds}
    return {"size": name, "batch": batch, "forms": figures, "failures": failures}


def table(result: dict[str, Any], rate: float) -> str:
    """Milliseconds of ours, the others' times to it; memory; the share of the matrix rate that is used."""
    forms = result["forms"]
    ours = forms["ours"]["seconds"] if "ours" in forms else math.nan
    lines = [
        "| form | time | to ours | of a product's rate | peak memory |",
        "| --- | --- | --- | --- | --- |",
    ]
    for form, f in forms.items():
        times = f"{f['seconds'] * 1e3:.1f} ms | {f['seconds'] / ours:.2f}×"
        share = f"{result['necessary FLOPs'] / f['seconds'] / rate:.0%}" if form.startswith("ours") else ""
        lines.append(f"| {form} | {times} | {share} | {f['peak bytes'] / 2**20:,.0f} MiB |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=SIZES, help="one size (default: the two of the paper)")
    parser.add_argument("--batch", type=int, help="(default: 128 and 64 for B/2, 32 and 16 for XL/2)")
    parser.add_argument(
        "--form", choices=FORMS + COMPILED, action="append", help="(default: all that do not compile)"
    )
    parser.add_argument("--compiled", action="store_true", help="those that compile, beside ours")
    parser.add_argument("--device", default="cuda", help="(default: cuda; cpu to try the script)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU here, so there is nothing to measure")
    every = COMPILED if arguments.compiled else FORMS
    forms = arguments.form or [f for f in every if device.type == "cuda" or "graph" not in f]
    if "ours" not in forms:
        forms.insert(0, "ours")
    rate, _ = rates(device, "bf16")
    record: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "GEMM rate": rate,
        "results": [],
    }
    names = [arguments.only] if arguments.only else BATCHES
    batches = (arguments.batch,) if arguments.batch else None
    for name, batch in ((n, b) for n in names for b in batches or BATCHES.get(n, (16,))):
        result = measure(name, batch, forms, arguments.device)
        result["necessary FLOPs"] = flops(SIZES[name], batch)
        record["results"].append(result)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"\n{name}, batch {batch}, bf16\n\n{table(result, rate)}\n", flush=True)


if __name__ == "__main__":
    main()

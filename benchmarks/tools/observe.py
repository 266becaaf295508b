"""What a benchmark of a whole step looks at: memory, time by kind, and ours in turns with the others."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from imf_kernels.backends.operators import profiled_names

KINDS = {
    "GEMM": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::", "mkl::"),
    "attention": (*profiled_names("attention"), "aten::_softmax", "aten::_flash", "aten::_scaled_dot"),
    "rows": profiled_names("rows"),
}


def look(step: Callable[[], float]) -> dict[str, Any]:
    """Peak memory and time by kind of one step: bytes of tensors above those there before, resident bytes."""
    status = Path("/proc/self/status")
    resident = None
    if status.exists():
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # what earlier calls freed does not count as there before
        before = _status(status, "VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
        step()
        resident = _status(status, "VmHWM") - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    held = peak = 0
    results = record.profiler.kineto_results.events()
    for event in sorted((e for e in results if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    times = dict.fromkeys((*KINDS, "the rest"), 0.0)
    for entry in record.key_averages():
        kind = next((k for k, names in KINDS.items() if entry.key.startswith(names)), "the rest")
        times[kind] += entry.self_cpu_time_total
    total = sum(times.values())
    return {
        "peak tensor bytes": peak,
        "peak resident bytes": resident,
        "share of time": {kind: value / total for kind, value in times.items()},
    }


def _status(path: Path, name: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


class Beside:
    """Called before each round: runs a step and keeps its time."""

    def __init__(self, step: Callable[[], float]) -> None:
        self.step, self.seconds = step, list[float]()

    def __call__(self) -> None:
        start = time.perf_counter()
        self.step()
        self.seconds.append(time.perf_counter() - start)

"""Verify the kernels on this machine: `python -m imf_kernels.verify`.

Checks every operation, on every backend that takes it here, in every dtype, at the corners of its shapes:
outputs, tangents and gradients against float64, by the error rule of testing/errors.py; at some of them also
gradients through tangents. The `reference` is checked where no kernel passed. A record in the user's cache
says what failed; backends/verified.py reads it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from imf_kernels.backends import cuda, sources, triton_launch, verified
from imf_kernels.backends.operators import OPERATIONS as REGISTERED
from imf_kernels.dual import Dual
from imf_kernels.testing import cases, errors, processes, timer
from imf_kernels.testing.cases import OPERATIONS, Case
from imf_kernels.testing.processes import Faults

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ON_GPU = 4  # processes: most of their time is Triton's compiler

# Beyond the small cases: tangents of the last sample only, no elements, and on GPUs sizes of training.
FEWER_ROWS = (
    *("square", "width 33", "fewer heads of keys", "other value width", "mask of bool", "width 37", "matrix"),
    *("a gate a sample", "fp32 stream", "dim 256", "four groups", "positions in two dimensions"),
)
# Cases whose gradients through tangents are checked, for tangents of all samples or the last one.
DIFFERENTIABLE = (
    *("square", "width 33", "fewer heads of keys", "other value width", "width 37", "width 45", "matrix"),
    *("a gate a sample", "fp32 stream", "dim 256", "one group", "image with silu", "channels last", "digits"),
    *("tanh", "only branch", "only scale", "mask added", "causal"),
)
LARGE = (
    *("B/2", "B/2 qkv", "B/2 tangents of q", "B/2 fp32 stream", "B/2 with a mask", "head dim 72", "DiT-XL/2"),
    *("length 1024", "length 1024, causal", "length 1024, 3 heads of keys", "width 16,384"),
)
# What `cuda` is timed on; it is the default of no other operation.
TIMED = {"scaled_dot_product_attention": cases.attention("B/2, batch 64", 64, 12, 276, 64)}


@functools.cache
def corners(on_gpu: bool) -> tuple[Case, ...]:
    """Returns the cases to check."""
    fewer = [case.with_rows(1) for case in cases.SMALL if case.name in FEWER_ROWS]
    large = [case for case in (*cases.LARGE, *cases.LONG) if on_gpu and case.name in LARGE]
    return (*cases.SMALL, *fewer, *cases.EMPTY, *large)


@dataclass(frozen=True)
class Check:
    """A case of `corners`, by its number, in one dtype on one backend.

    `differentiable`: of gradients through tangents, else of all results with tangents and without.
    """

    number: int
    dtype: torch.dtype
    backend: str
    device: str
    differentiable: bool = False

    @property
    def case(self) -> Case:
        return corners(self.device != "cpu")[self.number]

    def __str__(self) -> str:
        return f"{self.backend}, {_name(self.dtype)}, {self.case}"

    def run(self) -> Faults:
        """Returns what is wrong, a line each; `None` where the backend refuses or memory is short."""
        definition = errors.PLAIN if self.backend == "reference" else "reference"
        try:
            with torch.device(self.device), poisoned_memory():
                problem = errors.problem(
                    self.case, self.dtype, definition=definition, differentiable=self.differentiable
                )
                faults = problem.faults(problem.evaluate(self.backend))
                if self.differentiable:
                    faults = [f"{line} (through tangents)" for line in faults]
                else:
                    without = problem.faults(problem.evaluate(self.backend, tangents=False), tangents=False)
                    faults += [f"{line} (without tangents)" for line in without]
                if self.device != "cpu":
                    torch.cuda.synchronize(self.device)
                return faults
        except Exception as error:
            refused = f"backend {self.backend!r} cannot run" in str(error)
            if refused or isinstance(error, torch.OutOfMemoryError):  # as fp64 may need more than a GPU has
                return None
            return [f"{self.case}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"]


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills new tensors with NaN, so that whatever a kernel leaves unwritten is seen."""
    settings: Any = torch.utils.deterministic
    deterministic, filled = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        settings.fill_uninitialized_memory = filled


def checks_of_kernels(device: str, operations: Sequence[str], done: Mapping[Check, Faults]) -> list[Check]:
    """Returns checks of every backend with kernels that may run on the device."""
    able = {"cpu"} if device == "cpu" else set() if cuda.missing() else {"cuda"}
    if (device != "cpu" or triton_launch.interpreted()) and not triton_launch.missing():
        able.add("triton")
    found = []
    for number, case in enumerate(corners(device != "cpu")):
        registered = [o for o in REGISTERED.values() if o.public == case.operation in operations]
        names = {b.name for o in registered for b in o.backends if b.kernels is not None} & able
        found += [
            Check(number, dtype, name, device, differentiable)
            for dtype in case.dtypes
            for name in sorted(names)
            for differentiable in _kinds(case)
        ]
    return found


def _kinds(case: Case) -> tuple[bool, ...]:
    """Returns whether to check a case without gradients through tangents, and with them."""
    through = case.tangents and case.name.partition(" last ")[0] in DIFFERENTIABLE
    return (False, True) if through else (False,)


def checks_of_reference(device: str, operations: Sequence[str], done: Mapping[Check, Faults]) -> list[Check]:
    """Returns checks of the `reference` where no kernel passed."""
    passed = {(c.number, c.dtype, c.differentiable) for c, faults in done.items() if faults == []}
    return [
        Check(number, dtype, "reference", device, differentiable)
        for number, case in enumerate(corners(device != "cpu"))
        if case.operation in operations
        for dtype in case.dtypes
        for differentiable in _kinds(case)
        if (number, dtype, differentiable) not in passed
    ]


def run(device: str, operations: Sequence[str], count: int) -> dict[Check, Faults]:
    """Runs all checks in so many processes, showing the progress: one line on a terminal, else a few."""
    done: dict[Check, Faults] = {}
    began = shown = time.monotonic()
    for select in (checks_of_kernels, checks_of_reference):
        todo = select(device, operations, done)
        total = len(done) + len(todo)
        for check, faults in processes.run(todo, count):
            done[check] = faults
            now, failed = time.monotonic(), sum(map(bool, done.values()))
            line = f"{len(done):4} of {total}, {now - began:3.0f} s, {failed} failed: {check}"
            if sys.stdout.isatty():
                print(f"\r\033[K{line[:99]}", end="", flush=True)
            elif now > shown + 5:
                print(line, flush=True)
                shown = now
    if sys.stdout.isatty():
        print("\r\033[K", end="")
    print(f"{len(done)} checks in {time.monotonic() - began:.0f} s\n")
    return done


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def summary(done: Mapping[Check, Faults]) -> dict[str, dict[str, dict[str, list[str]]]]:
    """Returns the faults by operation, backend and dtype: of each result the first; none where it passed."""
    first: dict[tuple[str, str, str], dict[str, str]] = {}
    for check, faults in done.items():
        if faults is not None:
            found = first.setdefault((check.case.operation, check.backend, _name(check.dtype)), {})
            for line in faults:
                result = re.search(r", (output|tangent|gradient of( tangent of)?) \w+:", line)
                found.setdefault(result[0] if result else "an error", line)
    results: dict[str, dict[str, dict[str, list[str]]]] = {}
    for (operation, backend, dtype), lines in sorted(first.items()):
        results.setdefault(operation, {}).setdefault(backend, {})[dtype] = list(lines.values())
    return results


def table(results: Mapping[str, Mapping[str, Mapping[str, list[str]]]]) -> str:
    """Returns what passed, as a table, and what failed, a line each."""
    names = [_name(dtype) for dtype in DTYPES]
    lines, failed = [f"{'operation':<30}{'backend':<11}{names[0]:<10}{names[1]:<10}{names[2]}"], []
    for operation, backends in results.items():
        for backend, dtypes in backends.items():
            marks = ["-" if n not in dtypes else "FAILED" if dtypes[n] else "passed" for n in names]
            lines.append(f"{operation:<30}{backend:<11}{marks[0]:<10}{marks[1]:<10}{marks[2]}")
            failed += [f"FAILED: {backend}, {n}: {fault}" for n, faults in dtypes.items() for fault in faults]
    return "\n".join([*lines, *([""] if failed else []), *failed])


def time_cuda(operation: str, device: str) -> float:
    """Returns the time of `cuda` relative to Triton's: a forward with tangents and one without, in bf16."""
    case, generator = TIMED[operation], torch.Generator("cpu").manual_seed(0)
    primals, tangents = (
        {name: x.to(device) for name, x in drawn.items()} for drawn in case.draw(generator, torch.bfloat16)
    )
    duals = {name: Dual(x, tangents[name]) for name, x in primals.items()}

    def forward(backend: str) -> None:
        case.run(duals, backend)
        case.run(primals, backend)

    calls = {name: functools.partial(forward, name) for name in verified.ON_GPU}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the kernels are not verified yet
        times = timer.side_by_side(calls, synchronize=lambda: torch.cuda.synchronize(device))
    return timer.ratios(times, "triton")["cuda"]


def main(arguments: Sequence[str] | None = None, count: int | None = None) -> int:
    """Verifies a device, in `count` processes; returns 1 where something failed."""
    parser = argparse.ArgumentParser(
        "python -m imf_kernels.verify", description="Checks the kernels on this machine and keeps a record."
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; by default the GPU if there is one")
    parser.add_argument("--operation", action="append", choices=OPERATIONS, help="only this one; repeatable")
    options = parser.parse_args(arguments)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic products ask for
    gpu = torch.cuda.is_available()
    kind, _, index = (options.device or ("cuda" if gpu else "cpu")).partition(":")
    device = "cpu" if kind == "cpu" else f"{kind}:{index or 0}"
    if device not in verified.devices():
        parser.error(f"--device must be one of {', '.join(verified.devices())}; got {device}")
    operations = options.operation or OPERATIONS
    key = verified.key_of(device)
    print(", ".join(f"{name} {value}" for name, value in key.items()), flush=True)
    if count is None:
        count = 1 if device == "cpu" else min(ON_GPU, os.cpu_count() or 1)
    results = summary(run(device, operations, count))
    print(table(results))
    ratios = {}
    for operation in TIMED:
        tried = [results.get(operation, {}).get(backend) for backend in verified.ON_GPU]
        if all(dtypes and not any(dtypes.values()) for dtypes in tried):
            ratios[operation] = time_cuda(operation, device)
            print(f"\n{operation}: cuda takes {ratios[operation]:.2f} of Triton's time")
    old = verified.record_of(device) or verified.Record(key)
    texts = {
        operation: {b: {d: "; ".join(f) or None for d, f in ds.items()} for b, ds in backends.items()}
        for operation, backends in results.items()
    }
    digests = {o: {b: sources.digest(o, b) for b in backends} for o, backends in texts.items()}
    record = verified.Record(
        key, {**old.results, **texts}, {**old.ratios, **ratios}, {**old.sources, **digests}
    )
    try:
        print(f"\nrecord: {record.write()}")
        if record.failed():
            print("As long as it exists, what failed runs only if named: backend=..., use_backend(...).")
    except OSError as error:
        print(f"\nThe record could not be written, so this run changes nothing: {error}", file=sys.stderr)
    return int(any(faults for bs in results.values() for ds in bs.values() for faults in ds.values()))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

"""Checks in processes of their own, so that one that crashes or hangs fails alone."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Generic, Protocol, TypeVar

SECONDS = 120.0  # after which a check counts as hanging
Faults = list[str] | None  # `None`: the check does not apply


class Check(Protocol):
    """Something to check, which travels between processes."""

    def run(self) -> Faults: ...


C = TypeVar("C", bound=Check)


def run(checks: Sequence[C], processes: int) -> Iterator[tuple[C, Faults]]:
    """Yields each check with its faults as they come, from so many processes; 0: from this one."""
    if not processes:
        yield from ((check, check.run()) for check in checks)
        return
    waiting, workers = list(reversed(checks)), list[_Worker[C]]()
    try:
        while waiting or workers:
            while waiting and len(workers) < processes:
                workers.append(_Worker(waiting.pop()))
            ready = wait([worker.pipe for worker in workers], timeout=1.0)
            for worker in workers[:]:
                if worker.pipe not in ready and time.monotonic() < worker.deadline:
                    continue
                check = worker.check
                faults, able = worker.result(worker.pipe in ready)
                if able and waiting:
                    worker.start(waiting.pop())
                else:
                    workers.remove(worker)
                    worker.end()
                yield check, faults
    finally:
        for worker in workers:
            worker.end()


class _Worker(Generic[C]):
    """A process that runs one check after another."""

    def __init__(self, check: C) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA and OpenMP do not survive a fork
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.start(check)

    def start(self, check: C) -> None:
        self.check, self.deadline = check, time.monotonic() + SECONDS
        self.pipe.send(check)

    def result(self, ready: bool) -> tuple[Faults, bool]:
        """Returns the check's faults, or how it ended, and whether the process can run another."""
        if not ready:
            return [f"no result after {SECONDS:.0f} s"], False
        try:
            faults = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return [f"the process ended with exit code {self.process.exitcode}"], False
        # After such an error nothing runs on the GPU in that process.
        return faults, not any("CUDA error" in line or "AcceleratorError" in line for line in faults or ())

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _work(pipe: Connection) -> None:
    """Runs the checks that come through a pipe, until it is closed."""
    warnings.simplefilter("ignore")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            pipe.send(pipe.recv().run())

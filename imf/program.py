"""Common parts of the command-line programs: errors for the user, signals, exit statuses."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
MOST_THREADS = 4096  # a larger number is a mistake: OpenMP ends the process where it cannot start as many


class UserError(ValueError):
    """Error that the user can do something about; the message says what was wanted, what came, what to do."""


def run(name: str, program: Callable[[], int | None], stopped: str = "stopped") -> int:
    """Runs a program and returns its exit status.

    A `UserError` or an `OSError` is printed without its traceback and gives status 1, SIGINT (Ctrl-C) 130 and
    SIGTERM 143, with their own message or `stopped`.
    """
    try:
        with interruptible():
            return program() or 0
    except (UserError, OSError) as error:
        print(f"\n{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"\n{name}: {str(stop) or stopped}", file=sys.stderr)
        return exit_status(stop)


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where SIGINT would be."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Makes SIGTERM raise `Terminated`, so that it cleans up as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def exit_status(stop: KeyboardInterrupt) -> int:
    """Returns the exit status of a process that a signal has ended."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


def progress(
    items: Iterable[T] | None, title: str, unit: str, *, total: int | None = None, initial: int = 0,
    brief: bool = False, quiet: bool = False, bar_format: str | None = None,
) -> tqdm[T]:  # fmt: skip
    """Makes a progress bar over items, or to be updated by hand; drawn less often into a file.

    brief: of work that is mostly short: it appears after a second, in a file after ten, and leaves no line.
    quiet: it never appears.  bar_format: as tqdm takes it.
    """
    tick, delay = (0.5, 1) if sys.stderr.isatty() else (10, 10)
    options: dict[str, Any] = {"delay": delay, "leave": False} if brief else {}
    options |= {"total": total, "initial": initial, "mininterval": tick, "disable": quiet}
    options["bar_format"] = bar_format
    return tqdm(items, desc=title, unit=unit, dynamic_ncols=True, **options)


def thread_count(text: str) -> int:
    """Reads the value of --threads; argparse.ArgumentTypeError if it is out of range."""
    if not text.isdecimal() or len(text) > 9 or int(text) > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"must be from 0 to {MOST_THREADS}, got {text}")
    return int(text)


class StopSignals:
    """Defers the first SIGINT (Ctrl-C) or SIGTERM; the second is handled normally.

    pending: the number of the signal that came, 0 for none.  agreed: that of all processes, once they agreed,
    see `imf.distributed.DistributedContext.together`.
    """

    def __init__(self) -> None:
        self.pending = self.agreed = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.pending = number
        self.__exit__()

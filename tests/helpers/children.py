"""DistributedContext that a test starts, kills and waits for.

They come from a server that has only imported: a fork of the tests' own process may wait for ever for a lock
that one of its threads held.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 120

_context = multiprocessing.get_context("forkserver") if hasattr(os, "fork") else multiprocessing.get_context()


def start(function: Callable[..., Any], *arguments: Any) -> Any:
    """A running process. Function and arguments are pickled; an `int` that comes back is its exit status."""
    if hasattr(os, "fork"):  # imports, which take seconds, once for all
        _context.set_forkserver_preload(["pytest", "imf.evaluate", "tests.helpers.tiny_data"])
    process = _context.Process(target=_run, args=(function, arguments))
    process.start()
    return process


def finish(process: Any) -> int:
    """Waits for a process; returns its exit status, negative for a signal."""
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"a process did not end within {SECONDS} s")
    return process.exitcode


def run(log: Path, function: Callable[..., Any], *arguments: Any) -> int:
    """Runs a function with its output in the file `log`; returns the exit status."""
    return finish(start(_with_output, log, function, arguments))


def _with_output(log: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1)
    faulthandler.dump_traceback_later(SECONDS - 10)
    return function(*arguments)


def _run(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    status = 70
    try:
        found = function(*arguments)
        status = found if isinstance(found, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)

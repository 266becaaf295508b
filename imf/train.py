"""The program that trains: `python -m imf.train`."""

from __future__ import annotations

import argparse
import contextlib
import sys
from datetime import timedelta
from pathlib import Path

import imf_kernels as ik
from imf.distributed import ERRORS, Processes, agreed, joined
from imf.io import locked
from imf.program import UserError, exit_status, interruptible
from imf.training import checkpoint
from imf.training.config import (
    TrainConfig,
    add_arguments,
    with_arguments,
)
from imf.training.log import how_to_go_on
from imf.training.loop import finish, fit
from imf.training.recipes import PRESETS, preset_of
from imf.training.setup import Run, begin, device_of, fitted_to_data, folder_of, resume

ENDINGS: tuple[type[Exception], ...] = (*ERRORS, UserError)  # end a run with a message


def main(argv: list[str] | None = None) -> int:
    """`python -m imf.train`; returns the exit status: 0, 1 error, 2 wrong argument, 130 or 143 stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m imf.train",
        description="Train an Improved Mean Flow; by default on scikit-learn's digits.",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="go on exactly, from a run's folder or its newest checkpoint (no PATH: the newest run)",
    )
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default=argparse.SUPPRESS,
        help="settings to start from; the defaults below are of the one that is given (default: digits)",
    )
    preset = preset_of(sys.argv[1:] if argv is None else argv)
    add_arguments(parser, preset)
    arguments = parser.parse_args(argv)
    config = preset
    if arguments.resume is None:
        try:
            config = with_arguments(preset, arguments)
        except ValueError as error:
            parser.error(str(error))
    elif "preset" in arguments:
        parser.error("--preset is for new runs; a resumed one goes on with its own settings")
    elif getattr(arguments, "init_from", ""):
        parser.error("--init-from is for new runs; a resumed one goes on with its own weights")
    try:
        device = config.device
        if arguments.resume is not None:
            device = device_of(Path(arguments.resume) if arguments.resume else None, arguments)
        with interruptible(), joined(device, timeout=timedelta(minutes=30)) as who:
            return _train(config, arguments, who)
    except ERRORS as error:  # before the processes know of each other
        print(f"\nimf.train: {error}", file=sys.stderr)
        return 1


def _train(config: TrainConfig, arguments: argparse.Namespace, who: Processes) -> int:
    run, locks = None, contextlib.ExitStack()

    def lock(folder: Path) -> None:
        """No other process may write to it until this one is done."""
        with who.together():
            if who.first:
                locks.enter_context(locked(folder))

    if who.first:  # reading the data and building the network can take seconds
        print(
            f"imf.train: loading {config.data if arguments.resume is None else 'a checkpoint'}",
            file=sys.stderr,
        )
    try:
        if arguments.resume is None:
            with who.together():
                config = fitted_to_data(config)
            run = begin(config, who)
            lock(run.folder)
        else:
            path = Path(arguments.resume) if arguments.resume else None
            with who.together():
                folder = folder_of(path, arguments)
            lock(folder)  # then a folder's newest checkpoint stays the newest
            run = resume(path or folder, arguments, who)
        backend = run.config.backend
        with ik.use_backend(None if backend == "auto" else backend):
            received = fit(run)
            if received is None:
                finish(run)
                return 0
        status = 128 + received
    except KeyboardInterrupt as stop:
        status = exit_status(stop)
        if who.grouped:
            sys.exit(status)  # alone: the others are elsewhere, torchrun ends them
    except ENDINGS as error:
        if who.first or not agreed(error):
            print(f"\nimf.train: {error}", file=sys.stderr)
            if run is not None:
                print(_how_to_go_on(run), file=sys.stderr)
        if who.grouped and not agreed(error):
            sys.exit(1)
        return 1
    except RuntimeError:  # of PyTorch: another process has ended, or this one cannot go on
        if run is not None and who.grouped:
            print(f"\nimf.train: process {who.rank} ends by an error. {_how_to_go_on(run)}", file=sys.stderr)
        raise
    finally:
        locks.close()
    if run is not None and who.first:
        print(f"\nStopped after step {run.state.step} of {run.config.steps}.", file=sys.stderr)
        print(_how_to_go_on(run), file=sys.stderr)
    return status


def _how_to_go_on(run: Run) -> str:
    return how_to_go_on(run.folder, checkpoint.list_all(run.folder), run.processes.count)


if __name__ == "__main__":
    sys.exit(main())

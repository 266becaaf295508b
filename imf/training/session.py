"""A run from the command line's arguments to its final pictures: locks, errors, signals, resuming."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from datetime import timedelta
from pathlib import Path

import imf_kernels as ik
from imf.distributed import ERRORS, DistributedContext, agreed, initialized
from imf.io import locked
from imf.program import UserError, exit_status
from imf.training import artifacts, checkpoint
from imf.training.checkpoint import Metadata
from imf.training.config import TrainConfig
from imf.training.loop import fit
from imf.training.setup import Run, begin, find_resumed, resume


def train(config: TrainConfig, arguments: argparse.Namespace) -> int:
    """Trains a new run of `config`, or the one of `arguments.resume`; returns the exit status.

    Raises: UserError or OSError before the processes know of each other; later ones are printed.
    """
    resumed = None if arguments.resume is None else find_resumed(arguments)
    before = config if resumed is None else resumed[1].config
    device, cuda_graphs = (getattr(arguments, n, getattr(before, n)) for n in ("device", "cuda_graphs"))
    with initialized(device, timedelta(minutes=30), cuda_graphs) as context:
        return train_in(context, config, arguments, resumed)


def train_in(
    context: DistributedContext,
    config: TrainConfig,
    arguments: argparse.Namespace,
    resumed: tuple[Path, Metadata] | None = None,
) -> int:
    """Does what `train` does, in processes that know of each other."""
    run: Run | None = None
    locks = contextlib.ExitStack()

    def report(text: str) -> None:
        hint = "" if run is None else f"\n{how_to_resume(run.folder, context.count)}"
        print(f"\n{text}{hint}", file=sys.stderr)

    def lock(folder: Path) -> None:
        with context.together():
            if context.first:
                locks.enter_context(locked(folder))

    if context.first:  # reading the data and building the network can take seconds
        print(f"imf.train: loading {'a checkpoint' if resumed else config.data}", file=sys.stderr)
    try:
        if resumed is None:
            run = begin(config, context)
            lock(run.folder)
        else:
            folder = checkpoint.run_of(resumed[0])
            lock(folder)
            with context.together():
                if checkpoint.find(folder).name != resumed[0].name:
                    raise UserError(f"--resume: another process has written to {folder}: again")
            run = resume(*resumed, arguments, context)
        with ik.use_backend(None if run.config.backend == "auto" else run.config.backend):
            stopped_by = fit(run)
            if stopped_by is None:
                artifacts.finish(run)
                return 0
        status = 128 + stopped_by
    except KeyboardInterrupt as stop:
        status = exit_status(stop)
        if context.grouped:
            sys.exit(status)  # alone: the others are elsewhere, torchrun ends them
    except ERRORS as error:
        if context.first or not agreed(error):
            report(f"imf.train: {error}")
        if context.grouped and not agreed(error):
            sys.exit(1)
        return 1
    except RuntimeError:  # of PyTorch: another process has ended, or this one cannot go on
        if run is not None and context.grouped:
            report(f"imf.train: process {context.rank} ends by an error.")
        raise
    finally:
        locks.close()
    if run is None:
        report("imf.train: stopped before the first step")
    elif context.first:
        report(f"Stopped after step {run.state.step} of {run.config.steps}.")
    return status


def how_to_resume(folder: Path, processes: int = 1) -> str:
    """Names the last of a run's checkpoints and the command that resumes from it."""
    checkpoints = checkpoint.list_all(folder)
    if not checkpoints:
        return f"No checkpoint had been written to {folder}."
    start = ["python"] if processes == 1 else ["torchrun", "--nproc-per-node", str(processes)]
    command = shlex.join([*start, "-m", "imf.train", "--resume", str(folder)])
    return f"Last good checkpoint: {checkpoints[-1]}\nGo on with: {command}"

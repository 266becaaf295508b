"""A run from its configuration to its final pictures: locks, errors, signals, resuming."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import nn

import imf_kernels as ik
from imf.distributed import ERRORS, DistributedContext, agreed, initialized
from imf.io import locked
from imf.model.config import AdaptedConfig, config_of
from imf.program import Terminated, UserError, exit_status
from imf.training import artifacts, checkpoint, loop
from imf.training.checkpoint import Metadata
from imf.training.config import TrainConfig
from imf.training.setup import OWN, begin, find_resumed, resume
from imf.training.state import Run

STOPS: tuple[type[BaseException], ...] = (KeyboardInterrupt, *ERRORS)


def fit(
    config: TrainConfig | None = None,
    *,
    dataset: Any = None,
    network: nn.Module | None = None,
    resume: str | Path | None = None,
) -> Run:
    """Trains a new run, or resumes one, as `python -m imf.train` does: log, checkpoints, pictures, scores.

    In processes that torchrun started, all call it. Ctrl-C or SIGTERM ends it after a step and a checkpoint.

    Args:
        config: of a new run by default that of the digits, of a resumed one its own.
        dataset: "digits", a folder that `imf.data.prepare` wrote, an `imf.data.DataSet`, or a map-style
            `torch.utils.data.Dataset` of (image, label) pairs as `imf.data.from_dataset` takes it; by default
            `config.data`.
        network: from `imf.adapt` or `imf.build`; by default one of `config.network`, with random weights. It
            is trained in place, and moved to the run's device.
        resume: a run's folder or its newest checkpoint, or "" for the newest run. Data and network that were
            passed to the run are passed again.

    Returns:
        The run: its `folder`, its averaged `network`, fit for `imf.generate`, its `config`.

    Raises:
        UserError, OSError: for what cannot be done; the message names the last checkpoint. The first of
            several processes raises, the others exit.
        KeyboardInterrupt: once stopped; the message says how to resume.
    """
    if not isinstance(config, TrainConfig | None):
        raise UserError(f"fit: config must be an imf.TrainConfig or None, got {type(config).__name__}")
    found = None if resume is None else find_resumed(resume, (config or TrainConfig()).runs)
    if config is None:
        config = TrainConfig() if found is None else found[1].config
    failure: BaseException
    with initialized(config.device, timedelta(minutes=30), config.cuda_graphs) as context:
        try:
            return fit_in(context, config, dataset=dataset, network=network, resumed=found)
        except STOPS as error:
            if context.grouped and not agreed(error):  # the others are elsewhere; torchrun ends them
                raise
            failure = error
    if not context.first:
        sys.exit(exit_status(failure) if isinstance(failure, KeyboardInterrupt) else 1)
    raise failure


def fit_in(
    context: DistributedContext,
    config: TrainConfig,
    *,
    dataset: Any = None,
    network: nn.Module | None = None,
    resumed: tuple[Path, Metadata] | None = None,
) -> Run:
    """Does what `fit` does, in processes that know of each other; all raise what they agree on."""
    run: Run | None = None
    locks = contextlib.ExitStack()

    def lock(folder: Path) -> None:
        with context.together():
            if context.first:
                locks.enter_context(locked(folder))

    if context.first:  # reading the data and building the network can take seconds
        given = config.data if dataset is None or isinstance(dataset, (str, Path)) else "a data set"
        print(f"imf.train: loading {'a checkpoint' if resumed else given}", file=sys.stderr)
    try:
        if resumed is None:
            if network is not None:
                own: Any = config_of(network)
                config = replace(config, network=own)
            run = begin(config, context, dataset, network)
            lock(run.folder)
        else:
            folder = checkpoint.run_of(resumed[0])
            lock(folder)
            with context.together():
                if checkpoint.find(folder).name != resumed[0].name:
                    raise UserError(f"--resume: another process has written to {folder}: again")
            run = resume(*resumed, config, context, dataset, network)
        with ik.use_backend(None if run.config.backend == "auto" else run.config.backend):
            stopped_by = loop.fit(run)
            if stopped_by is None:
                artifacts.finish(run)
                return run
        stop = Terminated() if stopped_by == signal.SIGTERM else KeyboardInterrupt()
        stop.agreed = True  # type: ignore[attr-defined]
        raise stop
    except STOPS as error:
        if run is None:
            raise
        text = f"stopped after step {run.state.step} of {run.config.steps}"
        if not isinstance(error, KeyboardInterrupt):
            text = str(error)
        told = type(error)(f"{text}\n{_how_to_resume(run)}")
        told.agreed = agreed(error)  # type: ignore[attr-defined]
        raise told from error
    except RuntimeError:  # of PyTorch: another process has ended, or this one cannot go on
        if run is not None and context.grouped:
            text = f"imf.train: process {context.rank} ends by an error."
            print(f"\n{text}\n{_how_to_resume(run)}", file=sys.stderr)
        raise
    finally:
        locks.close()


def _how_to_resume(run: Run) -> str:
    given = ["dataset"] if run.config.data.startswith(OWN) else []
    given += ["network"] if isinstance(run.config.network, AdaptedConfig) else []
    return how_to_resume(run.folder, run.context.count, given)


def how_to_resume(folder: Path, processes: int = 1, given: Sequence[str] = ()) -> str:
    """Names the last of a run's checkpoints and the command that resumes from it.

    given: arguments of `fit` that were objects in Python, which a command cannot pass.
    """
    checkpoints = checkpoint.list_all(folder)
    if not checkpoints:
        return f"No checkpoint had been written to {folder}."
    start = ["python"] if processes == 1 else ["torchrun", "--nproc-per-node", str(processes)]
    how = shlex.join([*start, "-m", "imf.train", "--resume", str(folder)])
    if given:
        how = f"imf.fit(resume={str(folder)!r}, {', '.join(f'{name}=…' for name in given)})"
    return f"Last good checkpoint: {checkpoints[-1]}\nGo on with: {how}"

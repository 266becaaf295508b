"""Training: draws -> objective -> backward -> AdamW -> moving average. `python -m imf.train` runs it."""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn

import imf_kernels as ik
from imf import checkpoint, data
from imf.checkpoint import CheckpointError, Metadata
from imf.config import (
    TrainConfig,
    add_arguments,
    ema_decay,
    learning_rate,
    with_arguments,
)
from imf.draws import Draws
from imf.files import locked, replacing
from imf.graphs import StepGraphs
from imf.methods import Objective, guidance_of, objective
from imf.objective import Prepared, prepare
from imf.presets import PRESETS, preset_of
from imf.processes import ERRORS, Processes, agreed, joined
from imf.run import (
    Log,
    Readback,
    StopSignals,
    TrainingError,
    exit_status,
    how_to_go_on,
    interruptible,
    naming,
    not_finite,
    write_json,
)
from imf.sample import class_grid
from imf.scores import evaluate, table
from imf.sharding import local, synchronising, whole
from imf.start import Run, State, begin, device_of, fitted_to_data, folder_of, resume

ENDINGS: tuple[type[Exception], ...] = (*ERRORS, data.DataError)  # end a run with a message


def training_step(
    state: State, batches: Iterator[tuple[Tensor, Tensor]], config: TrainConfig, who: Processes
) -> Tensor:
    """One update of `state` in place; returns what `imf.run.TERMS` names, [4] fp32 on the device.

    batches: this process's, of one size in all, so that the mean over processes is that over rows.
    """
    loss_of = objective(config.method, config.fixed_guidance)
    guidance = guidance_of(config.method, config.fixed_guidance)
    rates = learning_rate(config, state.step), ema_decay(config, state.step)

    def inputs(micro_step: int) -> tuple[Tensor, Tensor, Prepared]:
        x, y = next(batches)
        draws = Draws.sample(x, seed=config.seed, step=micro_step, process=who.rank, **config.draws)
        return x, y, prepare(draws, guidance, who.device)

    if config.cuda_graphs:  # without accumulation
        if state.graphs is None:
            call = functools.partial(_whole_step, state, loss_of, who)
            state.graphs = StepGraphs(call, config.batch_size, who.device)
        terms = state.graphs(*inputs(state.step), *rates)
    else:
        terms = torch.zeros(3, device=who.device)
        for micro_step in range(state.step * config.accumulate, (state.step + 1) * config.accumulate):
            batch, last = inputs(micro_step), (micro_step + 1) % config.accumulate == 0
            with synchronising(state.engine, last):
                terms += gradients(state, loss_of, *batch, config.accumulate)
        terms = update(state, terms, *rates, who)
    state.step += 1
    return terms


def gradients(
    state: State, loss_of: Objective, x: Tensor, y: Tensor, step: Prepared, accumulate: int = 1
) -> Tensor:
    """Adds a micro step's share to the gradients; its share of loss, loss_u and loss_v, [3]."""
    out = loss_of(state.engine, x, y, step)
    (out.loss / accumulate).backward()
    return torch.stack([out.loss.detach(), out.loss_u, out.loss_v]) / accumulate


def update(
    state: State, terms: Tensor, rate: float | Tensor, decay: float | Tensor, who: Processes
) -> Tensor:
    """AdamW and the moving average, unless a number is not finite; `terms`, [3], with gradients' norm."""
    norm = whole(nn.utils.get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None]))
    terms = torch.cat([who.mean(terms), norm[None]])  # the same in all processes
    state.found_inf.logical_or_(~terms.isfinite().all())  # once 1, the two updates below change nothing

    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    state.optimizer.zero_grad()
    update_ema(state.ema, state.model, decay, state.found_inf)
    return terms


def _whole_step(
    state: State,
    loss_of: Objective,
    who: Processes,
    x: Tensor,
    y: Tensor,
    step: Prepared,
    rate: Tensor,
    decay: Tensor,
) -> Tensor:
    return update(state, gradients(state, loss_of, x, y, step), rate, decay, who)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float | Tensor, found_inf: Tensor) -> None:
    """ema <- ema + (1 - decay) (model - ema) for every weight in fp32; nothing if found_inf, [], is 1."""
    averages: list[Tensor] = [local(p) for p in ema.parameters()]
    weights: list[Tensor] = [local(p) for p in model.parameters()]
    share = (1 - decay) * (1 - found_inf)
    torch._foreach_lerp_(averages, weights, [share] * len(weights))  # one pass over each


def fit(run: Run) -> int | None:
    """Train until `steps`, or until SIGINT or SIGTERM, and save; returns the signal's number if one came.

    A signal or an error of one process stops all of them after the same step, and after the picture that is
    due there; one that an earlier process owes is drawn first.
    Raises: TrainingError at a step that is not finite; CheckpointError if a checkpoint cannot be written;
    OSError if another file cannot, after a checkpoint.
    """
    config, state, who = run.config, run.state, run.processes
    arriving, saved = Readback(), state.step
    batches = data.Batches(
        run.data,
        batch_size=config.micro_batch_size,
        seed=config.seed,
        first=state.step * config.accumulate,
        process=who.rank,
        processes=who.count,
        device=who.device,
    )

    def check(log: Log | None, wait: bool = False) -> None:
        with who.together():
            for step, terms in arriving.pop(wait):
                if not all(map(math.isfinite, terms)):
                    raise TrainingError(not_finite(step, terms))
                if log is not None:
                    log.add(step, terms)

    def save_checked(log: Log | None) -> None:
        nonlocal saved
        check(log, wait=True)  # never a checkpoint of steps that were not checked
        if state.step != saved:
            save(run)
            saved = state.step

    with StopSignals() as stop, batches:
        try:
            with _logging(run) as log:
                owed = run.folder / "samples" / _picture(state.step)
                if _picture_is_due(run) and who.from_first(not owed.exists()):  # killed between the two
                    draw(run, owed)
                received = who.largest(stop.received or 0)
                while state.step < config.steps and not received:
                    began = time.perf_counter()
                    terms = training_step(state, batches, config, who)
                    run.elapsed += time.perf_counter() - began
                    if log is not None:
                        log.elapsed = run.elapsed
                    arriving.push(state.step, terms)
                    check(log)

                    received = who.largest(stop.received or 0)
                    if received or _due(state.step, config.checkpoint_every):
                        save_checked(log)
                    if _picture_is_due(run):
                        draw(run, run.folder / "samples" / _picture(state.step))
                    if not received:  # nor may one that came meanwhile begin another step
                        received = who.largest(stop.received or 0)
                save_checked(log)  # also when a signal came while a checkpoint or a picture was written
        except OSError as error:  # a full disk met by the metrics or a picture: the steps are worth keeping
            if who.grouped and not agreed(error):  # the other processes are elsewhere
                raise
            try:
                save_checked(None)
            except CheckpointError as second:
                raise CheckpointError(f"{error}\n{second}") from error
            raise
    return who.largest(stop.received or 0) or None


@contextlib.contextmanager
def _logging(run: Run) -> Iterator[Log | None]:
    """The log in the first process, None in the others."""
    log, who = None, run.processes
    with who.together():
        if who.first:
            log = Log(run.folder, run.config, run.state.step, run.elapsed)
    try:
        yield log
    except BaseException:
        if log is not None:
            with contextlib.suppress(OSError):  # the error that came first says more
                log.close()
        raise
    with who.together():
        if log is not None:
            log.close()


def save(run: Run) -> None:
    """Write a checkpoint of the run as it is, then delete the oldest ones; all processes call it."""
    who, state = run.processes, run.state
    metadata = Metadata(
        step=state.step,
        elapsed=run.elapsed,
        config=run.config,
        precision=run.precision,
        environment=checkpoint.environment(who.device, who.count),
        autoencoder=run.data.autoencoder,
    )
    path = checkpoint.path_of(run.folder, state.step)
    with who.together():
        checkpoint.save(
            path,
            model=state.model,
            ema=state.ema,
            optimizer=state.optimizer,
            metadata=metadata,
            writes=who.first,
        )
        if who.first:
            checkpoint.prune(run.folder, run.config.keep_checkpoints)


def draw(run: Run, path: Path, steps: int = 1) -> None:
    """Write a grid of samples of the averaged network, a row per class, always from the same noise.

    Every process draws, which a sharded network asks for; the first one writes.
    """
    omega, t_min, t_max = run.config.sampling
    picture = class_grid(
        run.state.ema, steps=steps, omega=omega, t_min=t_min, t_max=t_max, seed=run.config.seed
    )
    with run.processes.together(), naming(path):
        if run.processes.first:
            with replacing(path) as temporary:
                picture.save(temporary, format="PNG")


def finish(run: Run) -> None:
    """Score the averaged network in 1, 2 and 4 steps, draw samples, write results.json, print the table.

    That is for images in memory; the samples of others are scored by `python -m imf.evaluate`.
    """
    config, who = run.config, run.processes
    if not isinstance(run.data, data.LabelledImages):
        if who.first:
            print(f"\nThe run is in {run.folder}; python -m imf.evaluate scores it")
        return
    count = 180 * run.data.num_classes
    omega, t_min, t_max = config.sampling
    guidance = {"omega": omega, "t_min": t_min, "t_max": t_max}
    scores = evaluate(run.state.ema, run.data, steps=(1, 2, 4), count=count, seed=config.seed, **guidance)
    pictures = [run.folder / "samples" / f"final-{score.steps}-step.png" for score in scores]
    for score, path in zip(scores, pictures, strict=True):
        draw(run, path, score.steps)
    results = {
        "data": config.data,
        "training_steps": run.state.step,
        "samples": count,
        "seed": config.seed,
        **guidance,
        "scores": [asdict(score) for score in scores],
        "pictures": [str(path.relative_to(run.folder)) for path in pictures],
    }
    with who.together():
        if who.first:
            write_json(run.folder / "results.json", results)
    if not who.first:
        return
    print(
        f"\n{table(scores)}\n\n"
        f"{count:,} class-balanced samples of the averaged network (seed {config.seed}) against "
        f"{len(run.data):,} images, pixels in [-1, 1];\n"
        f"omega {omega:g}, interval [{t_min:g}, {t_max:g}]. The run is in {run.folder}\n"
        f"Pictures: {', '.join(map(str, pictures))}"
    )


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


def _picture(step: int) -> str:
    return f"step-{step:08d}.png"


def _picture_is_due(run: Run) -> bool:
    """After the step that was just done; after the last one `finish` draws."""
    return 0 < run.state.step < run.config.steps and _due(run.state.step, run.config.sample_every)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


if __name__ == "__main__":
    sys.exit(main())

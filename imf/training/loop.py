"""Training: draws -> objective -> backward -> AdamW -> moving average. `python -m imf.train` runs it."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from imf import data
from imf.distributed import ERRORS, Processes, agreed
from imf.evaluation.digits import evaluate, table
from imf.io import naming, replacing, write_json
from imf.mean_flow.methods import Objective, guidance_of, objective
from imf.objective.draws import Draws
from imf.objective.imf_loss import Prepared, prepare
from imf.program import StopSignals, UserError
from imf.sampling import class_grid
from imf.training import checkpoint
from imf.training.checkpoint import Metadata
from imf.training.config import (
    TrainConfig,
    ema_decay,
    learning_rate,
)
from imf.training.graphs import StepGraphs
from imf.training.log import (
    Log,
    Readback,
    not_finite,
)
from imf.training.parallel import local, synchronising, whole
from imf.training.setup import Run, State

ENDINGS: tuple[type[Exception], ...] = (*ERRORS, UserError)  # end a run with a message


def training_step(
    state: State, batches: Iterator[tuple[Tensor, Tensor]], config: TrainConfig, who: Processes
) -> Tensor:
    """One update of `state` in place; returns what `imf.training.log.TERMS` names, [4] fp32 on the device.

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
    Raises: UserError at a step that is not finite; UserError if a checkpoint cannot be written;
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
                    raise UserError(not_finite(step, terms))
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
            except UserError as second:
                raise UserError(f"{error}\n{second}") from error
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


def _picture(step: int) -> str:
    return f"step-{step:08d}.png"


def _picture_is_due(run: Run) -> bool:
    """After the step that was just done; after the last one `finish` draws."""
    return 0 < run.state.step < run.config.steps and _due(run.state.step, run.config.sample_every)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0

"""The training loop: draws → objective → backward → AdamW → average → log, checkpoint, picture, figures."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from imf.distributed import DistributedContext, agreed
from imf.objective.draws import Draws, StepDraws, count_of_v_u
from imf.program import UserError
from imf.training import artifacts
from imf.training.config import TrainConfig, ema_decay, learning_rate
from imf.training.graphs import WARMUP_OF_DDP, StepGraphs
from imf.training.log import Readback, check_finite, opened_log
from imf.training.parallel import synchronising, whole
from imf.training.setup import Run, State


def fit(run: Run) -> int | None:
    """Trains until `steps`, or until SIGINT or SIGTERM, and saves; returns the signal's number if one came.

    A signal or an error of one process stops all of them after the same step and its picture.

    Raises: UserError at a step that is not finite, or if a checkpoint cannot be written; OSError if another
        file cannot, after a checkpoint.
    """
    config, state, context, signals = run.config, run.state, run.context, run.signals
    readback, saved, log = Readback(), state.step, None

    def report(wait: bool = False) -> None:
        """Logs the steps whose numbers have arrived; the one collective by which a step's hosts agree."""
        with context.together(signals):
            for step, terms in readback.pop(wait):
                check_finite(step, terms)
                if log is not None:
                    log.add(step, terms, run.elapsed)

    def save_checked() -> None:
        nonlocal saved
        report(wait=True)  # never a checkpoint of steps that were not checked
        if state.step != saved:
            artifacts.save(run)
            saved = state.step

    with signals, run.batches() as batches:
        try:
            with opened_log(run.folder, config, state.step, run.elapsed, context) as log:
                report()
                artifacts.draw_due(run, log, again=False)
                artifacts.score_due(run, log, again=False)
                while state.step < config.steps and not signals.agreed:
                    began = time.perf_counter()
                    terms = training_step(state, batches, config, context)
                    run.elapsed += time.perf_counter() - began
                    readback.push(state.step, terms)
                    report()
                    if signals.agreed or artifacts.checkpoint_due(config, state.step):
                        save_checked()
                    artifacts.draw_due(run, log)
                    artifacts.score_due(run, log)
                save_checked()  # also when a signal came while a checkpoint or a picture was written
        except OSError as error:  # a full disk met by the metrics or a picture: the steps are worth keeping
            if context.grouped and not agreed(error):  # the other processes are elsewhere
                raise
            log = None
            try:
                save_checked()
            except UserError as second:
                raise UserError(f"{error}\n{second}") from error
            raise
        finally:
            state.graphs = None  # NCCL waits for the graphs that hold its collectives, before it lets go
    return signals.agreed or None


def training_step(
    state: State, batches: Iterator[tuple[Tensor, Tensor]], config: TrainConfig, context: DistributedContext
) -> Tensor:
    """Updates `state` in place; returns the step's `imf.training.log.TERMS`, [4] fp32 on the device.

    batches: this process's, of one size in all, so that the mean over processes is that over rows.
    """
    rates = learning_rate(config, state.step), 1 - ema_decay(config, state.step)
    run = functools.partial(micro_step, state, config, context)
    if config.cuda_graphs and state.graphs is None:
        state.graphs = StepGraphs(
            run,
            config.micro_batch_size // context.count,
            context.device,
            state.guidance,
            accumulate=config.accumulate,
            warmup=WARMUP_OF_DDP if context.grouped else 0,
            stream=state.stream,
        )
    for i in range(config.accumulate):
        x, y = next(batches)
        number, last = state.step * config.accumulate + i, i + 1 == config.accumulate
        draws = Draws.sample(x, seed=config.seed, step=number, process=context.rank, **config.draws)
        if state.graphs is None:
            terms = run(x, y, draws, *rates, last)
        else:
            others = rows_of_others(state, config, context, number)
            terms = state.graphs(x, y, draws, *rates, last, at_least=others)
    state.step += 1
    return terms


def micro_step(
    state: State,
    config: TrainConfig,
    context: DistributedContext,
    x: Tensor,
    y: Tensor,
    draws: Draws | StepDraws,
    rate: float | Tensor,
    share: float | Tensor,
    last: bool,
) -> Tensor:
    """Adds a micro-batch's share to gradients and `state.terms`; the `last` one of a step updates weights.

    Returns: as `update` if `last`, else the terms so far.
    """
    with synchronising(state.wrapped, last):
        state.terms += backward(state, x, y, draws, config.accumulate)
    return update(state, config, rate, share, context) if last else state.terms


def rows_of_others(state: State, config: TrainConfig, context: DistributedContext, micro_step: int) -> int:
    """Returns the most rows on which another process needs v_u in a micro-step.

    Their draws are functions of the seed, the micro-step and the process, so nothing is communicated.
    """
    batch, settings = config.micro_batch_size // context.count, {"seed": config.seed, "step": micro_step}
    counts = (
        count_of_v_u(batch, state.guidance, process=process, **settings, **config.draws)
        for process in range(context.count)
        if process != context.rank
    )
    return max(counts, default=0)


def backward(state: State, x: Tensor, y: Tensor, draws: Draws | StepDraws, accumulate: int) -> Tensor:
    """Adds a micro-batch's share to the gradients; returns its share of loss, loss_u and loss_v, [3]."""
    out = state.objective(state.wrapped, x, y, draws)
    (out.loss / accumulate).backward()
    return torch.stack([out.loss.detach(), out.loss_u, out.loss_v]) / accumulate


def update(
    state: State,
    config: TrainConfig,
    rate: float | Tensor,
    share: float | Tensor,
    context: DistributedContext,
) -> Tensor:
    """AdamW and the moving average, unless a number is not finite; returns [*terms, norm of the gradient].

    Gradients and `state.terms` are zero afterwards.  share: of the weights in their average.
    """
    norms = torch._foreach_norm([p.grad for p in state.parameters if p.grad is not None])
    norm = whole(torch.linalg.vector_norm(torch.stack(norms)))
    terms = torch.cat([context.mean(state.terms), norm[None]])  # the same in all processes
    state.terms.zero_()
    state.found_inf.logical_or_(~terms.isfinite().all())  # once 1, the two updates below change nothing
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    if config.cuda_graphs and config.accumulate > 1:  # whose graphs add to gradients in the same memory
        state.optimizer.zero_grad(set_to_none=False)
    else:
        for weight in state.parameters:  # a tenth of the time of zero_grad
            weight.grad = None
    state.average((1 - state.found_inf) * share)
    return terms

"""The training loop: draws → objective → backward → AdamW → average → log, checkpoint, picture, figures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from imf.distributed import agreed
from imf.objective.draws import Draws, StepDraws
from imf.program import UserError
from imf.training.artifacts import draw_due, score_due
from imf.training.checkpoint import save_run
from imf.training.config import ema_decay, learning_rate
from imf.training.graphs import WARMUP_OF_DDP, StepGraphs, rows_of_others
from imf.training.log import Log, opened_log, report
from imf.training.parallel import synchronising, whole
from imf.training.state import Run


def fit(run: Run) -> int | None:
    """Trains until `steps`, or until SIGINT or SIGTERM, and saves; returns the signal's number if one came.

    A signal or an error of one process stops all of them after the same step and its picture.

    Raises: UserError at a step that is not finite, or if a checkpoint cannot be written; OSError if another
        file cannot, after a checkpoint.
    """
    with run.signals, run.batches() as batches:
        try:
            with opened_log(run) as log:
                report(run, log)
                draw_due(run, log, again=False)
                score_due(run, log, again=False)
                for _ in steps(run, batches, log):
                    pass
        except OSError as error:  # a full disk met by the metrics or a picture: the steps are worth keeping
            if run.context.grouped and not agreed(error):  # the other processes are elsewhere
                raise
            try:
                save(run, None)
            except UserError as second:
                raise UserError(f"{error}\n{second}") from error
            raise
        finally:
            run.state.graphs = None  # NCCL waits for the graphs that hold its collectives, before it lets go
    return run.signals.agreed or None


def steps(run: Run, batches: Iterator[tuple[Tensor, Tensor]], log: Log | None = None) -> Iterator[Tensor]:
    """Trains; yields each step's `imf.training.log.TERMS`, [4] fp32 on the device, before they are logged.

    batches: this process's, of one size in all, so that the mean over processes is that over rows.
    log: in the first process.
    """
    config, state, context, signals = run.config, run.state, run.context, run.signals
    optimizer, accumulate = state.optimizer, config.accumulate

    def micro_step(x: Tensor, y: Tensor, draws: Draws | StepDraws, lr: Any, share: Any, last: bool) -> Tensor:
        """Adds a micro-batch's share to gradients and terms; the `last` one of a step updates the weights.

        lr: learning rate.  share: of the weights in their average.
        Returns: the terms so far, [3]; of the last one with the norm of the gradient, [4].
        """
        with synchronising(state.wrapped, last):
            out = state.objective(state.wrapped, x, y, draws)
            (out.loss / accumulate).backward()
            state.terms += torch.stack([out.loss.detach(), out.loss_u, out.loss_v]) / accumulate
        if not last:
            return state.terms
        norms = torch._foreach_norm([p.grad for p in state.parameters if p.grad is not None])
        norm = whole(torch.linalg.vector_norm(torch.stack(norms)))
        terms = torch.cat([context.mean(state.terms), norm[None]])  # the same in all processes
        state.terms.zero_()
        state.found_inf.logical_or_(~terms.isfinite().all())  # once 1, the two updates below change nothing
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        # The graphs of a step's micro-batches add to gradients in the same memory.
        optimizer.zero_grad(set_to_none=not config.cuda_graphs or accumulate == 1)
        state.average((1 - state.found_inf) * share)
        return terms

    if config.cuda_graphs and state.graphs is None:
        batch, warmup = config.micro_batch_size // context.count, WARMUP_OF_DDP if context.grouped else 0
        state.graphs = StepGraphs(
            micro_step, batch, context.device, state.guidance, accumulate, warmup, state.stream
        )
    while state.step < config.steps and not signals.agreed:
        began = time.perf_counter()
        rates = learning_rate(config, state.step), 1 - ema_decay(config, state.step)
        for number in range(state.step * accumulate, (state.step + 1) * accumulate):
            x, y = next(batches)
            draws = Draws.sample(x, seed=config.seed, step=number, process=context.rank, **config.draws)
            last = (number + 1) % accumulate == 0
            if state.graphs is None:
                terms = micro_step(x, y, draws, *rates, last)
            else:
                others = rows_of_others(config, context, state.guidance, number)
                terms = state.graphs(x, y, draws, *rates, last, at_least=others)
        state.step += 1
        run.elapsed += time.perf_counter() - began
        yield terms

        run.readback.push(state.step, terms)
        report(run, log)
        if signals.agreed or config.checkpoint_due(state.step):
            save(run, log)
        draw_due(run, log)
        score_due(run, log)
    save(run, log)  # also when a signal came while a checkpoint or a picture was written


def save(run: Run, log: Log | None) -> None:
    """Writes a checkpoint of the step just done, unless there is one."""
    report(run, log, wait=True)  # never a checkpoint of steps that were not checked
    if run.state.step != run.saved:
        save_run(run)
        run.saved = run.state.step

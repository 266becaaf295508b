"""Log of a run: metrics.jsonl, TensorBoard, Weights & Biases, the progress bar; numbers leaving the device.

A run's folder: config.json, metrics.jsonl, figures.jsonl, results.json, extractor.safetensors, checkpoints/,
samples/, tensorboard/, .lock.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from imf.io import naming, replacing
from imf.program import UserError, progress
from imf.training.config import TrainConfig, ema_decay, learning_rate

if TYPE_CHECKING:  # for the annotations
    from imf.training.state import Run

BAR = "{desc} {percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}, {elapsed}<{remaining}{postfix}"
TERMS = ("loss", "loss_u", "loss_v", "gradient norm")  # the numbers that a training step returns


def check_finite(step: int, terms: list[float]) -> None:
    """Raises UserError, naming them, unless all TERMS of step number `step` are finite."""
    named = dict(zip(TERMS, terms, strict=True))
    if bad := [f"{name} is {value}" for name, value in named.items() if not math.isfinite(value)]:
        fine = [f"{name} {value:.4g}" for name, value in named.items() if math.isfinite(value)]
        raise UserError(
            f"stopped at step {step}: {', '.join(bad)} (finite: {', '.join(fine) or 'none'}). Nothing of it "
            f"went into the weights. Resuming repeats its draws; a new run with a lower --lr, or --precision "
            f"fp32, may get past it."
        )


def report(run: Run, log: Log | None, wait: bool = False) -> None:
    """Logs the steps whose numbers have arrived; the one collective by which a step's hosts agree."""
    with run.context.together(run.signals):
        for step, terms in run.readback.pop(wait):
            check_finite(step, terms)
            if log is not None:
                log.add(step, terms, run.elapsed)


@contextmanager
def opened_log(run: Run) -> Iterator[Log | None]:
    """Opens the log in the first process, None in the others, and closes it in the end."""
    with run.context.together():
        log = Log(run.folder, run.config, run.state.step, run.elapsed) if run.context.first else None
    try:
        yield log
    except BaseException:
        if log is not None:
            with suppress(OSError):  # the error that came first says more
                log.close()
        raise
    with run.context.together():
        if log is not None:
            log.close()


def truncate_metrics(path: Path, step: int) -> int:
    """Drops lines past `step`, which a resumed run writes again, a half-written line at the end, and lines
    that are not metrics; returns the number of the last.

    Raises: UserError if it is not a file, OSError if it cannot be read or written.
    """
    if not path.exists():
        return 0
    if not path.is_file():
        raise UserError(f"{path}: must be a file, got a folder or a device; move it away")
    kept, foreign = bytearray(), 0
    *lines, _ = path.read_bytes().split(b"\n")  # the last one has no end: empty, or half-written
    for line in lines:
        try:
            number = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError, RecursionError):
            number = None
        if type(number) is not int:
            foreign += 1
        elif number <= step:
            kept += line + b"\n"
    with naming(path), replacing(path) as temporary:
        temporary.write_bytes(kept)
    return foreign


class Readback:
    """Queue of small vectors copied from device to host, in order; waits for a GPU only when asked to."""

    def __init__(self) -> None:
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def push(self, step: int, terms: Tensor) -> None:
        """Starts the copy of `terms`, those of step number `step`."""
        event = None
        if terms.is_cuda:
            host = torch.empty(terms.shape, dtype=terms.dtype, pin_memory=True)
            terms = host.copy_(terms, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((step, terms, event))

    def pop(self, wait: bool = False) -> Iterator[tuple[int, list[float]]]:
        """Yields those that have arrived; with `wait`, all."""
        while self._pending:
            step, terms, event = self._pending[0]
            if event is not None and not event.query():
                if not wait:
                    return
                event.synchronize()
            self._pending.popleft()
            yield step, terms.tolist()


def wandb_module() -> Any:
    """Imports the package of Weights & Biases; UserError if it is not installed."""
    try:
        import wandb  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise UserError(
            f"--wandb needs the package wandb ({error}): pip install -e '.[wandb]', or leave it out"
        ) from error
    return wandb


def _wandb_id(path: Path, wandb: Any) -> str:
    """Returns the run's id there, made by the first process and kept in a file; UserError if damaged."""
    if not path.exists():
        with naming(path), replacing(path) as temporary:
            temporary.write_text(wandb.util.generate_id())
    found = path.read_bytes().decode(errors="replace")
    if not re.fullmatch(r"[\w-]{1,64}", found):
        raise UserError(f"{path}: must be the name of a run, got {found[:64]!r}; delete it to begin another")
    return found


class Boards:
    """TensorBoard and Weights & Biases, as far as a configuration asks for them; call `close` in the end.

    purge: the step from which on a resumed run writes TensorBoard's events again; None to add to them.
    """

    def __init__(self, folder: Path, config: TrainConfig, purge: int | None = None) -> None:
        self._events, self._board, self._wandb = folder / "tensorboard", None, None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # importing it takes a second

            with naming(self._events):
                self._board = SummaryWriter(str(self._events), purge_step=purge)
        if config.wandb:  # online or offline as its own variable WANDB_MODE says
            self._module = wandb_module()
            self._wandb = self._module.init(
                project=config.wandb,
                name=folder.name,
                dir=str(folder),
                config=asdict(config),
                id=_wandb_id(folder / "wandb-id", self._module),
                resume="allow",
            )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Writes numbers by name."""
        if self._board is not None:
            with naming(self._events):
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Writes the picture in a PNG of the run."""
        if self._board is None and self._wandb is None:
            return
        with Image.open(path) as file:
            picture = file.convert("RGB")
        if self._board is not None:
            with naming(self._events):
                self._board.add_image(name, np.asarray(picture), step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.log({name: self._module.Image(picture)}, step=step)

    def close(self) -> None:
        """Writes what is left; OSError, naming the folder, if that cannot be written."""
        if self._wandb is not None:
            self._wandb.finish()
        if self._board is not None:
            with naming(self._events):
                self._board.close()


class Log:
    """Progress bar, metrics.jsonl, figures.jsonl and `boards`; call `close` in the end.

    A line of metrics.jsonl holds `step` (steps done), `loss`, `loss_u`, `loss_v` and `gradient_norm`, means
    over the steps since the line before, `lr` and `ema_decay` of that step, `images_per_second` and
    `elapsed`, seconds of training, without sampling and checkpoints. One of figures.jsonl holds `step`,
    `samples` and the figures of these samples, see `imf.evaluation.quality`.
    """

    def __init__(self, folder: Path, config: TrainConfig, step: int, elapsed: float) -> None:
        self.config = config
        self._sums, self._steps, self._since = np.zeros(len(TERMS)), 0, elapsed
        self._metrics, self._figures = folder / "metrics.jsonl", folder / "figures.jsonl"
        truncate_metrics(self._figures, step)
        self._file = self._metrics.open("a", buffering=1)  # by line: a killed run loses none
        self.boards = Boards(folder, config, purge=step + 1)
        self._bar: tqdm[Any] = progress(
            None, folder.name, "step", total=config.steps, initial=step, bar_format=BAR
        )

    def close(self) -> None:
        """Writes what is left; OSError, naming the file, if that cannot be written."""
        self._bar.close()
        try:
            with naming(self._metrics):
                self._file.close()
        finally:
            self.boards.close()

    def has_figures(self, step: int) -> bool:
        """Tells whether figures.jsonl has those of step number `step`."""
        if not self._figures.exists():
            return False
        return any(json.loads(line)["step"] == step for line in self._figures.read_text().splitlines())

    def add_figures(self, step: int, samples: int, figures: Mapping[str, float], text: str) -> None:
        """Writes the figures of the network after step number `step`, and shows them as `text`."""
        with naming(self._figures), self._figures.open("a") as file:
            file.write(json.dumps({"step": step, "samples": samples, **figures}) + "\n")
        self.boards.scalars({f"figures/{name}": value for name, value in figures.items()}, step)
        self._bar.write(text, file=sys.stderr)

    def add(self, step: int, terms: list[float], elapsed: float) -> None:
        """Adds the terms of step number `step`, after `elapsed` seconds; writes a line if it is due."""
        self._sums += terms
        self._steps += 1
        if step % self.config.log_every == 0 or step == self.config.steps:
            self._write(step, elapsed)
        self._bar.update()

    def _write(self, step: int, elapsed: float) -> None:
        means = (self._sums / self._steps).tolist()
        images_per_second = self._steps * self.config.batch_size / max(elapsed - self._since, 1e-9)
        values = {
            **{name.replace(" ", "_"): mean for name, mean in zip(TERMS, means, strict=True)},
            "lr": learning_rate(self.config, step - 1),
            "ema_decay": ema_decay(self.config, step - 1),
            "images_per_second": round(images_per_second, 1),
            "elapsed": round(elapsed, 3),
        }
        with naming(self._metrics):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
        self.boards.scalars(values, step)
        shown = (
            f"{images_per_second:.0f} images/s, loss_u {values['loss_u']:.4f}, loss_v {values['loss_v']:.4f}"
        )
        self._bar.set_postfix_str(shown, refresh=False)
        self._sums, self._steps, self._since = np.zeros(len(TERMS)), 0, elapsed

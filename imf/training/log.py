"""What surrounds the training loop: the run's folder, metrics, stop signals, numbers leaving the device.

A run's folder: config.json, metrics.jsonl, results.json, checkpoints/, samples/, tensorboard/; .lock while a
process writes to it.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from imf.io import naming, replacing
from imf.program import UserError
from imf.training.config import TrainConfig, ema_decay, learning_rate, to_dict

BAR = "{desc} {percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}, {elapsed}<{remaining}{postfix}"
TERMS = ("loss", "loss_u", "loss_v", "gradient norm")  # what a training step reports


def create_folder(config: TrainConfig) -> Path:
    """A new, empty folder for a run: `<runs>/<name>`, or the name of the data with the first free number.

    Raises: UserError if a name was given and its folder is taken, or `runs` cannot be a folder.
    """
    runs = Path(config.runs)
    try:
        runs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--runs must be a folder or a path where one can be made, got {runs} ({error.strerror})"
        ) from error
    number, data = 1, Path(config.data).resolve().name
    while True:
        folder = runs / (config.name or (data if number == 1 else f"{data}-{number}"))
        try:
            folder.mkdir()
            break
        except FileExistsError:
            if config.name:
                raise UserError(
                    f"{folder} exists already; continue it with --resume {folder}, or choose another --name"
                ) from None
            number += 1
        except OSError as error:
            raise UserError(
                f"{folder} could not be made ({error.strerror}); choose another --runs or --name"
            ) from error
    (folder / "checkpoints").mkdir()
    (folder / "samples").mkdir()
    return folder


def newest(runs: Path) -> Path:
    """The run in `runs` that wrote a checkpoint last; UserError if there is none."""
    checkpoints = [path for path in runs.glob("*/checkpoints/step-*.safetensors") if path.is_file()]
    if not checkpoints:
        raise UserError(
            f"--resume: no checkpoint in {runs}/*/checkpoints; pass a run's folder or a checkpoint"
        )
    return max(checkpoints, key=lambda path: path.stat().st_mtime).parent.parent


def not_finite(step: int, terms: list[float]) -> str:
    """Why training stopped: which of the TERMS of step number `step` are not finite."""
    named = dict(zip(TERMS, terms, strict=True))
    bad = ", ".join(f"{name} is {value}" for name, value in named.items() if not math.isfinite(value))
    fine = ", ".join(f"{name} {value:.4g}" for name, value in named.items() if math.isfinite(value))
    return (
        f"stopped at step {step}: {bad}{f' ({fine})' if fine else ''}. Nothing of it went into the weights. "
        f"Going on repeats its draws; a new run with a lower --lr, or --precision fp32, may get past it."
    )


def how_to_go_on(folder: Path, checkpoints: list[Path], processes: int = 1) -> str:
    """The last of a run's checkpoints and the command that resumes from it."""
    if not checkpoints:
        return f"No checkpoint had been written to {folder}."
    start = ["python"] if processes == 1 else ["torchrun", "--nproc-per-node", str(processes)]
    command = shlex.join([*start, "-m", "imf.train", "--resume", str(folder)])
    return f"Last good checkpoint: {checkpoints[-1]}\nGo on with: {command}"


def truncate_metrics(path: Path, step: int) -> int:
    """Drop the lines past `step`, which a resumed run writes again, what a killed run left half-written at
    the end, and all lines that are no metrics; returns how many of those there were.

    Raises: UserError if it is no file, OSError if it cannot be read or written.
    """
    if not path.exists():
        return 0
    if not path.is_file():
        raise UserError(f"{path}: must be a file, got a folder or a device; move it away")
    kept, foreign = [], 0
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            if type(values["step"]) is not int:
                raise ValueError("no number of a step")
        except (ValueError, TypeError, KeyError, RecursionError):
            foreign += number < len(lines)  # the last one has no end: empty, or half-written
            continue
        if values["step"] <= step:
            kept.append(line + b"\n")
    with naming(path), replacing(path) as temporary:
        temporary.write_bytes(b"".join(kept))
    return foreign


class Readback:
    """Small vectors on their way from device to host, in order; waits for a GPU only when asked to."""

    def __init__(self) -> None:
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def push(self, step: int, terms: Tensor) -> None:
        """Send `terms`, those of step number `step`, on their way."""
        event = None
        if terms.is_cuda:
            terms = torch.empty(terms.shape, dtype=terms.dtype, pin_memory=True).copy_(
                terms, non_blocking=True
            )
            event = torch.cuda.Event()
            event.record()
        self._pending.append((step, terms, event))

    def pop(self, wait: bool = False) -> Iterator[tuple[int, list[float]]]:
        """Those that have arrived; with `wait`, all."""
        while self._pending:
            step, terms, event = self._pending[0]
            if event is not None and not event.query():
                if not wait:
                    return
                event.synchronize()
            self._pending.popleft()
            yield step, terms.tolist()


def wandb_module() -> Any:
    """The package of Weights & Biases; UserError if it is not installed."""
    try:
        import wandb  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise UserError(
            f"--wandb needs the package wandb ({error}): pip install -e '.[wandb]', or leave it out"
        ) from error
    return wandb


def _wandb_id(path: Path, wandb: Any) -> str:
    """The run's name there, made up by the first process and kept; UserError for a damaged file."""
    if not path.exists():
        with naming(path), replacing(path) as temporary:
            temporary.write_text(wandb.util.generate_id())
    found = path.read_bytes().decode(errors="replace")
    if not re.fullmatch(r"[\w-]{1,64}", found):
        raise UserError(f"{path}: must be the name of a run, got {found[:64]!r}; delete it to begin another")
    return found


class Log:
    """Progress bar, metrics.jsonl, TensorBoard and Weights & Biases; `close` it in the end.

    A line of metrics.jsonl holds `step` (steps done), `loss`, `loss_u`, `loss_v` and `gradient_norm`, means
    over the steps since the line before, `lr` and `ema_decay` of that step, `images_per_second` and
    `elapsed`, seconds of training, without sampling and checkpoints.
    """

    def __init__(self, folder: Path, config: TrainConfig, step: int, elapsed: float) -> None:
        self.config = config
        self.elapsed = elapsed
        self._sums = [0.0] * len(TERMS)
        self._steps, self._since = 0, elapsed
        self._metrics, self._events = folder / "metrics.jsonl", folder / "tensorboard"
        self._file = self._metrics.open("a", buffering=1)  # by line: a killed run loses none
        self._board = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # importing it takes a second

            with naming(self._events):
                self._board = SummaryWriter(str(self._events), purge_step=step + 1)
        self._wandb = None
        if config.wandb:  # online or offline as its own variable WANDB_MODE says
            wandb = wandb_module()
            self._wandb = wandb.init(
                project=config.wandb,
                name=folder.name,
                dir=str(folder),
                config=to_dict(config),
                id=_wandb_id(folder / "wandb-id", wandb),
                resume="allow",
            )
        self._bar = tqdm(
            total=config.steps,
            initial=step,
            desc=folder.name,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10,
            bar_format=BAR,
        )

    def close(self) -> None:
        """Write what is left; OSError, naming the file, if that cannot be written."""
        self._bar.close()
        if self._wandb is not None:
            self._wandb.finish()
        try:
            with naming(self._metrics):
                self._file.close()
        finally:
            if self._board is not None:
                with naming(self._events):
                    self._board.close()

    def add(self, step: int, terms: list[float]) -> None:
        """Count in the terms of the step that made `step` steps done; write a line where one is due."""
        self._sums = [total + term for total, term in zip(self._sums, terms, strict=True)]
        self._steps += 1
        if step % self.config.log_every == 0 or step == self.config.steps:
            self._write(step)
        self._bar.update()

    def _write(self, step: int) -> None:
        loss, loss_u, loss_v, gradient_norm = (total / self._steps for total in self._sums)
        images_per_second = self._steps * self.config.batch_size / max(self.elapsed - self._since, 1e-9)
        line = {
            "step": step,
            "loss": loss,
            "loss_u": loss_u,
            "loss_v": loss_v,
            "gradient_norm": gradient_norm,
            "lr": learning_rate(self.config, step - 1),
            "ema_decay": ema_decay(self.config, step - 1),
            "images_per_second": round(images_per_second, 1),
            "elapsed": round(self.elapsed, 3),
        }
        with naming(self._metrics):
            self._file.write(json.dumps(line) + "\n")
        if self._board is not None:
            with naming(self._events):
                for name, value in line.items():
                    if name != "step":
                        self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({name: value for name, value in line.items() if name != "step"}, step=step)
        self._bar.set_postfix_str(
            f"{images_per_second:.0f} images/s, loss_u {loss_u:.4f}, loss_v {loss_v:.4f}", refresh=False
        )
        self._sums = [0.0] * len(TERMS)
        self._steps, self._since = 0, self.elapsed

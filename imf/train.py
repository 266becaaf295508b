"""Training: draws -> objective -> backward -> AdamW -> moving average. `python -m imf.train` runs it."""

from __future__ import annotations

import argparse
import copy
import math
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from imf import checkpoint, data
from imf.checkpoint import CheckpointError, Metadata
from imf.config import (
    RESUMABLE,
    TrainConfig,
    add_arguments,
    differences,
    ema_decay,
    learning_rate,
    to_dict,
    with_arguments,
)
from imf.draws import Draws
from imf.methods import objective
from imf.model import IMF, build
from imf.presets import PRESETS, preset_of
from imf.run import (
    Log,
    Readback,
    StopSignals,
    TrainingError,
    choose_device,
    create_folder,
    how_to_go_on,
    naming,
    newest,
    not_finite,
    truncate_metrics,
    write_json,
)
from imf.sample import class_grid
from imf.scores import evaluate, table
from imf_kernels import gemm


@dataclass
class State:
    """All that training changes; model and ema are one network with different weights.

    found_inf: [] fp32 on the device, 0 until a loss or gradient is not finite, then 1 for good: from then on
    weights, moments and average stay as they are, so the host may learn of it some steps later.
    step: optimizer steps done.
    """

    model: IMF
    ema: IMF
    optimizer: torch.optim.Optimizer
    found_inf: Tensor
    step: int = 0


@dataclass
class Run:
    """A run: its state, and what stays. precision: "fp32" or "bf16"; elapsed: seconds of training so far."""

    folder: Path
    config: TrainConfig
    precision: str
    data: data.LabelledImages
    state: State
    elapsed: float = 0.0


def initial_state(config: TrainConfig, precision: str, device: torch.device) -> State:
    """Network, moving average and optimizer before the first step: a function of the configuration's seed."""
    torch.manual_seed(config.seed)
    model = build(config.network)
    model.compute_dtype = checkpoint.DTYPES[precision]
    model.backend = None if config.backend == "auto" else config.backend
    model.to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    found_inf = torch.zeros((), device=device)
    optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # where fused AdamW looks for its gate
    return State(model, ema, optimizer, found_inf)


def training_step(state: State, images: data.LabelledImages, config: TrainConfig) -> Tensor:
    """One update of `state` in place; returns what `imf.run.TERMS` names, [4] fp32 on the device."""
    terms = torch.zeros(3, device=state.found_inf.device)
    loss_of = objective(config.method, config.fixed_guidance)
    for micro_step in range(state.step * config.accumulate, (state.step + 1) * config.accumulate):
        rows = data.batch_indices(len(images), config.micro_batch_size, seed=config.seed, step=micro_step)
        x, y = images.images[rows], images.labels[rows]

        draws = Draws.sample(x, seed=config.seed, step=micro_step, **config.draws)
        out = loss_of(state.model, x, y, draws)
        (out.loss / config.accumulate).backward()

        terms += torch.stack([out.loss.detach(), out.loss_u, out.loss_v]) / config.accumulate

    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    terms = torch.cat([terms, nn.utils.get_total_norm(gradients)[None]])
    state.found_inf.logical_or_(~terms.isfinite().all())  # once 1, the two updates below change nothing

    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.step)
    state.optimizer.step()
    state.optimizer.zero_grad()
    update_ema(state.ema, state.model, ema_decay(config, state.step), state.found_inf)
    state.step += 1
    return terms


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, found_inf: Tensor) -> None:
    """ema <- ema + (1 - decay) (model - ema) for every weight in fp32; nothing if found_inf, [], is 1."""
    averages: list[Tensor] = list(ema.parameters())
    weights: list[Tensor] = list(model.parameters())
    change = torch._foreach_sub(weights, averages)
    torch._foreach_mul_(change, (1 - decay) * (1 - found_inf))
    torch._foreach_add_(averages, change)


def fit(run: Run) -> int | None:
    """Train until `steps`, or until SIGINT or SIGTERM, and save; returns the signal's number if one came.

    Raises: TrainingError at a step that is not finite; CheckpointError if a checkpoint cannot be written;
    OSError if another file cannot, after a checkpoint.
    """
    config, state = run.config, run.state
    arriving, saved = Readback(), state.step

    def check(log: Log | None, wait: bool = False) -> None:
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

    with StopSignals() as stop:
        try:
            with Log(run.folder, config, state.step, run.elapsed) as log:
                while state.step < config.steps and stop.received is None:
                    began = time.perf_counter()
                    terms = training_step(state, run.data, config)
                    run.elapsed = log.elapsed = run.elapsed + time.perf_counter() - began
                    arriving.push(state.step, terms)
                    check(log)

                    if _due(state.step, config.checkpoint_every):
                        save_checked(log)
                    ends = state.step == config.steps or stop.received is not None
                    if not ends and _due(state.step, config.sample_every):
                        draw(run, run.folder / "samples" / f"step-{state.step:08d}.png")
                save_checked(log)  # also when a signal came while a checkpoint or a picture was written
        except OSError as error:  # a full disk met by the metrics or a picture: the steps are worth keeping
            try:
                save_checked(None)
            except CheckpointError as second:
                raise CheckpointError(f"{error}\n{second}") from error
            raise
    return stop.received


def save(run: Run) -> None:
    """Write a checkpoint of the run as it is, then delete the oldest ones."""
    metadata = Metadata(
        step=run.state.step,
        elapsed=run.elapsed,
        config=run.config,
        precision=run.precision,
        gemm_choices=dict(gemm.choices()),
        environment=checkpoint.environment(run.state.found_inf.device),
    )
    path = checkpoint.path_of(run.folder, run.state.step)
    state = run.state
    checkpoint.save(path, model=state.model, ema=state.ema, optimizer=state.optimizer, metadata=metadata)
    checkpoint.prune(run.folder, run.config.keep_checkpoints)


def draw(run: Run, path: Path, steps: int = 1) -> None:
    """Write a grid of samples of the averaged network, a row per class, always from the same noise."""
    omega, t_min, t_max = run.config.sampling
    picture = class_grid(
        run.state.ema, steps=steps, omega=omega, t_min=t_min, t_max=t_max, seed=run.config.seed
    )
    with naming(path):
        picture.save(path)


def finish(run: Run) -> None:
    """Score the averaged network in 1, 2 and 4 steps, draw samples, write results.json, print the table."""
    config, count = run.config, 180 * run.data.num_classes
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
    write_json(run.folder / "results.json", results)
    print(
        f"\n{table(scores)}\n\n"
        f"{count:,} class-balanced samples of the averaged network (seed {config.seed}) against "
        f"{len(run.data):,} images, pixels in [-1, 1];\n"
        f"omega {omega:g}, interval [{t_min:g}, {t_max:g}]. The run is in {run.folder}\n"
        f"Pictures: {', '.join(map(str, pictures))}"
    )


def begin(config: TrainConfig) -> Run:
    """A new run in its folder; TrainingError if the name is taken or the network does not fit the data."""
    device = choose_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    precision = config.precision
    if precision == "auto":
        dtype = torch.bfloat16 if device.type == "cuda" else gemm.fast_dtype()
        precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    images = _load_data(config, device)
    state = initial_state(config, precision, device)
    run = Run(create_folder(config), config, precision, images, state)
    _write_configuration(run)
    return run


def resume(path: Path, arguments: argparse.Namespace) -> Run:
    """The run of a checkpoint as it was, with the arguments that may change; warns of what changes its bits.

    path: a run's folder, or the newest checkpoint in one.
    Raises: TrainingError for an argument that may not change or is wrong, CheckpointError for a bad file.
    """
    path = checkpoint.find(path).resolve()  # its folder says which run it is of
    metadata = checkpoint.read_metadata(path)
    folder = path.parent.parent  # <run>/checkpoints/<file>
    last = (checkpoint.list_all(folder) or [path])[-1]
    if path.parent.name != "checkpoints" or not path.samefile(last):
        raise TrainingError(
            f"--resume: {path} must be the newest checkpoint of its run, got one beside {last}; "
            f"to go back to it, move the newer ones away first"
        )
    try:
        config = with_arguments(metadata.config, arguments)
    except ValueError as error:
        raise TrainingError(f"--resume: {error}") from error
    for name, (old, new) in differences(metadata.config, config).items():
        if name not in RESUMABLE:
            raise TrainingError(
                f"--resume: {name} is {old!r} in {path}, got {new!r}; a resumed run goes on exactly as it "
                f"began: leave the argument out, or start a new run"
            )
    if config.steps < metadata.step:
        raise TrainingError(
            f"--resume: {path} is at step {metadata.step} already, got --steps {config.steps}"
        )
    if config.steps != metadata.config.steps and config.decay != "constant":
        _warn(f"--steps {config.steps}, not {metadata.config.steps}: the learning rate decays at other steps")

    device = choose_device(config.device)
    torch.set_num_threads(getattr(arguments, "threads", 0) or int(metadata.environment["threads"]))
    for name, now in checkpoint.environment(device).items():
        if metadata.environment.get(name) != now:
            was = metadata.environment.get(name)
            _warn(f"{name} was {was}, now it is {now}: the run goes on, but not to the same bits")

    try:  # before the first product: another choice rounds differently
        gemm.load_choices(metadata.gemm_choices)
    except ValueError as error:
        raise TrainingError(f"--resume: {path} cannot go on exactly here: {error}") from error
    images = _load_data(config, device)
    state = initial_state(config, metadata.precision, device)
    checkpoint.load(path, model=state.model, ema=state.ema, optimizer=state.optimizer)
    state.step = metadata.step
    run = Run(folder, config, metadata.precision, images, state, metadata.elapsed)
    (folder / "samples").mkdir(exist_ok=True)  # a checkpoint may have been copied into a folder of its own
    checkpoint.remove_temporaries(folder)
    truncate_metrics(folder / "metrics.jsonl", state.step)
    _write_configuration(run)
    return run


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
    run = None
    try:
        if arguments.resume is None:
            try:
                config = with_arguments(preset, arguments)
            except ValueError as error:
                parser.error(str(error))
            run = begin(config)
        else:
            if "preset" in arguments:
                parser.error("--preset is for new runs; a resumed one goes on with its own settings")
            runs = Path(getattr(arguments, "runs", TrainConfig().runs))
            run = resume(Path(arguments.resume) if arguments.resume else newest(runs), arguments)
        received = fit(run)
        if received is None:
            finish(run)
            return 0
    except KeyboardInterrupt:
        received = signal.SIGINT
    except (TrainingError, CheckpointError, OSError) as error:
        print(f"\nimf.train: {error}", file=sys.stderr)
        if run is not None:
            print(how_to_go_on(run.folder, checkpoint.list_all(run.folder)), file=sys.stderr)
        return 1
    if run is not None:
        print(f"\nStopped after step {run.state.step} of {run.config.steps}.", file=sys.stderr)
        print(how_to_go_on(run.folder, checkpoint.list_all(run.folder)), file=sys.stderr)
    return 128 + received


def _load_data(config: TrainConfig, device: torch.device) -> data.LabelledImages:
    """The data set on the device; TrainingError if the network was made for another shape."""
    images, network = data.load(config.data), config.network
    if not isinstance(images, data.LabelledImages):
        raise TrainingError(f"--data must be images that fit into memory, got {config.data}")
    wanted = (images.images.shape[1], images.images.shape[2], images.num_classes)
    got = (network.in_channels, network.input_size, network.num_classes)
    if got != wanted:
        names = "in_channels, input_size and num_classes"
        raise TrainingError(f"network: {names} must be {wanted} for the {config.data}, got {got}")
    return images.to(device)


def _write_configuration(run: Run) -> None:
    environment = checkpoint.environment(run.state.found_inf.device)
    values = {"config": to_dict(run.config), "precision": run.precision, "environment": environment}
    write_json(run.folder / "config.json", values)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _warn(text: str) -> None:
    print(f"imf.train: warning: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

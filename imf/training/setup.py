"""How a run begins: a new one from its configuration, or one that goes on from a checkpoint."""

from __future__ import annotations

import argparse
import copy
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from imf import data
from imf.distributed import Processes, choose_device
from imf.io import write_json
from imf.model.imf import IMF
from imf.networks import build
from imf.program import UserError
from imf.training import checkpoint
from imf.training.checkpoint import Metadata
from imf.training.config import RESUMABLE, ROUNDING, TrainConfig, differences, to_dict, with_arguments
from imf.training.graphs import StepGraphs
from imf.training.log import (
    create_folder,
    newest,
    truncate_metrics,
    wandb_module,
)
from imf.training.parallel import prepare
from imf_kernels.backends import cpu


@dataclass
class State:
    """All that training changes; model and ema are one network with different weights.

    engine: what is called in the model's place, DDP around it or the model itself.
    found_inf: [] fp32 on the device, 0 until a loss or gradient is not finite, then 1 for good: from then on
    weights, moments and average stay as they are, so the host may learn of it some steps later.
    step: optimizer steps done.
    graphs: the step as CUDA graphs, made in the first one, where they are asked for.
    """

    model: IMF
    ema: IMF
    engine: nn.Module
    optimizer: torch.optim.Optimizer
    found_inf: Tensor
    step: int = 0
    graphs: StepGraphs | None = None


@dataclass
class Run:
    """A run: its state, and what stays. precision: "fp32" or "bf16"; elapsed: seconds of training so far."""

    folder: Path
    config: TrainConfig
    precision: str
    data: data.DataSet
    state: State
    processes: Processes = field(default_factory=Processes)
    elapsed: float = 0.0


def initial_state(config: TrainConfig, precision: str, who: Processes) -> State:
    """Network, moving average and optimizer before the first step, on this process's device: a function of
    the configuration's seed, the same in every process."""
    torch.manual_seed(config.seed)
    model = build(config.network)
    model.compute_dtype = checkpoint.DTYPES[precision]
    if not (who.grouped and config.sharding == "fsdp"):  # which moves block by block, and only its part
        model.to(who.device)
    ema = copy.deepcopy(model).requires_grad_(False)
    engine = prepare(
        model,
        ema,
        sharding=config.sharding if who.grouped else None,
        device=who.device,
        compile=config.compile,
        checkpointing=config.checkpointing,
    )
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
        capturable=config.cuda_graphs,
    )
    found_inf = torch.zeros((), device=who.device)
    optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # where fused AdamW looks for its gate
    return State(model, ema, engine, optimizer, found_inf)


def begin(config: TrainConfig, who: Processes | None = None) -> Run:
    """A new run in its folder; UserError if the name is taken or the network does not fit the data."""
    who = who or Processes(device=choose_device(config.device))
    if config.threads:
        torch.set_num_threads(config.threads)
    precision = config.precision
    if precision == "auto":
        if who.device.type == "cuda":
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            bf16 = "avx512_bf16" in cpu.instruction_sets()
        precision = who.from_first("bf16" if bf16 else "fp32")
    with who.together():
        _check_processes(config, who)
        images = _load_data(config)
        try:
            checkpoint.empty_weights(config.network)
        except ValueError as error:
            raise UserError(str(error)) from error
    state = initial_state(config, precision, who)
    with who.together():
        if config.init_from:
            try:
                source = checkpoint.find(Path(config.init_from))
                checkpoint.load_weights(source, model=state.model, ema=state.ema)
            except UserError as error:
                raise UserError(f"--init-from: {error}") from error
    folder = None
    with who.together():
        if who.first:
            folder = create_folder(config)
    run = Run(who.from_first(folder), config, precision, images, state, who)
    _write_configuration(run)
    return run


def resume(path: Path | None, arguments: argparse.Namespace, who: Processes | None = None) -> Run:
    """The run of a checkpoint as it was, with the arguments that may change; warns of what changes its bits.

    path: a run's folder, or the newest checkpoint in one; None for the run that wrote one last.
    Raises: UserError for an argument that may not change or is wrong, UserError for a bad file.
    """
    who = who or Processes(device=choose_device(device_of(path, arguments)))
    with who.together():
        path = _found(path, arguments)
        folder = _run_of(path)
        metadata = checkpoint.read_metadata(path)
        config = _resumed_config(path, folder, metadata, arguments)
        _check_processes(config, who)
        found = _load_data(config)
        if found.autoencoder != metadata.autoencoder:
            raise UserError(
                f"--resume: the latents in {config.data} are of another autoencoder than those that {folder} "
                f"was trained on: start a new run, or prepare them again as they were"
            )
    torch.set_num_threads(getattr(arguments, "threads", 0) or int(metadata.environment["threads"]))
    if who.first:
        _warn_of_other_bits(metadata, config, who)
    state = initial_state(config, metadata.precision, who)
    with who.together():
        checkpoint.load(path, model=state.model, ema=state.ema, optimizer=state.optimizer)
        if who.first:
            (folder / "samples").mkdir(exist_ok=True)  # a checkpoint may have been copied to a new folder
            checkpoint.remove_temporaries(folder)
            if dropped := truncate_metrics(folder / "metrics.jsonl", metadata.step):
                _warn(f"{folder / 'metrics.jsonl'}: {dropped} line(s) that are no metrics are dropped")
    state.step = metadata.step
    run = Run(folder, config, metadata.precision, found, state, who, metadata.elapsed)
    _write_configuration(run)
    return run


def folder_of(path: Path | None, arguments: argparse.Namespace) -> Path:
    """The folder of the run that is to be resumed; raises as `resume` does."""
    return _run_of(_found(path, arguments))


def device_of(path: Path | None, arguments: argparse.Namespace) -> str:
    """The --device of a run that is to be resumed: the argument, or as it was; raises as `resume` does."""
    if "device" in arguments:
        return arguments.device
    return checkpoint.read_metadata(_found(path, arguments)).config.device


def _found(path: Path | None, arguments: argparse.Namespace) -> Path:
    """The checkpoint to resume from."""
    runs = Path(getattr(arguments, "runs", TrainConfig().runs))
    return checkpoint.find(path or newest(runs))


def _run_of(path: Path) -> Path:
    """The folder of the run that a checkpoint is of; UserError if it lies in none."""
    folder = checkpoint.run_of(path)
    if folder is None:
        raise UserError(
            f"--resume: {path} must be a checkpoint in a run's folder, <run>/checkpoints/step-….safetensors, "
            f"or a link to one; --init-from begins a new run with the weights of any"
        )
    return folder


def _resumed_config(
    path: Path, folder: Path, metadata: Metadata, arguments: argparse.Namespace
) -> TrainConfig:
    """The configuration of a checkpoint with the arguments given; UserError if they do not fit."""
    last = checkpoint.list_all(folder)[-1]
    if not path.samefile(last):
        raise UserError(
            f"--resume: {path} must be the newest checkpoint of its run, got one beside {last}; "
            f"to go back to it, move the newer ones away first"
        )
    try:
        config = with_arguments(metadata.config, arguments)
    except ValueError as error:
        raise UserError(f"--resume: {error}") from error
    for name, (old, new) in differences(metadata.config, config).items():
        if name not in RESUMABLE:
            raise UserError(
                f"--resume: {name} is {old!r} in {path}, got {new!r}; a resumed run goes on exactly as it "
                f"began: leave the argument out, or start a new run"
            )
    if config.steps < metadata.step:
        raise UserError(f"--resume: {path} is at step {metadata.step} already, got --steps {config.steps}")
    return config


def _warn_of_other_bits(metadata: Metadata, config: TrainConfig, who: Processes) -> None:
    if config.steps != metadata.config.steps and config.decay != "constant":
        _warn(f"--steps {config.steps}, not {metadata.config.steps}: the learning rate decays at other steps")
    before = metadata.environment | _rounding(metadata.config)
    for name, now in (checkpoint.environment(who.device, who.count) | _rounding(config)).items():
        if before.get(name) != now:
            _warn(f"{name} was {before.get(name)}, now it is {now}: it goes on, but not to the same bits")


def fitted_to_data(config: TrainConfig) -> TrainConfig:
    """The configuration with a network of the input size, channels and classes of its data."""
    found = _open_data(config)
    channels, size, _ = found.shape
    classes = found.num_classes
    try:
        network = replace(config.network, in_channels=channels, input_size=size, num_classes=classes)
        return replace(config, network=network)
    except ValueError as error:  # patches that do not divide the input
        raise UserError(f"--data {config.data}: {error}") from error


def _open_data(config: TrainConfig) -> data.DataSet:
    try:
        return data.load(config.data)
    except UserError as error:
        raise UserError(f"--data: {error}") from error


def _load_data(config: TrainConfig) -> data.DataSet:
    """The data set; UserError if there is none, or the network was made for another shape."""
    found, network = _open_data(config), config.network
    channels, height, width = found.shape
    wanted = (channels, height, width, found.num_classes)
    got = (network.in_channels, network.input_size, network.input_size, network.num_classes)
    if got != wanted:
        names = "in_channels, input_size (height and width) and num_classes"
        raise UserError(f"network: {names} must be {wanted} for the data {config.data}, got {got}")
    if config.sample_every and channels not in (1, 3):
        raise UserError(
            f"--sample-every must be 0 for latents, which python -m imf.sample decodes, "
            f"got {config.sample_every}"
        )
    return found


def _check_processes(config: TrainConfig, who: Processes) -> None:
    if config.micro_batch_size % who.count:
        raise UserError(
            f"--batch-size / --accumulate must be a multiple of the {who.count} processes, "
            f"got {config.batch_size} / {config.accumulate} = {config.micro_batch_size}"
        )
    if config.cuda_graphs and (who.grouped or who.device.type != "cuda"):
        got = f"{who.count} processes" if who.grouped else f"one on {who.device}"
        raise UserError(f"--cuda-graphs must be one process on a GPU, without torchrun; got {got}")
    if config.sharding == "fsdp" and not who.grouped:
        raise UserError("--sharding fsdp needs processes: start with torchrun, also a single one")
    if config.wandb and who.first:
        wandb_module()


def _rounding(config: TrainConfig) -> dict[str, str]:
    return {name: str(getattr(config, name)) for name in ROUNDING}


def _write_configuration(run: Run) -> None:
    environment = checkpoint.environment(run.processes.device, run.processes.count)
    values = {"config": to_dict(run.config), "precision": run.precision, "environment": environment}
    with run.processes.together():
        if run.processes.first:
            write_json(run.folder / "config.json", values)


def _warn(text: str) -> None:
    print(f"imf.train: warning: {text}", file=sys.stderr)

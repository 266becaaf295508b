"""Start of a run: a new one from its configuration, or one that resumes from a checkpoint."""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imf import data, random
from imf.adapted import Adapted, AdaptedConfig
from imf.distributed import DistributedContext, choose_device
from imf.evaluation import inception
from imf.evaluation.scores import EXTRACTORS, Judge
from imf.io import write_json
from imf.mean_flow.methods import guidance_of
from imf.mean_flow.objective import Objective, objective
from imf.model.config import IMFConfig, config_of, divisors, patch_size_for
from imf.model.pretrained import PRECISIONS, Sampling, empty_weights
from imf.networks import build
from imf.objective.draws import Guidance
from imf.program import StopSignals, UserError
from imf.training import checkpoint
from imf.training.adamw import AdamW
from imf.training.checkpoint import Metadata
from imf.training.config import RESUMABLE, ROUNDING, TrainConfig, differences, to_dict, with_arguments
from imf.training.graphs import StepGraphs
from imf.training.log import truncate_metrics, wandb_module
from imf.training.parallel import blocks, local, wrap_for_training
from imf_kernels.backends import cpu, triton_launch
from imf_kernels.backends.moving_average import MovingAverage

OWN = "custom: "  # begins the name of data that are an object in Python
MEMBERS = ("__len__", "shape", "num_classes", "class_names", "autoencoder")  # of a data set, beside fetch


@dataclass
class State:
    """Everything that training changes; model and ema are one network with different weights.

    wrapped: the module that the objective calls, DDP around the model or the model itself.
    objective: called as objective(wrapped, x, y, draws).  guidance: of a method without ω as an input.
    found_inf: [] fp32 on the device, 0 until a loss or gradient is not finite, then 1 for good: from then on
        weights, moments and average stay as they are, so the host may learn of it some steps later.
    step: optimizer steps done.  graphs: its micro-steps as CUDA graphs, if asked for.  stream: captures them.
    terms: [3] fp32 on the device, loss, loss_u and loss_v of the micro-batches since the last step.
    """

    model: Any
    ema: Any
    wrapped: nn.Module
    objective: Objective
    guidance: Guidance | None
    optimizer: torch.optim.Optimizer
    found_inf: Tensor
    step: int = 0
    graphs: StepGraphs | None = None
    stream: torch.cuda.Stream | None = None

    def __post_init__(self) -> None:
        self.parameters = list(self.model.parameters())
        self.terms = torch.zeros(3, device=self.found_inf.device)
        # Of this process's shards.
        self.average = MovingAverage(*([local(p) for p in m.parameters()] for m in (self.ema, self.model)))


@dataclass
class Run:
    """A run's state and settings.

    precision: "fp32" or "bf16".  elapsed: seconds of training so far.  judge: of its samples, once there are.
    """

    folder: Path
    config: TrainConfig
    precision: str
    dataset: data.DataSet
    state: State
    context: DistributedContext = field(default_factory=DistributedContext)
    elapsed: float = 0.0
    signals: StopSignals = field(default_factory=StopSignals)
    judge: Judge | None = None

    @property
    def network(self) -> Any:
        """The averaged network, which draws with the run's guidance and names of classes."""
        names = tuple(self.dataset.class_names)
        self.state.ema.sampling = Sampling(*self.config.sampling, names, self.dataset.autoencoder)
        return self.state.ema

    def batches(self) -> data.Batches:
        """Returns this process's batches, from the next step on."""
        return data.Batches(
            self.dataset,
            batch_size=self.config.micro_batch_size,
            seed=self.config.seed,
            first=self.state.step * self.config.accumulate,
            process=self.context.rank,
            processes=self.context.count,
            device=self.context.device,
            flip=self.config.flip,
        )


def initial_state(
    config: TrainConfig, precision: str, context: DistributedContext, network: nn.Module | None = None
) -> State:
    """Builds network, moving average and optimizer on this process's device, the same in every process.

    network: what is trained, in place; by default one of `config`, a function of the seed.
    """
    torch.manual_seed(random.key(config.seed, "weights"))
    model: Any = build(config.network) if network is None else network.train()  # type: ignore[arg-type]
    if network is not None:
        context.share(model.state_dict().values())
    model.compute_dtype = PRECISIONS[precision]
    if not (context.grouped and config.sharding == "fsdp"):  # which moves block by block, and only its part
        model.to(context.device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    graphs = config.cuda_graphs and context.device.type == "cuda"
    stream = torch.cuda.Stream(context.device) if graphs else None
    wrapped = wrap_for_training(
        model,
        ema,
        sharding=config.sharding if context.grouped else None,
        device=context.device,
        compile=config.compile,
        checkpointing=config.checkpointing,
        stream=stream,
    )
    found_inf = torch.zeros((), device=context.device)
    optimizer = AdamW(
        [p for p in model.parameters() if p.requires_grad],
        found_inf,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        capturable=graphs,
    )
    guidance = guidance_of(config.network, config.fixed_guidance)
    loss = objective(config.method, guidance, teacher=ema, norm_eps=config.norm_eps, norm_p=config.norm_p)
    return State(model, ema, wrapped, loss, guidance, optimizer, found_inf, stream=stream)


def begin(
    config: TrainConfig,
    context: DistributedContext | None = None,
    dataset: Any = None,
    network: nn.Module | None = None,
) -> Run:
    """Begins a run in a new folder, with a network of the input size, channels and classes of its data.

    dataset, network: as of `imf.training.session.fit`.
    Raises: UserError if the name is taken, the network does not fit the data, or there are none.
    """
    context = context or DistributedContext(device=choose_device(config.device))
    if config.threads:
        torch.set_num_threads(config.threads)
    precision = config.precision
    if precision == "auto":
        if context.device.type == "cuda":
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            bf16 = "avx512_bf16" in cpu.instruction_sets()
        precision = context.broadcast("bf16" if bf16 else "fp32")
    with context.together():
        config, dataset = _open_data(config, dataset)
        _check_data(config, dataset)
        config = _fitted(config, dataset, network)
        _check_processes(config, context)
        try:
            if isinstance(config.network, IMFConfig):
                empty_weights(build, config.network)
        except ValueError as error:
            raise UserError(str(error)) from error
    state = initial_state(config, precision, context, network)
    with context.together(), _named("--init-from"):
        if config.init_from:
            checkpoint.load_weights(Path(config.init_from), model=state.model, ema=state.ema)
    with context.together():
        folder = create_folder(config) if context.first else None
    run = Run(context.broadcast(folder), config, precision, dataset, state, context)
    _write_configuration(run)
    return run


def find_resumed(path: str | Path, runs: str = TrainConfig.runs) -> tuple[Path, Metadata]:
    """Returns the newest checkpoint of the run that `path` names, "" the last run, and its metadata.

    Raises: UserError if there is none, it lies in no run's folder, or `path` names an older one.
    """
    if path == "":
        found = [other for other in Path(runs).glob("*/checkpoints/step-*.safetensors") if other.is_file()]
        if not found:
            raise UserError(
                f"--resume: no checkpoint in {runs}/*/checkpoints; pass a run's folder or a checkpoint"
            )
        path = max(found, key=lambda other: other.stat().st_mtime).parent.parent
    with _named("--resume"):
        path = checkpoint.find(Path(path))
    last = checkpoint.list_all(checkpoint.run_of(path))[-1]
    if not path.samefile(last):
        raise UserError(
            f"--resume: {path} must be the newest checkpoint of its run, got one older than {last}; "
            f"to go back to it, move the newer ones away first"
        )
    return path, checkpoint.read_metadata(path)


def resume(
    path: Path,
    metadata: Metadata,
    config: TrainConfig,
    context: DistributedContext,
    dataset: Any = None,
    network: nn.Module | None = None,
) -> Run:
    """Restores the run of a checkpoint, with the options that may change; warns of what changes its bits.

    path, metadata: as `find_resumed` returns them.  dataset, network: as of `imf.training.session.fit`.
    Raises: UserError for an option that may not change or is wrong, or a damaged file.
    """
    folder = checkpoint.run_of(path)
    with context.together():
        saved = metadata.config.network
        if isinstance(saved, AdaptedConfig):
            network = checkpoint.network_for(path, saved, network)
            config = replace(config, network=saved)
        elif network is not None:
            config = replace(config, network=config_of(network))
        config, dataset = _open_data(config, dataset)
        _check_data(config, dataset)
        _check_resumed(path, metadata, config)
        _check_processes(config, context)
        wanted, got = _form_of(config.network), _form_of(dataset)
        if got != wanted:
            raise UserError(
                f"--resume: the data in {config.data} must be {wanted} as the network of {path}, got {got}"
            )
        if dataset.autoencoder != metadata.autoencoder:
            raise UserError(
                f"--resume: the latents in {config.data} are of another autoencoder than those that {folder} "
                f"was trained on: start a new run, or prepare them again as they were"
            )
        if metadata.class_names and tuple(dataset.class_names) != metadata.class_names:
            changed = zip(metadata.class_names, dataset.class_names, strict=True)
            label, (old, new) = next((i, pair) for i, pair in enumerate(changed) if pair[0] != pair[1])
            raise UserError(
                f"--resume: class {label} in {config.data} must be {old!r} as {folder} was trained on, got "
                f"{new!r}: start a new run, or prepare the data with the classes in their old order"
            )
    torch.set_num_threads(config.threads or int(metadata.environment["threads"]))
    if context.first:
        _warn_of_other_bits(metadata, config, context)
    state = initial_state(config, metadata.precision, context, network)
    with context.together():
        checkpoint.restore(path, model=state.model, ema=state.ema, optimizer=state.optimizer)
        if context.first:
            (folder / "samples").mkdir(exist_ok=True)  # a checkpoint may have been copied to a new folder
            checkpoint.remove_temporaries(folder)
            if dropped := truncate_metrics(folder / "metrics.jsonl", metadata.step):
                _warn(f"{folder / 'metrics.jsonl'}: {dropped} line(s) that are no metrics are dropped")
    state.step = metadata.step
    run = Run(folder, config, metadata.precision, dataset, state, context, metadata.elapsed)
    _write_configuration(run)
    return run


def create_folder(config: TrainConfig) -> Path:
    """Makes an empty folder for a run: `<runs>/<name>`, or the name of the data with the first free number.

    Raises: UserError if a name was given and its folder is taken, or `runs` cannot be a folder.
    """
    runs = Path(config.runs)
    own = config.data.startswith(OWN)
    name = config.data.rpartition(".")[2] if own else Path(config.data).resolve().name
    try:
        runs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--runs must be a folder or a path where one can be made, got {runs} ({error.strerror})"
        ) from error
    numbered = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
    for folder in map(runs.joinpath, [config.name] if config.name else numbered):
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"{folder} could not be made ({error.strerror}); choose another --runs or --name"
            ) from error
        (folder / "checkpoints").mkdir()
        (folder / "samples").mkdir()
        return folder
    folder = runs / config.name
    way_out = f"continue it with --resume {folder}" if checkpoint.list_all(folder) else "delete it"
    raise UserError(f"{folder} exists already; {way_out}, or choose another --name")


def resumed_config(metadata: Metadata, arguments: argparse.Namespace) -> TrainConfig:
    """Returns a checkpoint's configuration with the arguments given; UserError if one is out of range."""
    with _named("--resume", ValueError):
        return with_arguments(metadata.config, arguments)


def _check_resumed(path: Path, metadata: Metadata, config: TrainConfig) -> None:
    """Raises UserError for options that differ from a checkpoint's and may not."""
    for name, (old, new) in differences(metadata.config, config).items():
        if name not in RESUMABLE:
            raise UserError(
                f"--resume: {name} is {old!r} in {path}, got {new!r}; a resumed run goes on exactly as it "
                f"began: leave the argument out, or start a new run"
            )
    if config.steps < metadata.step:
        raise UserError(f"--resume: {path} is at step {metadata.step} already, got --steps {config.steps}")


def _warn_of_other_bits(metadata: Metadata, config: TrainConfig, context: DistributedContext) -> None:
    if config.steps != metadata.config.steps and config.decay != "constant":
        _warn(f"--steps {config.steps}, not {metadata.config.steps}: the learning rate decays at other steps")
    before, now = dict(metadata.environment), checkpoint.environment(context.device, context.count)
    for option in ROUNDING:
        before[option], now[option] = str(getattr(metadata.config, option)), str(getattr(config, option))
    for name, value in now.items():
        if before.get(name) != value:
            _warn(f"{name} was {before.get(name)}, now it is {value}: it goes on, but not to the same bits")


def _open_data(config: TrainConfig, dataset: Any) -> tuple[TrainConfig, data.DataSet]:
    """Opens the data, those of `config` unless given; returns them, and the configuration that names them."""
    if isinstance(dataset, (str, Path)):
        config, dataset = replace(config, data=str(dataset)), None
    if dataset is not None:
        kind = type(dataset)
        if not hasattr(dataset, "fetch"):
            found = data.from_dataset(dataset)
        elif missing := [name for name in MEMBERS if not hasattr(dataset, name)]:
            raise UserError(
                f"dataset: must have all members of an imf.data.DataSet, got a {kind.__name__} without "
                f"{', '.join(missing)}"
            )
        else:
            found = dataset
        return replace(config, data=f"{OWN}{kind.__module__}.{kind.__qualname__}"), found
    if config.data.startswith(OWN):
        raise UserError(f"--data: a data set made in Python, {config.data}; pass it: imf.fit(…, dataset=…)")
    with _named("--data"):
        return config, data.load(config.data)


def _check_data(config: TrainConfig, found: data.DataSet) -> None:
    """Raises UserError for options that do not fit the data."""
    if config.flip and isinstance(found, data.PackedData) and found.kind != "pixels":
        raise UserError(
            "--flip must be off for latents, got on: a flipped image's latent is not the flipped latent; "
            "put flipped copies beside the images before python -m imf.data.prepare"
        )
    if config.sample_every and found.shape[0] not in (1, 3):
        raise UserError(
            f"--sample-every must be 0 for latents, which python -m imf.sample decodes, "
            f"got {config.sample_every}"
        )


def _form_of(x: Any) -> str:
    """Shape and classes of the images of a data set or of a network, as text."""
    shape = list(getattr(x, "shape", ())) or [x.in_channels, x.input_size, x.input_size]
    return f"{shape} of {x.num_classes} classes"


def _fitted(config: TrainConfig, found: data.DataSet, network: nn.Module | None) -> TrainConfig:
    """Returns the configuration with the input size, channels and classes of the data; UserError if that
    cannot be."""
    if network is None:
        if isinstance(config.network, AdaptedConfig):
            raise UserError(f"network: pass the network of your own, imf.fit(…, network=…): {config.network}")
        return _sized(config, found)
    if isinstance(network, Adapted):
        _check_adapted(network, found.shape, config)
    own: Any = config_of(network)
    if (wanted := _form_of(found)) != (got := _form_of(own)):
        raise UserError(f"network: must be for images {wanted}, as the data in {config.data}, got {got}")
    return replace(config, network=own)


def _sized(config: TrainConfig, found: data.DataSet) -> TrainConfig:
    """Returns the configuration whose network, of this package, has the sizes of the data."""
    assert isinstance(config.network, IMFConfig)
    channels, size, _ = found.shape
    patch = config.network.patch_size
    if config.max_patches:
        patch = patch_size_for(size, config.max_patches)
    elif size % patch:
        raise UserError(
            f"--patch-size must divide the {size} pixels of an image in {config.data}: one of "
            f"{', '.join(map(str, divisors(size)))}, got {patch}"
        )
    sizes: dict[str, Any] = {"patch_size": patch, "in_channels": channels, "input_size": size}
    with _named(f"--data {config.data}", ValueError):
        network = replace(config.network, num_classes=found.num_classes, **sizes)
        return replace(config, network=network)


def _check_adapted(network: Adapted, shape: tuple[int, int, int], config: TrainConfig) -> None:
    """Raises UserError for an adapted network that cannot be trained as the configuration asks."""
    if not network.config.in_channels:
        with _named("network", ValueError):
            network.check(shape)
    if network.unused:
        names = ", ".join(network.unused[:3]) + (", …" if len(network.unused) > 3 else "")
        raise UserError(
            f"network: the loss must reach every weight that is trained, got {len(network.unused)} without "
            f"influence on it: {names}; remove them, or freeze them by requires_grad_(False)"
        )
    if config.compile:
        raise UserError(
            "--compile must be off for a network of your own: it runs inside imf_kernels.jvp, where compiled "
            "parts run eagerly"
        )
    if config.checkpointing and not blocks(network):
        raise UserError(
            "--checkpointing keeps no activations inside the blocks of a network, the members of its "
            "torch.nn.ModuleLists, and this one has none; call imf_kernels.checkpoint in it instead"
        )


def _check_processes(config: TrainConfig, context: DistributedContext) -> None:
    if config.micro_batch_size % context.count:
        raise UserError(
            f"--batch-size / --accumulate must be a multiple of the {context.count} processes, "
            f"got {config.batch_size} / {config.accumulate} = {config.micro_batch_size}"
        )
    if config.cuda_graphs and context.device.type != "cuda":
        raise UserError(f"--cuda-graphs must be on a GPU, got {context.device}")
    if config.cuda_graphs and context.grouped and config.sharding == "fsdp":
        raise UserError(
            "--cuda-graphs must be with --sharding ddp under torchrun, got fsdp: PyTorch says how to capture "
            "DDP, not FSDP2"
        )
    if config.sharding == "fsdp" and not context.grouped:
        raise UserError("--sharding fsdp needs processes: start with torchrun, also a single one")
    gpu = context.device.type == "cuda"
    interpreted = config.backend == "triton" and triton_launch.interpreted()
    if (config.backend in ("triton", "cuda", "flash") and not (gpu or interpreted)) or (
        config.backend == "cpu" and gpu
    ):
        raise UserError(f"--backend {config.backend} cannot run on --device {context.device.type}")
    if config.wandb and context.first:
        wandb_module()
    if config.extractor not in EXTRACTORS:
        with _named("--extractor"):
            inception.check(config.extractor)


def _write_configuration(run: Run) -> None:
    environment = checkpoint.environment(run.context.device, run.context.count)
    values = {"config": to_dict(run.config), "precision": run.precision, "environment": environment}
    with run.context.together():
        if run.context.first:
            write_json(run.folder / "config.json", values)


@contextlib.contextmanager
def _named(option: str, errors: type[ValueError] = UserError) -> Iterator[None]:
    """Turns errors of an option's value into a UserError that names the option."""
    try:
        yield
    except errors as error:
        raise UserError(f"{option}: {error}") from error


def _warn(text: str) -> None:
    print(f"imf.train: warning: {text}", file=sys.stderr)

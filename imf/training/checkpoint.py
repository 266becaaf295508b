"""Checkpoints: one safetensors file holds a run at one step; nothing is unpickled.

Tensors: `model.<name>` and `ema.<name>`, the weights and their moving average; `optimizer.<name>.<state>`,
AdamW's moments and step count of that weight. Metadata: one JSON text under the key `imf`. Random numbers and
data order are functions of (seed, step), so there is no random state to keep.

A CRC-32 covers every byte: the text's lies under the key `crc32`, those of the tensors named `model.`, `ema.`
and `optimizer.` in the text, each over names, shapes, dtypes and values. Readers check them, and that all
numbers are finite, before use. A file gets its name only when it is complete and on the disk (temporary file,
fsync, rename), so the checkpoint of the highest step is always the one to resume from.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from imf import __version__
from imf.io import replacing
from imf.model.config import IMFConfig
from imf.model.imf import IMF
from imf.networks import build
from imf.program import MOST_THREADS, UserError
from imf.training.config import TrainConfig, from_dict, to_dict
from imf.training.parallel import placed_like, whole

METADATA_KEY, CHECKSUM_KEY = "imf", "crc32"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by the name of a run's precision
FORMAT = 4  # raise it when a file of the old form cannot be read, or a run would resume with other numbers
MOST_SECONDS = 2**40
MOST_WEIGHTS = 2**34  # of a network, 64 GiB

_CONVERT = "python -m imf.convert SOURCE OUT.safetensors makes a checkpoint of official weights"
_NAME = re.compile(r"step-(\d+)\.safetensors")


@dataclass(frozen=True)
class Metadata:
    """Description of a run at the step of a checkpoint.

    step: optimizer steps done.  elapsed: seconds of training until then.
    config: the full configuration, with that of the network.
    precision: "fp32" or "bf16", as decided when the run began.
    environment: versions, processor, device and thread count, see `environment`.
    autoencoder: digest of the one that made the latents, `imf.evaluation.vae.digest`; "" if unknown or none.
    class_names: a name per label; empty if unknown.

    Raises: ValueError, naming it, for a value of another type or out of range.
    """

    step: int
    elapsed: float
    config: TrainConfig
    precision: str
    environment: dict[str, str]
    autoencoder: str = ""
    class_names: Sequence[str] = ()

    def __post_init__(self) -> None:
        names, classes = self.class_names, self.config.network.num_classes
        named = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        elapsed, environment = self.elapsed, self.environment
        texts = isinstance(environment, dict) and all(isinstance(text, str) for text in environment.values())
        threads = environment.get("threads", "") if texts else ""
        fits_threads = threads.isdecimal() and len(threads) < 5 and 1 <= int(threads) <= MOST_THREADS
        for name, fits, wanted in (
            ("step", type(self.step) is int and self.step >= 0, "an integer of at least 0"),
            ("elapsed", isinstance(elapsed, (int, float)) and 0 <= elapsed <= MOST_SECONDS, "seconds"),
            ("precision", self.precision in tuple(DTYPES), f"one of {', '.join(DTYPES)}"),
            ("environment", fits_threads, f"texts by name, threads from 1 to {MOST_THREADS}"),
            ("autoencoder", isinstance(self.autoencoder, str), "a text"),
            ("class_names", named and len(names) in (0, classes), f"{classes} texts, or none"),
        ):
            if not fits:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
        object.__setattr__(self, "class_names", tuple(names))  # JSON has lists


def environment(device: torch.device, processes: int = 1) -> dict[str, str]:
    """Returns what else decides the bits of a result: versions, processor, device, threads, processes."""
    return {
        "imf": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "processor": f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": str(torch.get_num_threads()),
        "processes": str(processes),
    }


def save(
    path: Path,
    *,
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    metadata: Metadata,
    writes: bool = True,
) -> None:
    """Writes a checkpoint to `path`, whose folder exists; it always holds the old file or all of the new one.

    writes: whether this process does. If FSDP2 shards the network, every process calls `save`, and one
        writes, after it has gathered tensor by tensor in its host's memory.
    Raises: UserError, naming the bytes needed and free, if the file cannot be written (a full disk), or
        naming the tensor, if a number is not finite.
    """
    gathered = ((name, whole(x.detach())) for name, x in _tensors(model, ema, optimizer.state).items())
    tensors = {name: x.cpu().contiguous() for name, x in gathered if writes}  # one at a time on the device
    if writes:
        _write(path, tensors, metadata)


def save_network(path: Path, networks: Mapping[str, Mapping[str, Tensor]], metadata: Metadata) -> None:
    """Writes weights without a run to `path`: `load` reads them, a run cannot resume from them.

    networks: state dicts under "ema" and "model", or one of the two. Weights for sampling lack `v_blocks`.
    Raises: UserError as `save` does.
    """
    named = ((f"{kind}.{name}", x) for kind, state in networks.items() for name, x in state.items())
    _write(path, {name: x.detach().contiguous() for name, x in named}, metadata)


def restore(path: Path, *, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> Metadata:
    """Restores a run from `path` in place; nothing is changed unless all of the file fits.

    Raises: UserError if the file is missing, damaged, foreign, of another network or not finite.
    """
    metadata, tensors = _read(path)
    # The loss reaches every weight, so AdamW knows all of them after a step, and none before.
    moments: dict[Tensor, dict[str, Tensor]] = {
        p: {"step": torch.zeros((), device=p.device)}
        | {name: torch.zeros_like(p, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
        for p in (model.parameters() if metadata.step else ())
    }
    _copy(path, tensors, _tensors(model, ema, moments))
    optimizer.state.update(moments)
    return metadata


def load_weights(path: Path, *, model: nn.Module, ema: nn.Module) -> None:
    """Loads the averaged weights of `path`, or else its latest ones, into both networks, if all fit.

    path: a run's checkpoint, or weights without a run (`imf.convert`).
    Raises: UserError as `restore` does.
    """
    for kind in ("ema", "model"):
        if tensors := _read(path, prefix=f"{kind}.")[1]:
            for network in (model, ema):
                _copy(path, tensors, {f"{kind}.{name}": x for name, x in network.state_dict().items()})
            return
    raise UserError(f"{path}: there are no weights in it")


def load(path: str | Path, weights: Literal["ema", "model"] = "ema") -> tuple[IMF, Metadata]:
    """Builds a checkpoint's network from its own configuration, with its averaged or its latest weights.

    Weights for sampling make a network without a v-head, which says so when the v-head is asked for.

    path: a checkpoint, or the folder of a run, which stands for its newest one.
    Raises: UserError if the file is missing, damaged, foreign or not finite.
    """
    path, prefix = find(Path(path)), f"{weights}."
    metadata, tensors = _read(path, prefix)
    if not tensors:
        raise UserError(f"{path}: there are no {weights!r} weights in it")
    network = build(metadata.config.network)  # its weights are those of the file: `_read` compared them
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if len(getattr(network, "v_blocks", ())) and not any(name.startswith("v_blocks.") for name in state):
        network.v_blocks = _NoVHead()
    network.load_state_dict(state)
    network.compute_dtype = DTYPES[metadata.precision]
    return network.requires_grad_(False), metadata


def read_metadata(path: Path) -> Metadata:
    """Reads a checkpoint's metadata, but not the values of its tensors.

    Raises: UserError if the file is missing, truncated or foreign, or its tensors are not those of a network
        of its configuration.
    """
    return _read(path, prefix=())[0]


def empty_weights(config: IMFConfig) -> dict[str, Tensor]:
    """Returns a network's weights without memory, on the meta device: names, shapes and dtypes.

    Raises: ValueError for sizes that no machine holds.
    """
    try:
        with torch.device("meta"):
            weights: dict[str, Tensor] = build(config).state_dict()
    except (RuntimeError, OverflowError, TypeError) as error:  # PyTorch's, of sizes beyond 64 bits
        raise ValueError(f"network: no tensors can be of the sizes of {config}") from error
    if (count := sum(x.numel() for x in weights.values())) > MOST_WEIGHTS:
        raise ValueError(
            f"network: hidden_size {config.hidden_size}, depth {config.depth}, mlp_ratio "
            f"{config.mlp_ratio:g}, num_classes {config.num_classes} must make at most {MOST_WEIGHTS:,} "
            f"weights, got {count:,}"
        )
    return weights


def path_of(run: Path, step: int) -> Path:
    """Returns the path of the checkpoint of a step in a run's folder."""
    return run / "checkpoints" / f"step-{step:08d}.safetensors"


def list_all(run: Path) -> list[Path]:
    """Lists the checkpoints of a run, oldest first."""
    found = (run / "checkpoints").glob("step-*.safetensors")
    numbered = [(int(match[1]), path) for path in found if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered) if not path.is_dir()]


def run_of(path: Path) -> Path:
    """Returns the folder of the run that a checkpoint belongs to; UserError if it lies in none.

    Links are followed as far as needed: a checkpoint may lie elsewhere, and a link elsewhere may name one.
    """
    places = [Path(os.path.abspath(path))]  # links in it stay: `checkpoints` may be one
    while places[-1].is_symlink() and len(places) <= 40:  # the most links that Linux follows
        places.append(Path(os.path.abspath(places[-1].parent / places[-1].readlink())))
    for place in (*places, path.resolve()):
        if place.parent.name == "checkpoints" and _NAME.fullmatch(place.name):
            return place.parent.parent
    raise UserError(
        f"--resume: {path} must be a checkpoint in a run's folder, <run>/checkpoints/step-….safetensors, "
        f"or a link to one; --init-from begins a new run with the weights of any"
    )


def find(path: Path) -> Path:
    """Returns the checkpoint that `path` names: itself if a file, the newest one if a run's folder.

    Raises: UserError if there is none.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise UserError(f"{path}: no such file or folder{_aim(path)}")
    if not path.is_dir():
        raise UserError(f"{path}: must be a checkpoint or the folder of a run, got a device or a FIFO")
    if checkpoints := list_all(path):
        return checkpoints[-1]
    hint = f"; {_CONVERT}" if any(path.glob("checkpoint_*")) else ""  # a folder of the official programs
    raise UserError(f"{path}: no checkpoints/step-*.safetensors in this folder{hint}")


def prune(run: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints of a run."""
    for path in list_all(run)[:-keep]:
        path.unlink()


def remove_temporaries(run: Path) -> None:
    """Deletes what a killed process left half-written; only for a run that no other process is writing."""
    for pattern in (".step-*.tmp", ".tmp??????"):  # the second is what safetensors names its own
        for path in (run / "checkpoints").glob(pattern):
            if path.is_symlink() or path.is_file():
                path.unlink()


class _NoVHead(nn.ModuleList):
    """Stand-in for the blocks of a v-head whose weights are not there."""

    def __iter__(self) -> Iterator[nn.Module]:
        raise UserError("the v-head was asked of a network whose weights are for sampling, without it")


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Metadata) -> None:
    """Writes a complete file or none; UserError if it cannot be written."""
    if name := _not_finite(tensors):
        raise UserError(f"{path}: not written: {name} must be finite, got NaN or infinity")
    values = {**vars(metadata), "config": to_dict(metadata.config), "format": FORMAT}
    text = json.dumps({**values, "checksums": _checksums(tensors)})
    texts = {METADATA_KEY: text, CHECKSUM_KEY: f"{zlib.crc32(text.encode()):08x}"}
    try:
        with replacing(path, synced=True) as temporary:
            save_file(dict(tensors), temporary, metadata=texts)
    except (OSError, SafetensorError) as error:
        needed, free = sum(tensor.nbytes for tensor in tensors.values()), "an unknown number"
        with suppress(OSError):
            free = f"{shutil.disk_usage(path.parent).free:,}"
        raise UserError(
            f"{path}: could not write the checkpoint of step {metadata.step}: {error}; "
            f"it needs {needed:,} bytes, {free} are free"
        ) from error


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the CRC-32 of each group of tensors, by the first part of their names; read once, in order."""
    sums: dict[str, int] = {}
    for name in sorted(tensors):
        tensor, group = tensors[name], name.partition(".")[0]
        begun = zlib.crc32(f"{name} {_form(tensor)}".encode(), sums.get(group, 0))
        sums[group] = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, begun)
    return {group: f"{value:08x}" for group, value in sums.items()}


def _not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Returns the name of the first tensor that holds NaN or infinity."""

    def finite(x: Tensor) -> bool:  # the extremes are NaN where a value is; finding them takes no memory
        return all(math.isfinite(float(extreme)) for extreme in torch.aminmax(x.float()))

    floats = {name: x for name, x in tensors.items() if x.is_floating_point() and x.numel()}
    return next((name for name, x in floats.items() if not finite(x)), None)


def _tensors(
    model: nn.Module, ema: nn.Module, moments: Mapping[Tensor, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Returns all tensors of a run by their names in a checkpoint; moments: AdamW's state by weight.

    An optimizer's own index of a weight would mean nothing once a layer was added.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in ema.state_dict().items()}
    for name, weight in model.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": x for key, x in moments.get(weight, {}).items()}
    return tensors


@torch.no_grad()
def _copy(path: Path, tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    """Copies the tensors of `path` into `targets`, one after the other; UserError if one does not fit."""
    _check_same(path, tensors, targets)
    for name, target in targets.items():
        target.copy_(placed_like(tensors[name], target))


def _read(path: Path, prefix: str | tuple[str, ...] = "") -> tuple[Metadata, dict[str, Tensor]]:
    """Reads metadata and the tensors whose names begin with `prefix` ((): none), checked byte by byte."""
    if not path.is_file():
        kind = "a folder or a device, wanted a file" if path.exists() else f"no such file{_aim(path)}"
        raise UserError(f"{path}: {kind}")
    try:
        with safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            # They lie in the mapped file, however large: to be copied one after the other.
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path}: not a complete safetensors file ({error}){_advice(path)}") from error
    except OSError as error:
        raise UserError(f"{path}: could not be read: {error}") from error
    if METADATA_KEY not in texts:
        raise UserError(
            f"{path}: a safetensors file without {METADATA_KEY!r} metadata, so no checkpoint of imf.train; "
            f"{_CONVERT}"
        )
    metadata, checksums = _read_header(path, texts)
    _check_network(path, metadata.config.network, tensors)
    wanted = {name: x for name, x in tensors.items() if name.startswith(prefix)}
    for group, got in _checksums(wanted).items():
        if got != (wants := checksums.get(group)):
            damage = f"damaged: checksum of {group!r} must be {wants}, got {got}"
            raise UserError(f"{path}: {damage}.{_way_out(path)}")
    if name := _not_finite(wanted):
        raise UserError(f"{path}: {name} must be finite, got NaN or infinity.{_way_out(path)}")
    return metadata, wanted


def _read_header(path: Path, texts: Mapping[str, str]) -> tuple[Metadata, dict[str, str]]:
    """Reads the metadata, and the tensors' checksums by group, from the texts in a file's header."""
    text, foreign = texts[METADATA_KEY], f"{path}: written by another version of imf.train"
    damaged = f"{path}: damaged: its metadata do not have their checksum.{_way_out(path)}"
    try:
        values = json.loads(text)
        found = values["format"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(damaged) from error
    if type(found) is not int or found != FORMAT:  # asked first: another one may keep its checksum elsewhere
        raise UserError(
            f"{foreign}: this version reads format {FORMAT}, got {str(found)[:20]}: "
            f"read it with the version that wrote it"
        )
    if texts.get(CHECKSUM_KEY) != f"{zlib.crc32(text.encode()):08x}":
        raise UserError(damaged)
    names = {field.name for field in fields(Metadata)}
    try:
        if unknown := values.keys() ^ {*names, "format", "checksums"}:
            raise ValueError(f"missing or unknown: {', '.join(sorted(unknown))}")
        if not isinstance(values["checksums"], dict):
            raise ValueError(f"checksums must be texts by name, got {values['checksums']!r}")
        values["config"] = from_dict(values["config"])
        return Metadata(**{name: values[name] for name in names}), values["checksums"]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{foreign}: {error}") from error


def _check_network(path: Path, config: IMFConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError unless the weights of each kind are the network's, with the v-head or without.

    It comes before anything of these sizes is made: the tensors' own are true, the file is as long.
    """
    found = {name: x for name, x in tensors.items() if not name.startswith("optimizer.")}
    try:
        if config.depth > len(found):
            raise ValueError(f"depth must be at most the number of weights, {len(found)}, got {config.depth}")
        empty = empty_weights(config)
    except ValueError as error:
        raise UserError(f"{path}: its configuration is of another network: {error}") from error
    expected: dict[str, Tensor] = {}
    for kind in ("model.", "ema."):
        if any(name.startswith(kind) for name in found):
            v_head = any(name.startswith(f"{kind}v_blocks.") for name in found)
            absent = () if v_head else "v_blocks."
            expected |= {f"{kind}{name}": x for name, x in empty.items() if not name.startswith(absent)}
    _check_same(path, found, expected)


def _check_same(path: Path, got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises UserError, listing the first differences, unless names, shapes and dtypes are the expected."""
    have, wanted = ({name: _form(tensor) for name, tensor in tensors.items()} for tensors in (got, expected))
    names = [*wanted, *(have.keys() - wanted.keys())]
    lines = [
        f"  {name}: checkpoint {have.get(name, 'has none')}, network {wanted.get(name, 'has none')}"
        for name in names
        if wanted.get(name) != have.get(name)
    ]
    if lines:
        lines[5:] = [f"  and {len(lines) - 5} more"] if len(lines) > 5 else []
        raise UserError("\n".join([f"{path}: a checkpoint of another network, or not whole:", *lines]))


def _form(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _advice(path: Path) -> str:
    """Says what a file that is not a safetensors file may be, and what to do."""
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith((b"PK", b"\x80")) or path.suffix in (".pth", ".pt", ".ckpt", ".zip"):
        return f": of another program? {_CONVERT}"
    return f": truncated or damaged?{_way_out(path)}"


def _way_out(path: Path) -> str:
    """Says what to do about a damaged file: a run has an earlier one."""
    earlier = [other for other in list_all(path.parent.parent) if other.name < path.name]
    if path.parent.name == "checkpoints" and earlier:
        return f" Delete it to go on from {earlier[-1].name}, the checkpoint before"
    return " Copy it again, or take another."


def _aim(path: Path) -> str:
    return f": a link to {path.readlink()}, where there is none" if path.is_symlink() else ""


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

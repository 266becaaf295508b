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
import os
import platform
import re
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from imf import __version__
from imf.adapted import Adapted
from imf.io import check_names, replacing
from imf.model.config import AdaptedConfig, IMFConfig
from imf.model.pretrained import (
    CONFIG,
    PRECISIONS,
    WEIGHTS,
    Sampling,
    expected_weights,
    is_pretrained,
    read_network_config,
    with_weights,
)
from imf.networks import build, network_class
from imf.program import MOST_THREADS, UserError
from imf.tensors import check_same, checksums, not_finite, writing
from imf.training.config import TrainConfig, from_dict
from imf.training.parallel import placed_like, whole

if TYPE_CHECKING:  # for the annotations
    from imf.training.state import Run, State

METADATA_KEY, CHECKSUM_KEY = "imf", "crc32"
FORMAT = 4  # raise it when a file of the old form cannot be read, or a run would resume with other numbers
MOST_SECONDS = 2**40

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
            ("precision", self.precision in tuple(PRECISIONS), f"one of {', '.join(PRECISIONS)}"),
            ("environment", fits_threads, f"texts by name, threads from 1 to {MOST_THREADS}"),
            ("autoencoder", isinstance(self.autoencoder, str), "a text"),
            ("class_names", named and len(names) in (0, classes), f"{classes} texts, or none"),
        ):
            if not fits:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
        object.__setattr__(self, "class_names", tuple(names))  # JSON has lists

    @property
    def sampling(self) -> Sampling:
        """Returns how the network is sampled: the run's guidance, names of classes, autoencoder."""
        return Sampling(
            **self.config.sampling, class_names=tuple(self.class_names), autoencoder=self.autoencoder
        )


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


def save_run(run: Run) -> None:
    """Writes a checkpoint of the run as it is, then deletes the oldest ones; all processes call it."""
    context, state = run.context, run.state
    metadata = Metadata(
        step=state.step,
        elapsed=run.elapsed,
        config=run.config,
        precision=run.precision,
        environment=environment(context.device, context.count),
        autoencoder=run.dataset.autoencoder,
        class_names=run.dataset.class_names,
    )
    with context.together(run.signals):
        save(path_of(run.folder, state.step), state, metadata, writes=context.first)
        if context.first:
            prune(run.folder, run.config.keep_checkpoints)


def save(path: Path, state: State, metadata: Metadata, writes: bool = True) -> None:
    """Writes a checkpoint to `path`, whose folder exists; it always holds the old file or all of the new one.

    writes: whether this process does. If FSDP2 shards the network, every process calls `save`, and one
        writes, after it has gathered tensor by tensor in its host's memory.
    Raises: UserError, naming the bytes needed and free, if the file cannot be written (a full disk), or
        naming the tensor, if a number is not finite.
    """
    gathered = ((name, whole(x.detach())) for name, x in _tensors(state, state.optimizer.state).items())
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


def restore(path: Path, state: State) -> Metadata:
    """Restores a run's state from `path` in place; nothing is changed unless all of the file fits.

    Raises: UserError if the file is missing, damaged, foreign, of another network or not finite.
    """
    metadata, tensors = _read(path)
    # The loss reaches every weight that is trained: AdamW knows all of them after a step, and none before.
    moments: dict[Tensor, dict[str, Tensor]] = {
        p: {"step": torch.zeros((), device=p.device)}
        | {name: torch.zeros_like(p, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
        for p in (state.parameters if metadata.step else ())
        if p.requires_grad
    }
    _copy(path, tensors, _tensors(state, moments))
    state.optimizer.state.update(moments)
    state.step = metadata.step
    return metadata


def load_weights(path: Path, state: State) -> None:
    """Loads the averaged weights of `path`, or else its latest ones, into network and average, if all fit.

    path: as `load` takes it.
    Raises: UserError as `restore` does.
    """
    if is_pretrained(path):
        prefix, tensors = "", load(path).state_dict()
    else:
        path = find(path)
        sets = ((f"{kind}.", _read(path, prefix=f"{kind}.")[1]) for kind in ("ema", "model"))
        prefix, tensors = next((found for found in sets if found[1]), ("", {}))
        if not tensors:
            raise UserError(f"{path}: there are no weights in it")
    for network in (state.model, state.ema):
        _copy(path, tensors, {f"{prefix}{name}": x for name, x in network.state_dict().items()})


def load(
    path: str | Path, weights: Literal["ema", "model"] = "ema", *, network: nn.Module | None = None
) -> Any:
    """Builds a trained network, with its averaged or its latest weights; `network.generate` draws from it.

    Weights for sampling make a network without a v-head, which says so when the v-head is asked for.

    path: the folder of a run, which stands for its newest checkpoint; a checkpoint; or a folder that
        `save_pretrained` wrote, whose weights are the averaged ones.
    network: from `imf.adapt`, where the run trained a network of your own, of which a checkpoint has the
        weights alone; it gets them in place, and is returned.
    Returns: an `imf.model.imf.IMF`, an `imf.mean_flow.network.DiT` where the blocks are plain, or `network`;
        frozen, on the CPU, with guidance and names of classes in `sampling`.
    Raises: UserError if a file is missing, damaged, foreign or not finite, or of another network.
    """
    path = Path(path)
    if is_pretrained(path):
        if weights != "ema":
            raise UserError(f"{path}: there are the averaged weights alone in it, got weights={weights!r}")
        return network_class(read_network_config(path)).from_pretrained(path)
    if not path.exists() and not path.is_symlink():
        raise UserError(f"{path}: no such file or folder; networks are read from local files, from no hub")
    path, prefix = find(path), f"{weights}."
    metadata, tensors = _read(path, prefix)
    if not tensors:
        raise UserError(f"{path}: there are no {weights!r} weights in it")
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    config = metadata.config.network
    if isinstance(config, AdaptedConfig):
        network = network_for(path, config, network)
        check_same(path, state, network.state_dict())
        network.load_state_dict(state)
        network.requires_grad_(False).eval()
    elif network is not None:
        raise UserError(
            f"{path}: says itself which network it has: leave network= out, got a {_kind(network)}"
        )
    else:
        network = with_weights(path, build, config, state)
    network.compute_dtype, network.sampling = PRECISIONS[metadata.precision], metadata.sampling
    return network


def network_for(path: Path, config: AdaptedConfig, network: nn.Module | None) -> Any:
    """Returns `network` if its form is that of a checkpoint of an adapted network.

    Raises: UserError for another one, or for none.
    """
    if not isinstance(network, Adapted):
        got = "none" if network is None else f"a {_kind(network)}"
        raise UserError(
            f"{path}: has the weights alone of a network of your own, {config.custom}; pass it in Python: "
            f"imf.load(path, network=imf.adapt(…)), or imf.fit(resume=path, network=imf.adapt(…)); got {got}"
        )
    if not network.config.in_channels:
        network.check((config.in_channels, config.input_size, config.input_size))
    got = replace(network.config, custom=config.custom)  # a class may have moved: names of weights decide
    if got != config:
        raise UserError(f"{path}: network must be of the form that was trained, {config}, got {got}")
    return network


def _kind(x: Any) -> str:
    return type(x).__name__


def weights_file(path: Path) -> Path:
    """Returns the file that `load` reads the weights of `path` from; UserError if there is none."""
    return path / WEIGHTS if is_pretrained(path) else find(path)


def read_metadata(path: Path) -> Metadata:
    """Reads a checkpoint's metadata, but not the values of its tensors.

    Raises: UserError if the file is missing, truncated or foreign, or its tensors are not those of a network
        of its configuration.
    """
    return _read(path, prefix=())[0]


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
    raise UserError(f"{path}: no checkpoints/step-*.safetensors in this folder, and no {CONFIG}{hint}")


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


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Metadata) -> None:
    """Writes a complete file or none; UserError if it cannot be written."""
    if name := not_finite(tensors):
        raise UserError(f"{path}: not written: {name} must be finite, got NaN or infinity")
    values = {**vars(metadata), "config": asdict(metadata.config), "format": FORMAT}
    text = json.dumps({**values, "checksums": checksums(tensors)})
    texts = {METADATA_KEY: text, CHECKSUM_KEY: f"{zlib.crc32(text.encode()):08x}"}
    with (
        writing(path, f"the checkpoint of step {metadata.step}", tensors),
        replacing(path, synced=True) as new,
    ):
        save_file(dict(tensors), new, metadata=texts)


def _tensors(state: State, moments: Mapping[Tensor, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns all tensors of a run by their names in a checkpoint; moments: AdamW's state by weight.

    An optimizer's own index of a weight would mean nothing once a layer was added.
    """
    tensors = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in state.ema.state_dict().items()}
    for name, weight in state.model.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": x for key, x in moments.get(weight, {}).items()}
    return tensors


@torch.no_grad()
def _copy(path: Path, tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    """Copies the tensors of `path` into `targets`, one after the other; UserError if one does not fit."""
    check_same(path, tensors, targets)
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
    metadata, sums = _read_header(path, texts)
    _check_network(path, metadata.config.network, tensors)
    wanted = {name: x for name, x in tensors.items() if name.startswith(prefix)}
    for group, got in checksums(wanted).items():
        if got != (wants := sums.get(group)):
            damage = f"damaged: checksum of {group!r} must be {wants}, got {got}"
            raise UserError(f"{path}: {damage}.{_way_out(path)}")
    if name := not_finite(wanted):
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
    names = [field.name for field in fields(Metadata)]
    try:
        check_names(values, [*names, "format", "checksums"], what="metadata")
        if not isinstance(values["checksums"], dict):
            raise ValueError(f"checksums must be texts by name, got {values['checksums']!r}")
        values["config"] = from_dict(values["config"])
        return Metadata(**{name: values[name] for name in names}), values["checksums"]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{foreign}: {error}") from error


def _check_network(path: Path, config: IMFConfig | AdaptedConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError unless the weights of each kind are the network's, with the v-head or without.

    Those of an adapted network are compared with it when it is passed.
    """
    if isinstance(config, AdaptedConfig):
        return
    found = {name: x for name, x in tensors.items() if not name.startswith("optimizer.")}
    expected: dict[str, Tensor] = {}
    for kind in ("model.", "ema."):
        if state := {name.removeprefix(kind): x for name, x in found.items() if name.startswith(kind)}:
            weights = expected_weights(path, build, config, state)
            expected |= {f"{kind}{name}": x for name, x in weights.items()}
    check_same(path, found, expected)


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

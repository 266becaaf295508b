"""Checkpoints: one safetensors file holds a run at one step; nothing is unpickled.

Tensors: `model.<name>` and `ema.<name>`, the weights and their moving average; `optimizer.<name>.<state>`,
AdamW's moments and step count of that weight. Metadata: one JSON text under the key `imf`. Draws and data
order are functions of (seed, step), so there is no random state to keep.

A file appears under its name only when it is whole and on the disk (temporary file, fsync, rename), so the
checkpoint of the highest step is always the one to resume from.
"""

from __future__ import annotations

import json
import math
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from imf import __version__
from imf.config import TrainConfig, from_dict, to_dict
from imf.files import replacing
from imf.model import IMF, build
from imf.sharding import placed_like, whole

METADATA_KEY = "imf"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by the name of a run's precision
FORMAT = 1  # raise it when a file of the old form can no longer be read


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the file and the reason."""


@dataclass(frozen=True)
class Metadata:
    """What a checkpoint says about itself, beside its tensors.

    step: optimizer steps done.  elapsed: seconds of training until then.
    config: the full configuration, with that of the network.
    precision: "fp32" or "bf16", as decided when the run began.
    gemm_choices: what `imf_kernels.gemm.choices()` had measured; another choice rounds differently.
    environment: versions, processor, device and thread count, see `environment`.
    """

    step: int
    elapsed: float
    config: TrainConfig
    precision: str
    gemm_choices: dict[str, str]
    environment: dict[str, str]


def environment(device: torch.device, processes: int = 1) -> dict[str, str]:
    """What else decides the bits of a result: versions, processor, device, threads, number of processes."""
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
    """Write a checkpoint to `path`, whose folder exists; it always holds the old file or all of the new one.

    writes: whether this process does. Of a network that FSDP2 shards every process calls `save`, and one
        writes, after it has gathered tensor by tensor in its host's memory.
    Raises: CheckpointError, naming the bytes needed and free, if the file cannot be written (a full disk).
    """
    tensors = _tensors(model, ema, optimizer, kept=writes)
    if writes:
        _write(path, tensors, metadata)


def save_network(path: Path, networks: Mapping[str, Mapping[str, Tensor]], metadata: Metadata) -> None:
    """Write weights without a run to `path`: `load_network` reads them, a run cannot go on from them.

    networks: state dicts under "ema" and "model", or one of the two. Weights for sampling lack `v_blocks`.
    Raises: CheckpointError as `save` does.
    """
    tensors = {f"{kind}.{name}": x for kind, state in networks.items() for name, x in state.items()}
    _write(path, {name: x.detach().contiguous() for name, x in tensors.items()}, metadata)


def load(path: Path, *, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> Metadata:
    """Restore a run from `path` in place; nothing is changed unless all of the file fits.

    Raises: CheckpointError if the file is missing, truncated, foreign or of another network.
    """
    metadata, tensors = _read(path)
    _check_same(path, tensors, _expected(model, ema, optimizer, metadata.step))
    _fill(model, tensors, "model.")
    _fill(ema, tensors, "ema.")
    weights = dict(model.named_parameters())
    for name in _parameter_names(model, optimizer) if metadata.step else ():
        states, weight = _select(tensors, f"optimizer.{name}."), weights[name]
        moments = {key: placed_like(x, weight) for key, x in states.items() if key != "step"}
        optimizer.state[weight] = {"step": states["step"].to(weight.device, copy=True), **moments}
    return metadata


def load_weights(path: Path, *, model: nn.Module, ema: nn.Module) -> None:
    """Give both networks the averaged weights of `path`, or its only ones: a run's checkpoint, or weights
    without a run (`imf.convert`); nothing is changed unless all fit.

    Raises: CheckpointError as `load` does.
    """
    for kind in ("ema", "model"):
        tensors = _read(path, prefix=f"{kind}.")[1]
        if tensors:
            _check_same(path, tensors, {f"{kind}.{name}": x for name, x in model.state_dict().items()})
            _fill(model, tensors, f"{kind}.")
            _fill(ema, tensors, f"{kind}.")
            return
    raise CheckpointError(f"{path}: there are no weights in it")


def load_network(path: Path, weights: Literal["ema", "model"] = "ema") -> tuple[IMF, Metadata]:
    """The network of a checkpoint, built from its own configuration, with its averaged or its latest weights.

    Weights for sampling make a network without a v-head, which says so when the v-head is asked for.
    Raises: CheckpointError as `load` does.
    """
    metadata, tensors = _read(path, prefix=f"{weights}.")
    if not tensors:
        raise CheckpointError(f"{path}: there are no {weights!r} weights in it")
    network = build(metadata.config.network)
    sampling = not any(name.startswith(f"{weights}.v_blocks.") for name in tensors)
    if sampling and len(getattr(network, "v_blocks", ())):
        network.v_blocks = _NoVHead()
    _check_same(path, tensors, {f"{weights}.{name}": x for name, x in network.state_dict().items()})
    network.load_state_dict(_select(tensors, f"{weights}."))
    network.compute_dtype = DTYPES[metadata.precision]
    return network.requires_grad_(False), metadata


def read_metadata(path: Path) -> Metadata:
    """What the checkpoint says about itself; CheckpointError if the file is missing, truncated or foreign."""
    return _read(path, prefix=None)[0]


def path_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in a run's folder."""
    return run / "checkpoints" / f"step-{step:08d}.safetensors"


def list_all(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = (run / "checkpoints").glob("step-*.safetensors")
    numbered = [(int(match[1]), path) for path in found if (match := re.fullmatch(r"step-(\d+)", path.stem))]
    return [path for _, path in sorted(numbered)]


def find(path: Path) -> Path:
    """The checkpoint that `path` means: itself if a file, the one of the highest step if a run's folder.

    Raises: CheckpointError if there is none.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    checkpoints = list_all(path)
    if not checkpoints:
        raise CheckpointError(f"{path}: no checkpoints/step-*.safetensors in this folder")
    return checkpoints[-1]


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints of a run."""
    for path in list_all(run)[:-keep]:
        path.unlink()


def remove_temporaries(run: Path) -> None:
    """Delete what a killed process left half-written; only for a run that no other process is writing."""
    for path in (run / "checkpoints").glob(".*"):  # safetensors has hidden temporary names of its own
        path.unlink()


class _NoVHead(nn.ModuleList):
    """In the place of the v-head's blocks where there are none."""

    def __iter__(self) -> Iterator[nn.Module]:
        raise CheckpointError("the v-head was asked of a network whose weights are for sampling, without it")


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Metadata) -> None:
    """Write a file whole or not at all; CheckpointError if it cannot be written."""
    values = {**vars(metadata), "config": to_dict(metadata.config), "format": FORMAT}
    try:
        with replacing(path, synced=True) as temporary:
            save_file(dict(tensors), temporary, metadata={METADATA_KEY: json.dumps(values)})
    except (OSError, SafetensorError) as error:
        needed = sum(tensor.nbytes for tensor in tensors.values())
        raise CheckpointError(
            f"{path}: could not write the checkpoint of step {metadata.step}: {error}; "
            f"it needs {needed:,} bytes, {_free_bytes(path.parent)} are free"
        ) from error


def _tensors(
    model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, kept: bool
) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole; {} unless they are to be kept: this process gave its parts."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in ema.state_dict().items()}
    weights = dict(model.named_parameters())
    for name in _parameter_names(model, optimizer):
        states = optimizer.state.get(weights[name], {})
        tensors |= {f"optimizer.{name}.{key}": tensor for key, tensor in states.items()}
    result = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if kept:  # what was gathered leaves the device at once
            result[name] = full.cpu().contiguous()
    return result


def _fill(network: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Copy the tensors whose names begin with `prefix` into a network's, one after the other."""
    with torch.no_grad():
        for name, target in network.state_dict().items():
            target.copy_(placed_like(tensors[prefix + name], target))


def _expected(
    model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> dict[str, Tensor]:
    """What a checkpoint of that step holds: tensors of its names, shapes and dtypes, with other values.

    The loss reaches every weight, so AdamW knows all of them after a step, and none before.
    """
    expected = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    expected |= {f"ema.{name}": tensor for name, tensor in ema.state_dict().items()}
    weights = dict(model.named_parameters())
    for name in _parameter_names(model, optimizer) if step else ():
        expected[f"optimizer.{name}.step"] = torch.zeros(())
        expected |= {f"optimizer.{name}.{moment}": weights[name] for moment in ("exp_avg", "exp_avg_sq")}
    return expected


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names in the order of the optimizer's state: an index means nothing once a layer was added."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _read(path: Path, prefix: str | None = "") -> tuple[Metadata, dict[str, Tensor]]:
    """Metadata, and the tensors whose names begin with `prefix` (None: no tensors)."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            names = [name for name in file.keys() if prefix is not None and name.startswith(prefix)]  # noqa: SIM118
            # They lie in the mapped file, however large: to be copied one after the other.
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: not a complete safetensors file ({error}); truncated, or written by another program? "
            f"Delete it to go on from the checkpoint before, if there is one"
        ) from error
    if METADATA_KEY not in texts:
        raise CheckpointError(
            f"{path}: a safetensors file without {METADATA_KEY!r} metadata, so no checkpoint of imf.train"
        )
    try:
        values = json.loads(texts[METADATA_KEY])
        if values.pop("format") != FORMAT:
            raise ValueError(f"this version reads format {FORMAT}")
        metadata = Metadata(**values)
        _check_metadata(metadata)
        metadata = replace(metadata, config=from_dict(values["config"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: written by another version of imf.train: {error}") from error
    return metadata, tensors


def _check_metadata(metadata: Metadata) -> None:
    """ValueError unless the values, all but the configuration's, are of the types that `Metadata` names."""
    m, elapsed = metadata, metadata.elapsed
    texts = {
        name: isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
        for name, value in (("gemm_choices", m.gemm_choices), ("environment", m.environment))
    }
    threads = m.environment.get("threads", "") if texts["environment"] else ""
    for name, fits, wanted in (
        ("step", type(m.step) is int and m.step >= 0, "an integer of at least 0"),
        ("elapsed", isinstance(elapsed, (int, float)) and 0 <= elapsed < math.inf, "seconds"),
        ("precision", m.precision in tuple(DTYPES), f"one of {', '.join(DTYPES)}"),
        ("gemm_choices", texts["gemm_choices"], "texts by name"),
        ("environment", threads.isdecimal() and int(threads) > 0, "texts by name, threads a number"),
    ):
        if not fits:
            raise ValueError(f"{name} must be {wanted}, got {getattr(m, name)!r}")


def _check_same(path: Path, got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """CheckpointError, listing the first differences, unless names, shapes and dtypes are the expected."""
    have, wanted = ({name: _form(tensor) for name, tensor in tensors.items()} for tensors in (got, expected))
    names = [*wanted, *(have.keys() - wanted.keys())]
    different = [name for name in names if wanted.get(name) != have.get(name)]
    if different:
        lines = [
            f"  {name}: checkpoint {have.get(name, 'has none')}, network {wanted.get(name, 'has none')}"
            for name in different[:5]
        ]
        more = [f"  and {len(different) - 5} more"] if len(different) > 5 else []
        raise CheckpointError(
            "\n".join([f"{path}: a checkpoint of another network, or not whole:", *lines, *more])
        )


def _form(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _select(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _free_bytes(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "an unknown number"


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

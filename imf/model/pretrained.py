"""A trained network as an object and as a folder: it draws images by itself, `save_pretrained` writes it.

A folder holds two files, by the names that other libraries use: `config.json`, the network's shape, the dtype
of its products, how to sample it and the SHA-256 of the weights; `model.safetensors`, its weights by name. A
folder that is half written, or of two networks, has another SHA-256 and is refused. Nothing is unpickled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from imf.io import check_names, naming, read_json, read_torch, replacing, sha256, write_json
from imf.model.config import IMFConfig, check_guidance
from imf.model.sampler import check_inputs_of, sample_labels
from imf.program import UserError
from imf.tensors import check_same, not_finite, writing

CONFIG, WEIGHTS = "config.json", "model.safetensors"
RUN = "checkpoints"  # in the folder of a run
FORMAT = 1  # of the folder; raise it when an older version would read it wrongly
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}  # dtypes of products by the name in a file
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights in a file
MOST_WEIGHTS = 2**34  # of a network, 64 GiB

Network = TypeVar("Network", bound="Pretrained")


@dataclass(frozen=True)
class Sampling:
    """How a trained network is sampled, and what its samples are.

    omega, t_min, t_max: guidance unless told otherwise.  class_names: a name per label, none if unknown.
    autoencoder: `imf.evaluation.vae.digest` of the one that decodes its latents; "" if unknown or none.

    Raises: ValueError, naming it, for a value of another type or out of range.
    """

    omega: float = 1.0
    t_min: float = 0.0
    t_max: float = 1.0
    class_names: tuple[str, ...] = ()
    autoencoder: str = ""

    def __post_init__(self) -> None:
        for name in ("omega", "t_min", "t_max"):
            if not isinstance(getattr(self, name), (int, float)):
                raise ValueError(f"{name} must be a number, got {getattr(self, name)!r}")
        check_guidance(self.omega, self.t_min, self.t_max)
        if not isinstance(self.autoencoder, str):
            raise ValueError(f"autoencoder must be a text, got {self.autoencoder!r}")
        names = self.class_names
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"class_names must be texts, a name per label, got {names!r:.80}")
        object.__setattr__(self, "class_names", tuple(names))  # JSON has lists

    def check(self, config: IMFConfig) -> None:
        """Raises UserError unless it fits a network."""
        check_inputs_of(config, self.omega, self.t_min, self.t_max)
        if len(self.class_names) not in (0, config.num_classes):
            raise UserError(
                f"class_names must be a name for each of {config.num_classes} classes, or none, "
                f"got {len(self.class_names)}"
            )


class Pretrained(nn.Module):
    """Base of the networks: sampling by labels, and folders of weights.

    sampling: guidance of samples, names of classes; `imf.load` takes them from the run.
    """

    config: Any
    compute_dtype: torch.dtype | None
    sampling: Sampling = Sampling()

    def generate(
        self,
        labels: Tensor | Sequence[int] | Sequence[str],
        *,
        steps: int = 1,
        omega: float | None = None,
        t_min: float | None = None,
        t_max: float | None = None,
        seed: int | torch.Generator | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Samples an image, or the latents of one, per label: [N, C, H, W] in float32, data in [-1, 1].

        Args:
            labels: [N] integers, num_classes for no class; or names of classes, where they are known.
            steps: network calls per image.
            omega, t_min, t_max: guidance scale, at least 1, and interval; by default those of `sampling`.
            seed: of the noise: the images are those of `python -m imf.sample --seed`, in order; a generator;
                or None for PyTorch's own one, see `torch.manual_seed`.
            batch_size: images at a time, default all; the noise does not depend on it.

        Raises:
            UserError: labels that are not known, steps below 1, guidance out of range or no input of the
                network.
        """
        given = {"omega": omega, "t_min": t_min, "t_max": t_max}
        guidance = {name: getattr(self.sampling, name) if x is None else x for name, x in given.items()}
        if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
            raise UserError(f"generate: batch_size must be an integer of at least 1, got {batch_size!r}")
        options: Any = {"steps": steps, **guidance}
        return sample_labels(self, self.labels_of(labels), seed=seed, batch_size=batch_size, **options)

    def labels_of(self, labels: Tensor | Sequence[int] | Sequence[str]) -> Tensor:
        """Returns labels [N] int64 on the CPU, of integers or names of classes; UserError if unknown."""
        names, count = self.sampling.class_names, self.config.num_classes
        if not isinstance(labels, Tensor):
            if isinstance(labels, (str, int)):
                raise UserError(f"labels must be a list, one per image, got {labels!r}; pass [{labels!r}]")
            if unknown := [x for x in labels if isinstance(x, str) and x not in names]:
                known = f"one of {', '.join(names[:5])}, …" if names else "integers, no names are known"
                raise UserError(f"labels must be {known}, got {unknown[0]!r}")
            numbers = [names.index(x) if isinstance(x, str) else x for x in labels]
            try:
                labels = torch.tensor(numbers, dtype=torch.int64 if not numbers else None)
            except (TypeError, ValueError, RuntimeError) as error:
                raise UserError(f"labels must be integers or names of classes, got {labels!r:.80}") from error
        if labels.dtype not in (torch.int64, torch.int32) or labels.dim() != 1 or not len(labels):
            got = f"{list(labels.shape)} in {labels.dtype}"
            raise UserError(f"labels must be [N] integers, one per image, N at least 1, got {got}")
        labels = labels.detach().to("cpu", torch.int64)
        least, most = int(labels.min()), int(labels.max())
        if least < 0 or most > count:
            raise UserError(f"labels must be within 0 and {count} (no class), got {least} to {most}")
        return labels

    def save_pretrained(
        self, folder: str | Path, *, dtype: torch.dtype = torch.float32, v_head: bool = True
    ) -> None:
        """Writes weights and configuration into a folder, which is made, each file completely or not at all.

        `imf.load` reads it. A folder that holds a network already gets this one.

        dtype: of the weights there; loading makes them float32 again.
        v_head: with the v-head's blocks, which sampling does not need.
        Raises: UserError for another dtype, weights that are not finite or sharded, or a failed write.
        """
        folder = Path(folder)
        if dtype not in DTYPES:
            raise UserError(
                f"save_pretrained: dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}"
            )
        if (folder / RUN).is_dir():
            raise UserError(f"save_pretrained: {folder} is the folder of a run: choose another, or one in it")
        self.sampling.check(self.config)
        precision = precision_of(self)
        state = {n: x for n, x in self.state_dict().items() if v_head or not n.startswith("v_blocks.")}
        if any(hasattr(x, "full_tensor") for x in state.values()):
            raise UserError(
                "save_pretrained: the weights are sharded over processes; pass the run's folder to imf.load, "
                "and save the network that it returns"
            )
        weights = {name: x.detach().to("cpu", dtype).contiguous() for name, x in state.items()}
        if name := not_finite(weights):
            raise UserError(f"{folder}: not written: {name} must be finite in {dtype}, got NaN or infinity")
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
        path = folder / WEIGHTS
        with writing(path, "the weights", weights), replacing(path, synced=True) as temporary:
            save_file(weights, temporary, metadata={"format": "pt"})  # what transformers looks for
        values = {
            "format": FORMAT,
            "network": asdict(self.config),
            "precision": precision,
            "sampling": asdict(self.sampling),
            "sha256": sha256(path),
        }
        write_json(folder / CONFIG, values)

    @classmethod
    def from_pretrained(cls: type[Network], folder: str | Path) -> Network:
        """Builds the network of a folder that `save_pretrained` wrote: frozen, float32, on the CPU.

        `imf.load` does the same whatever the network, and reads runs and checkpoints too.

        Raises: UserError, naming the file, for anything that is missing, damaged or of another network.
        """
        folder = Path(folder)
        config, precision, sampling, digest = _read_config(folder)
        if (found := sha256_of(folder / WEIGHTS)) != digest:
            raise UserError(
                f"{folder / WEIGHTS}: damaged, or not the weights of {CONFIG}: SHA-256 must be "
                f"{digest[:16]}…, got {found[:16]}…; copy the folder again"
            )
        weights = read_torch(folder / WEIGHTS)
        for name, x in weights.items():
            if x.dtype not in DTYPES:
                wanted = ", ".join(map(str, DTYPES))
                raise UserError(f"{folder / WEIGHTS}: {name} must be one of {wanted}, got {x.dtype}")
        if wrong := not_finite(weights):
            raise UserError(f"{folder / WEIGHTS}: {wrong} must be finite, got NaN or infinity")
        network = with_weights(folder / WEIGHTS, cls, config, weights)
        network.compute_dtype, network.sampling = PRECISIONS[precision], sampling
        return network


def precision_of(network: Pretrained) -> str:
    """Returns the name of the dtype of a network's products; UserError if files have none for it."""
    for name, dtype in PRECISIONS.items():
        if dtype == (network.compute_dtype or torch.float32):
            return name
    wanted = ", ".join(map(str, PRECISIONS.values()))
    raise UserError(f"compute_dtype must be one of {wanted}, got {network.compute_dtype}")


def is_pretrained(folder: Path) -> bool:
    """Returns whether a folder is one of `save_pretrained`, not a run's, which has a config.json too."""
    return not (folder / RUN).is_dir() and any((folder / name).is_file() for name in (CONFIG, WEIGHTS))


def read_network_config(folder: Path) -> IMFConfig:
    """Reads the shape of the network in a folder; UserError as `Pretrained.from_pretrained`."""
    return _read_config(folder)[0]


def with_weights(
    path: Path,
    make: Callable[[IMFConfig], Network],
    config: IMFConfig,
    weights: Mapping[str, Tensor],
) -> Network:
    """Makes a network around float32 copies of weights, frozen; without v-head if its blocks are not there.

    Raises: UserError, naming the path, unless names and shapes are the network's; ValueError from `make`.
    """
    empty = expected_weights(path, make, config, weights)
    found = {name: x.to(torch.float32, copy=True) for name, x in weights.items()}
    check_same(path, found, empty)
    with torch.device("meta"):
        network = make(config)
    if len(getattr(network, "v_blocks", ())) and not has_v_blocks(weights):
        network.v_blocks = NoVHead()
    network.load_state_dict(found, assign=True)
    return network.requires_grad_(False)


def expected_weights(
    path: Path, make: Callable[[IMFConfig], nn.Module], config: IMFConfig, found: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Returns the weights, without memory, that a network has, without v-head's blocks if `found` lack them.

    It comes before anything of these sizes is made: the tensors' own are true, the file is as long.
    Raises: UserError, naming the path, for a configuration of another network.
    """
    try:
        if config.depth > len(found):
            raise ValueError(f"depth must be at most the number of weights, {len(found)}, got {config.depth}")
        empty = empty_weights(make, config)
    except ValueError as error:
        raise UserError(f"{path}: its configuration is of another network: {error}") from error
    absent = () if has_v_blocks(found) else "v_blocks."
    return {name: x for name, x in empty.items() if not name.startswith(absent)}


def has_v_blocks(state: Mapping[str, Tensor]) -> bool:
    """Returns whether weights include the v-head's blocks, which those for sampling lack."""
    return any(name.startswith("v_blocks.") for name in state)


def empty_weights(make: Callable[[IMFConfig], nn.Module], config: IMFConfig) -> dict[str, Tensor]:
    """Returns a network's weights without memory, on the meta device: names, shapes and dtypes.

    Raises: ValueError for sizes that no machine holds.
    """
    try:
        with torch.device("meta"):
            weights: dict[str, Tensor] = make(config).state_dict()
    except (RuntimeError, OverflowError, TypeError) as error:  # PyTorch's, of sizes beyond 64 bits
        raise ValueError(f"network: no tensors can be of the sizes of {config}") from error
    if (count := sum(x.numel() for x in weights.values())) > MOST_WEIGHTS:
        raise ValueError(
            f"network: hidden_size {config.hidden_size}, depth {config.depth}, mlp_ratio "
            f"{config.mlp_ratio:g}, num_classes {config.num_classes} must make at most {MOST_WEIGHTS:,} "
            f"weights, got {count:,}"
        )
    return weights


class NoVHead(nn.ModuleList):
    """Stand-in for the blocks of a v-head whose weights are not there."""

    def __iter__(self) -> Iterator[nn.Module]:
        raise UserError("the v-head was asked of a network whose weights are for sampling, without it")


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file; UserError if it is not there or cannot be read."""
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(f"{path}: could not be read: {error.strerror}") from error


def _read_config(folder: Path) -> tuple[IMFConfig, str, Sampling, str]:
    """Reads config.json: shape, precision, sampling, SHA-256 of the weights; UserError if it is not ours."""
    path = folder / CONFIG
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; networks are read from local folders, from no hub: download it first"
        )
    if not path.exists():
        raise UserError(f"{folder}: no {CONFIG} in this folder, which save_pretrained writes")
    values = read_json(path)
    if "network" not in values or "format" not in values:
        raise UserError(f"{path}: of another program: wanted the configuration that save_pretrained writes")
    if values["format"] != FORMAT or type(values["format"]) is not int:
        got = str(values["format"])[:20]
        raise UserError(f"{path}: this version of imf reads format {FORMAT}, got {got}: use a newer imf")
    try:
        check_names(values, ("format", "network", "precision", "sampling", "sha256"))
        check_names(values["network"], [x.name for x in fields(IMFConfig)], "network.")
        check_names(values["sampling"], [x.name for x in fields(Sampling)], "sampling.")
        if values["precision"] not in tuple(PRECISIONS):
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {values['precision']!r}")
        digest = values["sha256"]
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ValueError(f"sha256 must be 64 hexadecimal digits, got {digest!r:.80}")
        config, sampling = IMFConfig(**values["network"]), Sampling(**values["sampling"])
        sampling.check(config)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{path}: {error}") from error
    return config, values["precision"], sampling, digest

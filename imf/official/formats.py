"""Checkpoint files of the official programs, read as arrays by name; nothing in them is unpickled by Python.

The PyTorch program's `.pth` is read with `weights_only`. The JAX programs' folders are Flax's: either Orbax
writes them (arrays in a folder `checkpoint_<step>`) or Flax itself (msgpack in a file of that name). Both
hold a training state: `params`, `ema_params`, `step`, and AdamW's moments, which Orbax need not read.
"""

from __future__ import annotations

import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from imf.program import UserError

NEEDS_JAX = "JAX checkpoints need orbax-checkpoint and flax: pip install -e '.[jax]'"
# What a folder that Orbax wrote has: of its versions from 0.4 on one or the other.
_ORBAX_FILES = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "checkpoint")


@dataclass(frozen=True)
class Official:
    """Weights by official name. flax: whether the names are Flax's. step: of training, 0 if not known.

    sets: "ema", the average, and "model", the weights themselves, or one of them; arrays by name, or a tree.
    """

    sets: dict[str, Mapping[str, Any]]
    flax: bool
    step: int = 0


def read(source: Path) -> Official:
    """The weights in a `.pth`, `.pt` or `.safetensors`, or in a JAX checkpoint: a folder, a file, or a .zip.

    Raises: UserError if there is none, it is damaged, or a package that reads it is not installed.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    if source.suffix in (".pth", ".pt", ".safetensors"):
        return Official({"ema": read_torch(source)}, flax=False)
    if source.suffix != ".zip":
        return _read_jax(source)
    # Beside the archive: a full checkpoint of XL is larger than many a /tmp.
    with tempfile.TemporaryDirectory(dir=source.parent, prefix=f".{source.name}.") as folder:
        try:
            with zipfile.ZipFile(source) as archive:
                needed, free = sum(file.file_size for file in archive.infolist()), disk_usage(folder).free
                if needed > free:
                    raise OSError(f"it needs {needed:,} bytes there, {free:,} are free")
                archive.extractall(folder)
        # RuntimeError: of an encrypted one, or one that is compressed in another way
        except (OSError, zipfile.BadZipFile, EOFError, RuntimeError, zlib.error) as error:
            raise UserError(f"{source}: could not be unpacked: {error}") from error
        try:
            return _read_jax(Path(folder))
        except UserError as error:  # by the name that the user knows
            raise UserError(str(error).replace(folder, str(source))) from error


def read_torch(path: Path) -> dict[str, Tensor]:
    """A state dict from a file of tensors by name; UserError for anything else."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: wanted a file, got a folder or a device")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except Exception as error:  # torch's unpickler fails in many ways on what is none of its files
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise UserError(
            f"{path}: no file of plain tensors: {type(error).__name__}: {reason}; nothing else is unpickled"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(x, Tensor) for x in state.values()):
        raise UserError(f"{path}: wanted tensors by name, got {_content(state)}")
    for name, x in state.items():
        if not isinstance(name, str) or x.layout != torch.strided or x.is_quantized or x.is_meta:
            raise UserError(f"{path}: wanted plain tensors by name, got {name!r}: {x.layout}, {x.dtype}")
        if x.nbytes > x.untyped_storage().nbytes():  # a few bytes, repeated to any size
            raise UserError(
                f"{path}: {name!r} must have the {x.nbytes:,} bytes of its shape {list(x.shape)}, "
                f"got {x.untyped_storage().nbytes():,}"
            )
    return dict(state)


def _content(state: Any) -> str:
    if not isinstance(state, Mapping):
        return f"a {type(state).__name__}"
    return ", ".join(f"{name}: {type(x).__name__}" for name, x in list(state.items())[:5])


def _read_jax(source: Path) -> Official:
    path = _newest(source)
    tree = _read_orbax(path) if path.is_dir() else _read_msgpack(path)
    names = {"ema_params": "ema", "params": "model"}
    sets = {ours: tree[name] for name, ours in names.items() if tree.get(name)}
    if not sets:
        raise UserError(f"{path}: wanted params or ema_params in it, got {', '.join(map(str, tree))}")
    return Official(sets, flax=True, step=int(np.asarray(tree.get("step", 0))))


def _newest(source: Path) -> Path:
    """The checkpoint in a folder: itself, `checkpoint_<step>` of the highest step, or the one deeper down."""
    if source.is_file() or any((source / name).exists() for name in _ORBAX_FILES):
        return source
    inside = [path for path in source.iterdir() if not path.name.startswith(".")]
    numbered = {
        int(match[1]): path for path in inside if (match := re.fullmatch(r"checkpoint_(\d+)", path.name))
    }
    if numbered:
        return numbered[max(numbered)]
    folders = [path for path in inside if path.is_dir() and path.name != "__MACOSX"]
    if len(folders) == 1:
        return _newest(folders[0])
    names = ", ".join(path.name for path in inside[:5]) or "nothing"
    raise UserError(f"{source}: wanted checkpoint_<step> in it, got {names}")


def _read_orbax(path: Path) -> Mapping[str, Any]:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # arrays in memory are all that is wanted of JAX
    try:
        import jax
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise UserError(f"{path}: {NEEDS_JAX} ({error})") from error
    path = path.absolute()
    try:
        with ocp.PyTreeCheckpointer() as reader:
            if (path / "checkpoint").is_file():  # its old form: one file holds all arrays
                whole: Mapping[str, Any] = reader.restore(path)
                return whole
            tree = reader.metadata(path).item_metadata.tree
            wanted = {name: tree[name] for name in ("params", "ema_params", "step") if name in tree}
            restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            options = ocp.args.PyTreeRestore(item=wanted, restore_args=restore, partial_restore=True)
            result: Mapping[str, Any] = reader.restore(path, args=options)
    except Exception as error:  # Orbax's and tensorstore's errors have no common class
        raise UserError(f"{path}: Orbax cannot read it: {str(error)[:500]}") from error
    return result


def _read_msgpack(path: Path) -> Mapping[str, Any]:
    try:
        from flax.serialization import msgpack_restore
    except ImportError as error:
        raise UserError(f"{path}: {NEEDS_JAX} ({error})") from error
    try:
        tree = msgpack_restore(path.read_bytes())
    except Exception as error:  # msgpack's and NumPy's, of a damaged or foreign file
        raise UserError(f"{path}: Flax cannot read it: {str(error)[:500]}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: wanted a Flax training state, got a {type(tree).__name__}")
    return tree

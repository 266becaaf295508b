"""Checkpoint files of the official programs, read as arrays by name; nothing in them is unpickled by Python.

The PyTorch program's `.pth` is read with `weights_only`. The JAX programs' folders are Flax's: either Orbax
writes them (arrays in a folder `checkpoint_<step>`) or Flax itself (msgpack in a file of that name). Both
hold a training state: `params`, `ema_params`, `step`, and AdamW's moments, which Orbax need not read.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from typing import Any

import numpy as np

from imf.io import read_torch
from imf.program import UserError

NEEDS_JAX = "JAX checkpoints need orbax-checkpoint and flax: pip install -e '.[jax]'"
# Files of a folder that Orbax wrote: of its versions from 0.4 on one or the other.
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
    """Read the weights in a `.pth`, `.pt`, `.safetensors`, or a JAX checkpoint: a folder, a file, or a .zip.

    Raises: UserError if there is none, it is damaged, or a package that reads it is not installed.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    if source.suffix in (".pth", ".pt", ".safetensors"):
        return Official({"ema": read_torch(source)}, flax=False)
    if source.suffix != ".zip":
        return _read_jax(source)
    # Next to the archive: a full checkpoint of XL is larger than many a /tmp.
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


def _read_jax(source: Path) -> Official:
    path = _newest(source)
    tree = _read_orbax(path) if path.is_dir() else _read_msgpack(path)
    if not isinstance(tree, Mapping):
        raise UserError(f"{path}: wanted a Flax training state, got a {type(tree).__name__}")
    names = {"ema_params": "ema", "params": "model"}
    sets = {ours: tree[name] for name, ours in names.items() if isinstance(tree.get(name), Mapping)}
    if not sets:
        raise UserError(f"{path}: wanted params or ema_params in it, got {', '.join(map(str, tree))}")
    with _reading(path, "NumPy"):
        return Official(sets, flax=True, step=int(np.asarray(tree.get("step", 0))))


def _newest(source: Path) -> Path:
    """Find the checkpoint in a folder: itself, the newest `checkpoint_<step>`, or the one deeper down."""
    if source.is_file() or any((source / name).exists() for name in _ORBAX_FILES):
        return source
    inside = [path for path in source.iterdir() if not path.name.startswith(".")]
    matches = {path: re.fullmatch(r"checkpoint_(\d+)", path.name) for path in inside}
    if numbered := {int(match[1]): path for path, match in matches.items() if match}:
        return numbered[max(numbered)]
    folders = [path for path in inside if path.is_dir() and path.name != "__MACOSX"]
    if len(folders) == 1:
        return _newest(folders[0])
    names = ", ".join(path.name for path in inside[:5]) or "nothing"
    raise UserError(f"{source}: wanted checkpoint_<step> in it, got {names}")


@contextlib.contextmanager
def _reading(path: Path, program: str) -> Iterator[None]:
    """Turn errors of a JAX package, which have no common class, into UserErrors that name the file."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{path}: {NEEDS_JAX} ({error})") from error
    except Exception as error:
        raise UserError(f"{path}: {program} cannot read it: {str(error)[:500]}") from error


def _read_orbax(path: Path) -> Any:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # all that is wanted of JAX is arrays in memory
    with _reading(path, "Orbax"):
        import jax
        import orbax.checkpoint as ocp

        path = path.absolute()
        with ocp.PyTreeCheckpointer() as reader:
            if (path / "checkpoint").is_file():  # its old form: one file holds all arrays
                return reader.restore(path)
            tree = reader.metadata(path).item_metadata.tree
            wanted = {name: tree[name] for name in ("params", "ema_params", "step") if name in tree}
            restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            options = ocp.args.PyTreeRestore(item=wanted, restore_args=restore, partial_restore=True)
            return reader.restore(path, args=options)


def _read_msgpack(path: Path) -> Any:
    with _reading(path, "Flax"):
        from flax.serialization import msgpack_restore

        return msgpack_restore(path.read_bytes())

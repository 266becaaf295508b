"""Checkpoint files of the official programs: read into state dicts of our networks, and written from them.

Nothing in them is unpickled by Python: the PyTorch program's `.pth` is read with `weights_only`. The JAX
programs' folders are Flax's: either Orbax writes them (arrays in a folder `checkpoint_<step>`) or Flax itself
(msgpack in a file of that name). Both hold a training state: `params`, `ema_params`, `step`, and AdamW's
moments, which Orbax need not read.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from shutil import disk_usage
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from imf.io import naming, read_torch, replacing
from imf.model.config import IMFConfig
from imf.model.pretrained import Pretrained, expected_weights, has_v_blocks
from imf.networks import build
from imf.official.names import from_official, shape_of, to_official, to_tensors
from imf.program import UserError
from imf.tensors import check_same

NEEDS_JAX = "JAX checkpoints need orbax-checkpoint and flax: pip install -e '.[jax]'"
# Files of a folder that Orbax wrote: of its versions from 0.4 on one or the other.
_ORBAX_FILES = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "checkpoint")


def import_weights(
    source: Path, kind: str | None, *, input_size: int, num_heads: int | None
) -> tuple[IMFConfig, dict[str, dict[str, Tensor]], int]:
    """Reads an official checkpoint: configuration of the network, fp32 state dicts by kind, training step.

    kind: "ema" or "model", default both.
    input_size, num_heads: as `imf.official.names.shape_of` takes them.
    Raises: UserError, naming the source, for weights that are not there, not finite or not a network's.
    """
    sets, step = _read(source)
    if kind and kind not in sets:
        raise UserError(f"--weights: there are {', '.join(sets)} in {source}, got {kind}")
    configs, states = [], {}
    for name in [kind] if kind else sets:
        try:
            tensors = to_tensors(sets[name])
            configs.append(shape_of(tensors, input_size=input_size, num_heads=num_heads))
            for n, x in tensors.items():  # before they are joined, which turns integers into the others' type
                if not x.is_floating_point() or not x.isfinite().all():
                    got = "NaN or infinity" if x.is_floating_point() else x.dtype
                    raise UserError(f"weights must be finite floating-point numbers, got {got} in {n}")
            converted = from_official(tensors)
        except (TypeError, ValueError, IndexError, RuntimeError) as error:  # of shapes that do not fit
            raise UserError(f"{source}: {error}") from error
        expected = expected_weights(source, build, configs[-1], converted)
        # Copies: weights of a file may share memory, which safetensors does not write.
        states[name] = {n: x.to(torch.float32, copy=True) for n, x in converted.items()}
        check_same(f"{source}, {name} weights", states[name], expected)
    if len(set(configs)) > 1:
        raise UserError(f"{source}: its sets of weights are of two networks: {configs}")
    return configs[0], states, step


def export_weights(source: Path, out: Path, network: Pretrained, v_head: bool) -> int:
    """Writes a network's weights by their official names into a .pth or .safetensors; returns their number.

    v_head: keep its blocks.
    Raises: UserError for another network than iMF's, or one without v-head; OSError if it cannot be written.
    """
    if network.config.block == "plain":
        raise UserError(
            f"{source}: the official PyTorch program has iMF's own networks alone, got {network.config}"
        )
    state = network.state_dict()
    if v_head and not has_v_blocks(state):
        raise UserError(f"--v-head: there is none in {source}, whose weights are for sampling")
    kept = {name: x for name, x in state.items() if v_head or not name.startswith("v_blocks.")}
    official = to_official(kept, network.config)
    with naming(out), replacing(out) as temporary:
        (torch.save if out.suffix == ".pth" else save_file)(official, temporary)
    return len(official)


def _read(source: Path) -> tuple[dict[str, Mapping[str, Any]], int]:
    """Reads a `.pth`, `.pt`, `.safetensors`, or a JAX checkpoint: a folder, a file, or a .zip.

    Returns: tensors or trees of arrays under "ema", the average, and "model", or one of them; training step,
        0 if it is not known.
    Raises: UserError if there is none, it is damaged, or a package that reads it is not installed.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    if source.suffix in (".pth", ".pt", ".safetensors"):
        return {"ema": read_torch(source)}, 0
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


def _read_jax(source: Path) -> tuple[dict[str, Mapping[str, Any]], int]:
    path = _newest(source)
    tree = _read_orbax(path) if path.is_dir() else _read_msgpack(path)
    if not isinstance(tree, Mapping):
        raise UserError(f"{path}: wanted a Flax training state, got a {type(tree).__name__}")
    names = {"ema_params": "ema", "params": "model"}
    sets = {ours: tree[name] for name, ours in names.items() if isinstance(tree.get(name), Mapping)}
    if not sets:
        raise UserError(f"{path}: wanted params or ema_params in it, got {', '.join(map(str, tree))}")
    with _reading(path, "NumPy"):
        return sets, int(np.asarray(tree.get("step", 0)))


def _newest(source: Path) -> Path:
    """Finds the checkpoint in a folder: itself, the newest `checkpoint_<step>`, or the one deeper down."""
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
    """Turns errors of a JAX package, which have no common class, into UserErrors that name the file."""
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

"""Files that appear whole or not at all, files that are regular, folders of one process, digests."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from imf.program import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_CHUNK = 1 << 22  # bytes


class FolderInUse(OSError):
    """Another process writes to a folder; the message names both."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within it no other process may write to the folder that asks in the same way.

    The operating system holds the lock (flock on the file `.lock`, in which the holder's number lies) until
    this process ends, however it ends: nothing has to be removed after a crash. Where there are no such locks
    a warning says so.

    Raises: FolderInUse if another process has it; OSError if the file cannot be opened.
    """
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is None:
            _warn_of_no_lock(folder, f"{platform.system()} has no flock")
        else:
            _lock(folder, descriptor)
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
        raise FolderInUse(
            f"{folder}: {holder} is writing to this folder: wait until it ends, or end it"
        ) from None
    except OSError as error:  # some network file systems
        _warn_of_no_lock(folder, str(error))
        return
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)


def _warn_of_no_lock(folder: Path, reason: str) -> None:
    print(
        f"warning: {folder} cannot be locked ({reason}): let no other process write to it meanwhile",
        file=sys.stderr,
    )


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


class IrregularFile(OSError):
    """A path that is not a regular file; `reason` is the message without the path."""

    def __init__(self, path: Path, kind: str) -> None:
        self.reason = f"must be a regular file, got {kind}"
        super().__init__(f"{path}: {self.reason}")


def check_regular(path: Path) -> os.stat_result:
    """Status of a regular file. To open a FIFO would wait for a writer, to read a device might never end.

    Raises: IrregularFile for anything else, OSError if there is nothing or it cannot be reached.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise IrregularFile(path, _KINDS.get(stat.S_IFMT(status.st_mode), "something else"))
    return status


def check_target(path: Path) -> None:
    """Whether a file can get this name, asked before the work that fills it.

    Raises: IrregularFile if something else is there, which a rename would destroy; OSError without a folder.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: no such folder: {path.parent}")
    if path.exists():
        check_regular(path)


@contextmanager
def replacing(path: Path, *, synced: bool = False) -> Iterator[Path]:
    """A temporary path to write to; what is there when the block ends well gets the name `path`.

    A block that fails leaves no temporary file; a process that is killed leaves the old file or the new one,
    and perhaps a temporary one, named .<name>.tmp.

    synced: file and name are on the disk when this ends.
    Raises: what `check_target` does, before the block begins.
    """
    check_target(path)
    temporary = path.with_name(f".{path.name}.tmp")  # same folder, so the rename stays inside one file system
    try:
        yield temporary
        if synced:
            sync(temporary)
        os.replace(temporary, path)
        if synced:
            sync(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within it an OSError gets the file's name: that of a write, on a full disk, has none."""
    try:
        yield
    except IrregularFile:  # names it
        raise
    except OSError as error:
        raise OSError(f"{path}: could not be written: {error}") from error


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file whole or not at all."""
    with naming(path), replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; OSError if it cannot be read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_torch(path: Path) -> dict[str, Tensor]:
    """Read a state dict on the CPU from `.safetensors`, or from PyTorch's format with `weights_only`.

    Raises: UserError unless the file holds plain tensors by name, each with all bytes of its shape.
    """
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
    if not isinstance(state, Mapping):
        raise UserError(f"{path}: wanted tensors by name, got a {type(state).__name__}")
    if not all(isinstance(x, Tensor) for x in state.values()):
        content = ", ".join(f"{name}: {type(x).__name__}" for name, x in list(state.items())[:5])
        raise UserError(f"{path}: wanted tensors by name, got {content}")
    for name, x in state.items():
        if not isinstance(name, str) or x.layout != torch.strided or x.is_quantized or x.is_meta:
            raise UserError(f"{path}: wanted plain tensors by name, got {name!r}: {x.layout}, {x.dtype}")
        if x.nbytes > x.untyped_storage().nbytes():  # a few bytes, repeated to any size
            raise UserError(
                f"{path}: {name!r} must have the {x.nbytes:,} bytes of its shape {list(x.shape)}, "
                f"got {x.untyped_storage().nbytes():,}"
            )
    return dict(state)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Atomic replacement of files, checks for regular files, locks of folders, digests."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import stat
import sys
from collections.abc import Collection, Iterator, Mapping
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


class FolderInUse(OSError):
    """Another process writes to a folder; the message names both."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a folder against other processes that lock it in the same way.

    The operating system holds the lock (flock on the file `.lock`, which names the holder) until this process
    ends, however it ends: nothing has to be removed after a crash. Without such locks a warning says so.

    Raises: FolderInUse if another process has it; OSError if the file cannot be opened or written.
    """
    with (folder / ".lock").open("a+b", buffering=0) as file:
        try:
            if fcntl is None:
                raise OSError(f"{platform.system()} has no flock")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).decode(errors="replace").strip() or "another process"
            raise FolderInUse(
                f"{folder}: {holder} is writing to this folder: wait until it ends, or end it"
            ) from None
        except OSError as error:  # some network file systems
            warning = f"{folder} cannot be locked ({error}): let no other process write to it meanwhile"
            print(f"warning: {warning}", file=sys.stderr)
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
        yield


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


class IrregularFile(OSError):
    """Path that is not a regular file; `reason` is the message without the path."""

    def __init__(self, path: Path, kind: str) -> None:
        self.reason = f"must be a regular file, got {kind}"
        super().__init__(f"{path}: {self.reason}")


def check_regular(path: Path) -> os.stat_result:
    """Returns the status of a regular file. Opening a FIFO would wait, reading a device might never end.

    Raises: IrregularFile for anything else, OSError if there is nothing or it cannot be reached.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise IrregularFile(path, _KINDS.get(stat.S_IFMT(status.st_mode), "something else"))
    return status


def check_target(path: Path) -> None:
    """Checks that a file can get this name, before the work that fills it.

    Raises: IrregularFile if something else is there, which a rename would destroy; OSError without a folder.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: no such folder: {path.parent}")
    if path.exists():
        check_regular(path)


@contextmanager
def replacing(path: Path, *, synced: bool = False) -> Iterator[Path]:
    """Yields a temporary path, and renames the file there to `path` if the block succeeds.

    A block that fails leaves no temporary file; a process that is killed leaves the old file or the new one,
    and perhaps a temporary one, named .<name>.tmp.

    synced: file and name are on the disk when this ends.
    Raises: the errors of `check_target`, before the block begins.
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
    """Adds the file's name to an OSError: one of a write, on a full disk, has none."""
    try:
        yield
    except IrregularFile:  # names it
        raise
    except OSError as error:
        raise OSError(f"{path}: could not be written: {error}") from error


def write_json(path: Path, values: Any) -> None:
    """Writes a complete JSON file or none."""
    with naming(path), replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file; UserError if it cannot be read or holds another value."""
    try:
        check_regular(path)
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be a JSON object, got {type(values).__name__}")
    return values


def check_names(values: Any, wanted: Collection[str], where: str = "", what: str = "configuration") -> None:
    """Raises ValueError unless a value that was read is a mapping of just these names.

    where: prefix of the names in the message, which begins with `what`.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where.rstrip('.') or what} must be names and values, got {values!r:.80}")
    missing, unknown = [n for n in wanted if n not in values], [n for n in values if n not in wanted]
    if missing or unknown:
        texts = (", ".join(f"{where}{name}" for name in names) or "nothing" for names in (missing, unknown))
        raise ValueError("{}: missing {}; unknown {}".format(what, *texts))


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal; OSError if it cannot be read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Returns sixteen digits that tell one set of weights from another, whatever file they came in."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def read_torch(path: Path) -> dict[str, Tensor]:
    """Reads a state dict on the CPU from `.safetensors`, or from PyTorch's format with `weights_only`.

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
    """Waits until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Files that appear whole or not at all, and their checksums."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from imf import files
from imf.data.dataset import DataError
from imf.files import replacing


def write_whole(path: Path, parts: Iterable[bytes | memoryview]) -> str:
    """Write the parts one after another to `path`; returns the SHA-256 of the file, in hexadecimal.

    The file appears under its name when all of it is on the disk, see `imf.files.replacing`.
    Raises: DataError, naming the bytes that are free, if it cannot be written (a full disk).
    """
    digest = hashlib.sha256()
    try:
        with replacing(path, synced=True) as temporary, temporary.open("wb") as file:
            for part in parts:
                digest.update(part)
                file.write(part)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise DataError(
            f"{path}: could not be written: {error}; {free_bytes(path.parent)} bytes are free there"
            + ("; make room and run the same command again: it goes on where it stopped" if full else "")
        ) from error
    return digest.hexdigest()


def write_json(path: Path, values: Any) -> str:
    """`values` as an indented JSON file, see `write_whole`."""
    return write_whole(path, [(json.dumps(values, indent=1) + "\n").encode()])


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; DataError if it cannot be read or is none."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable JSON file: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: must be a JSON object, got {type(values).__name__}")
    return values


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; DataError if it cannot be read."""
    try:
        return files.sha256(path)
    except OSError as error:
        raise DataError(f"{path}: could not be read: {error}") from error


def free_bytes(folder: Path) -> str:
    """Bytes free on the file system of `folder`, for messages."""
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "an unknown number of"

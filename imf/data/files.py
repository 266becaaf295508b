"""Files that appear whole or not at all, their checksums, and what is read from files that may be damaged."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import tokenize
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

from imf import io as files
from imf.io import check_regular, replacing
from imf.program import UserError


def write_whole(path: Path, parts: Iterable[bytes | memoryview]) -> str:
    """Write the parts one after another to `path`; returns the SHA-256 of the file, in hexadecimal.

    The file appears under its name when all of it is on the disk, see `imf.io.replacing`.
    Raises: UserError, naming the bytes that are free, if it cannot be written (a full disk).
    """
    digest = hashlib.sha256()
    try:
        with replacing(path, synced=True) as temporary, temporary.open("wb") as file:
            for part in parts:
                digest.update(part)
                file.write(part)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise UserError(
            f"{path}: could not be written: {error}; {free_bytes(path.parent)} bytes are free there"
            + ("; make room and run the same command again: it goes on where it stopped" if full else "")
        ) from error
    return digest.hexdigest()


def write_json(path: Path, values: Any) -> str:
    """`values` as an indented JSON file, see `write_whole`."""
    return write_whole(path, [(json.dumps(values, indent=1) + "\n").encode()])


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; UserError if it cannot be read or is none."""
    try:
        check_regular(path)
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be a JSON object, got {type(values).__name__}")
    return values


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; UserError if it cannot be read."""
    try:
        check_regular(path)
        return files.sha256(path)
    except OSError as error:
        raise UserError(f"{path}: could not be read: {error}") from error


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an open .npy file, which is left at its first value; ValueError if it is none."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"of version {version} of .npy; 1.0 and 2.0 are read")
    try:
        shape, fortran_order, dtype = readers[version](file)
    except (TypeError, SyntaxError, tokenize.TokenError, RecursionError) as error:  # of the parser in NumPy
        raise ValueError(f"a damaged header: {error}") from error
    if fortran_order and len(shape) > 1:
        raise ValueError("columns come first")
    return shape, dtype


def is_count(value: Any, least: int = 0) -> bool:
    """Whether a value of a JSON file is a whole number, at least `least`, that fits into 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def are_numbers(values: Any, count: int) -> bool:
    """Whether a value of a JSON file is a list of `count` finite numbers that fit into fp32."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 3e38 for x in values)
    )


def short(value: Any) -> str:
    """A value as it stands in a message: quoted, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def free_bytes(folder: Path) -> str:
    """Bytes free on the file system of `folder`, for messages."""
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "an unknown number of"

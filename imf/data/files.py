"""Files of packed data: written completely or not at all, checked when read, since they may be damaged."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import re
import shutil
import tokenize
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from imf.io import replacing
from imf.program import UserError

IDX_NAME = re.compile(r"ubyte|\bidx\d", re.IGNORECASE)  # in names of IDX files, as MNIST's are
Check = tuple[str, Callable[[Any], bool]]  # what a value must be, in words, and whether it is


def write_file(path: Path, *parts: bytes | memoryview) -> str:
    """Writes the parts one after another to `path`; returns the SHA-256 of the file, in hexadecimal.

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
        free = f"{shutil.disk_usage(path.parent).free:,} bytes are free there"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free += "; make room and run the same command again: it resumes where it stopped"
        raise UserError(f"{path}: could not be written: {error}; {free}") from error
    return digest.hexdigest()


def write_array(path: Path, array: NDArray[Any]) -> str:
    """Writes a C-contiguous array as .npy of format 1.0, see `write_file`."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return write_file(path, header.getvalue(), array.data.cast("B"))


def write_json(path: Path, values: Any) -> None:
    """Writes an indented JSON file, see `write_file`."""
    write_file(path, (json.dumps(values, indent=1) + "\n").encode())


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Reads shape and dtype of an open .npy file up to its first value; ValueError if it is damaged."""
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


def check_fields(values: Any, checks: Mapping[str, Check], prefix: str = "") -> None:
    """Checks the fields of a JSON object, an absent one as None; ValueError names the first that is wrong."""
    for name, (wanted, fits) in checks.items():
        got = values.get(name) if isinstance(values, dict) else None
        if not fits(got):
            raise ValueError(f"{prefix}{name} must be {wanted}, got {short(got)}")


def count(least: int) -> Check:
    """Checks for an integer, at least `least`, that fits into 64 bits."""
    return f"a whole number from {least} on", lambda x: type(x) is int and least <= x < 2**63  # bool is none


def list_of(fits: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    """Tests for a list of values that fit, `length` of them if given."""
    return lambda x: isinstance(x, list) and length in (None, len(x)) and all(map(fits, x))


def numbers(length: int, low: float = -3e38, high: float = 3e38, wanted: str = "a finite number") -> Check:
    """Checks for a list of numbers between `low` and `high` (by default those of fp32), one per channel."""
    fits = list_of(lambda x: type(x) in (int, float) and low < x < high, length)
    return f"{wanted} for each of {length} channels", fits


SHA256: Check = (
    "64 hexadecimal digits",
    lambda x: isinstance(x, str) and re.fullmatch("[0-9a-f]{64}", x) is not None,
)


def short(value: Any) -> str:
    """Formats a value for a message: quoted, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

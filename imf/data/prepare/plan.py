"""A folder in the making: the settings it was begun with, the shards it has, the process that writes it."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from imf.data.files import Check, check_fields, list_of, numbers, short, write_json
from imf.data.packed import INDEX, PLAN, SHARD_FIELDS
from imf.io import read_json
from imf.program import UserError

RECORDS = "records"  # a file per shard that is completely on the disk, written after it


def begin(out: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Writes the plan, all that decides the bytes of the folder, or compare it with that of a begun folder.

    Returns: the plan, with the software versions that the folder was begun with.
    Raises: UserError, naming the differences, for a folder that was begun otherwise or holds other files.
    """
    begun = out / INDEX if (out / INDEX).exists() else out / PLAN
    if not begun.exists():
        if others := sorted(path.name for path in out.iterdir() if path.name != f".{PLAN}.tmp"):
            got = ", ".join(others[:3])
            raise UserError(f"{out}: OUT must be empty, new or begun by this program, got {got}")
        write_json(out / PLAN, plan)
        return plan
    old = read_json(begun)
    changes = {
        name: f"{name} was {short(a)}, now it is {short(b)}"
        for part in plan
        for name, a, b in _differences(part, old.get(part), plan[part])
    }
    if refused := [text for name, text in changes.items() if not name.startswith("versions")]:
        raise UserError(
            f"{out}: was begun otherwise: {'; '.join(refused)}; do as then, or choose another OUT"
        )
    for text in changes.values():
        warn(f"{text}: other bits may come out")
    return plan | {"versions": old.get("versions")}


def _differences(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(f"{name}.{key}", old.get(key), new.get(key))
    elif old != new:
        yield name, old, new


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps other processes from preparing this folder; UserError if one does."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"{out}: another process is preparing this folder") from error
    except OSError as error:  # some network file systems
        warn(f"{out} cannot be locked ({error}): let no other process prepare it at the same time")
    try:
        yield
    finally:
        os.close(descriptor)


def read_record(out: Path, shard: int, places: range, plan: dict[str, Any]) -> dict[str, Any] | None:
    """Reads and checks the record of the shard of these images; None if the shard has to be made (again)."""
    path = record_path(out, shard)
    if not path.exists():
        return None
    try:
        record = read_json(path)
        pairs = list_of(lambda x: isinstance(x, list) and list(map(type, x)) == [int, str] and x[0] in places)
        check_fields(record, {"skipped": ("[place, reason] pairs of this shard", pairs)}, f"{path}: ")
        rows, file = len(places) - len(record["skipped"]), shard_path(out, shard)
        checks: dict[str, Check] = {"rows": (str(rows), lambda x: type(x) is int and x == rows)}
        if rows:
            checks = SHARD_FIELDS | checks | {"file": (file.name, lambda x: x == file.name)}
        if rows and plan["kind"] == "latents":
            checks["sums"] = ("two sums per channel", list_of(numbers(plan["shape"][0])[1], 2))
        check_fields(record, checks, f"{path}: ")
        size = file.stat().st_size if file.exists() else None
        if rows and size != record["bytes"]:
            raise ValueError(f"{file}: must have {record['bytes']:,} bytes, got {size}")
    except ValueError as error:
        warn(f"{error}; it is made again")
        return None
    return record


def shard_path(out: Path, shard: int) -> Path:
    """Returns the path of a shard."""
    return out / f"shard-{shard:05d}.npy"


def record_path(out: Path, shard: int) -> Path:
    """Returns the path of a shard's record, which is written after the shard."""
    return out / RECORDS / f"{shard:05d}.json"


def warn(text: str) -> None:
    """Prints a line on standard error."""
    print(f"imf.data.prepare: warning: {text}", file=sys.stderr)

"""A folder on its way to being whole: what it was begun with, which shards it has, who may write to it."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from imf.data.files import are_numbers, is_count, read_json, short, write_json
from imf.data.index import FORMAT, INDEX, PLAN
from imf.data.prepare.encoder import Encoder
from imf.data.prepare.source import Source
from imf.program import UserError

RECORDS = "records"  # a file a shard that is whole on the disk


def agree(
    out: Path, source: Source, encoder: Encoder, size: int, batch_size: int, shard_size: int
) -> dict[str, Any]:
    """What decides every byte of the folder: written when it is begun, compared when it is gone on with."""
    plan = {
        "format": FORMAT,
        "kind": encoder.kind,
        "shape": list(encoder.shape),
        "size": size,
        "batch_size": batch_size,
        "shard_size": shard_size,
        "class_names": source.class_names,
        "encoder": encoder.about,
        "source": {"images": len(source.files), "sha256": source.fingerprint()},
        "versions": {name: version(name) for name in ("torch", "numpy", "pillow")},  # warned of, not refused
    }
    begun = out / INDEX if (out / INDEX).exists() else out / PLAN
    if not begun.exists():
        if others := sorted(path.name for path in out.iterdir() if path.name != f".{PLAN}.tmp"):
            raise UserError(
                f"{out}: OUT must be empty, new or begun by this program, got {', '.join(others[:3])}"
            )
        write_json(out / PLAN, plan)
        return plan
    old = read_json(begun)
    differences = [
        f"{name} was {short(a)}, now it is {short(b)}"
        for part in plan
        if part != "versions"
        for name, a, b in _differences(part, old.get(part), plan[part])
    ]
    if differences:
        raise UserError(
            f"{out}: was begun otherwise: {'; '.join(differences)}; do as then, or choose another OUT"
        )
    for name, a, b in _differences("versions", old.get("versions"), plan["versions"]):
        warn(f"{name} was {short(a)}, now it is {short(b)}: other bits may come out")
    return plan | {"versions": old.get("versions")}  # those it was begun with


def _differences(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(f"{name}.{key}", old.get(key), new.get(key))
    elif old != new:
        yield name, old, new


def make_folder(out: Path) -> None:
    """Make the folder if it is not there; UserError if that cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: OUT must be a folder, or a path where one can be made: {error}") from error


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Within it no other process prepares this folder."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{out}: another process is preparing this folder") from error
        except OSError as error:  # some network file systems
            warn(f"{out} cannot be locked ({error}): let no other process prepare it at the same time")
        yield
    finally:
        os.close(descriptor)


def remove_temporaries(out: Path) -> None:
    """What a killed process left half-written."""
    for path in [*out.glob(".*.tmp"), *(out / RECORDS).glob(".*.tmp")]:
        path.unlink()


def remove_scaffold(out: Path) -> None:
    """What a whole folder does not need: the plan last, since records without it belong to nobody."""
    shutil.rmtree(out / RECORDS, ignore_errors=True)
    (out / PLAN).unlink(missing_ok=True)


def read_record(out: Path, shard: int, places: range, encoder: Encoder) -> dict[str, Any] | None:
    """The record of the shard of these images, if its file is whole; None if it has to be made (again)."""
    path = record_path(out, shard)
    if not path.exists():
        return None
    try:
        record = read_json(path)
        if not _is_record(record, shard, places, encoder):
            raise UserError(f"{path}: not the record of shard {shard}")
    except UserError as error:
        warn(f"{error}; the shard is made again")
        return None
    if not record["rows"]:
        return record
    path = out / record["file"]
    size = path.stat().st_size if path.exists() else None
    if size != record["bytes"]:
        warn(f"{path}: must have {record['bytes']:,} bytes, got {size}; it is made again")
        return None
    return record


def _is_record(record: dict[str, Any], shard: int, places: range, encoder: Encoder) -> bool:
    """Whether all that is read of it later is there, and of this shard."""
    rows: Any = record.get("rows")
    skipped: Any = record.get("skipped")
    sums: Any = record.get("sums")
    if not is_count(rows) or not isinstance(skipped, list) or rows + len(skipped) != len(places):
        return False
    pairs = all(isinstance(x, list) and len(x) == 2 and isinstance(x[1], str) for x in skipped)
    if not (pairs and all(is_count(place) and place in places for place, _ in skipped)):
        return False
    if rows and encoder.kind == "latents":
        fits = isinstance(sums, list) and len(sums) == 2
        if not (fits and all(are_numbers(x, encoder.shape[0]) for x in sums)):
            return False
    names = record.get("file") == shard_name(shard) and isinstance(record.get("sha256"), str)
    return not rows or (names and is_count(record.get("bytes")))


def shard_name(shard: int) -> str:
    """The file of a shard."""
    return f"shard-{shard:05d}.npy"


def record_path(out: Path, shard: int) -> Path:
    """Where the record of a shard lies: what is in it, written after it."""
    return out / RECORDS / f"{shard:05d}.json"


def warn(text: str) -> None:
    """A line on standard error."""
    print(f"imf.data.prepare: warning: {text}", file=sys.stderr)

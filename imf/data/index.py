"""The index of a folder of packed data, which may come from elsewhere: every field is checked."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from imf.data.files import are_numbers, is_count, read_json, short
from imf.program import UserError

FORMAT = 1  # raise it when a folder of the old form can no longer be read
INDEX, PLAN = "index.json", "prepare.json"


@dataclass(frozen=True)
class Shard:
    """A shard as the index names it; sha256 is of the whole file."""

    file: str
    rows: int
    bytes: int
    sha256: str


def read_index(folder: Path) -> dict[str, Any]:
    """All that the index of a folder says; UserError if there is none, or it is damaged or half-made."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a data set is 'digits' or a folder of imf.data.prepare")
    if not (folder / INDEX).is_file():
        if (folder / PLAN).is_file():
            raise UserError(
                f"{folder}: half-made: the same python -m imf.data.prepare again goes on where it stopped"
            )
        raise UserError(f"{folder}: no {INDEX} in it, so it is no folder of imf.data.prepare")
    index = read_json(folder / INDEX)
    if type(index.get("format")) is not int or index["format"] != FORMAT:  # True == 1
        raise UserError(
            f"{folder / INDEX}: of format {short(index.get('format'))}, this version reads {FORMAT}: "
            f"make it again"
        )
    try:
        _check(index)
    except ValueError as error:
        raise UserError(
            f"{folder / INDEX}: disagrees with itself or is damaged: {error}; prepare the folder again"
        ) from error
    return index


def _check(index: dict[str, Any]) -> None:
    """ValueError, naming the field, unless every field that a reader uses is of its type and they agree."""
    kind, shape, names = (index.get(name) for name in ("kind", "shape", "class_names"))
    _require(kind in ("latents", "pixels"), "kind", "latents or pixels", kind)
    if not (isinstance(shape, list) and len(shape) == 3 and all(is_count(x, 1) for x in shape)):
        raise _wrong("shape", "[C, H, W]", shape)
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise _wrong("class_names", "a list of names", names)
    for part in ("encoder", "samples"):
        values = index.get(part)
        if part == "samples" and values is None:
            continue
        for name in ("mean", "std"):
            got = values.get(name) if isinstance(values, dict) else None
            wanted = f"a finite number for each of {shape[0]} channels"
            _require(are_numbers(got, shape[0]), f"{part}.{name}", wanted, got)
    if "vae_sha256" in index["encoder"]:
        _require_digest("encoder.vae_sha256", index["encoder"]["vae_sha256"])
    std = index["encoder"]["std"]
    _require(all(1e-30 < x < 1e30 for x in std), "encoder.std", "positive", std)
    for name, least in (("rows", 1), ("skipped", 0)):
        _require(is_count(index.get(name), least), name, f"a whole number from {least} on", index.get(name))
    _require_digest("labels_sha256", index.get("labels_sha256"))
    _check_shards(index.get("shards"), index["rows"])


def _check_shards(shards: Any, rows: int) -> None:
    if not isinstance(shards, list):
        raise _wrong("shards", "a list", shards)
    names = {entry.name for entry in fields(Shard)}
    for number, shard in enumerate(shards):
        where = f"shards[{number}]"
        fits = isinstance(shard, dict) and set(shard) == names
        _require(fits, where, f"an object of {', '.join(sorted(names))}", shard)
        # Nothing outside of the folder is opened, whoever wrote the index.
        plain = isinstance(shard["file"], str) and re.fullmatch(r"[^/\\\0]+\.npy", shard["file"])
        _require(bool(plain), f"{where}.file", "the name of a .npy file in this folder", shard["file"])
        for name in ("rows", "bytes"):
            _require(is_count(shard[name], 1), f"{where}.{name}", "a whole number from 1 on", shard[name])
        _require_digest(f"{where}.sha256", shard["sha256"])
    files = [shard["file"] for shard in shards]
    _require(len(set(files)) == len(files), "shards", "of different files", files)
    total = sum(shard["rows"] for shard in shards)
    if total != rows:
        raise ValueError(f"{rows} rows, but the {len(shards)} shards have {total}")


def _require_digest(name: str, got: Any) -> None:
    fits = isinstance(got, str) and re.fullmatch("[0-9a-f]{64}", got)
    _require(bool(fits), name, "64 hexadecimal digits", got)


def _require(fits: bool, name: str, wanted: str, got: Any) -> None:
    if not fits:
        raise _wrong(name, wanted, got)


def _wrong(name: str, wanted: str, got: Any) -> ValueError:
    return ValueError(f"{name} must be {wanted}, got {short(got)}")

"""Images in tar files, grouped by key as WebDataset has them: 0001.jpg and 0001.cls are one sample.

A file is walked through once, for names and labels; an image is then read from its place in it. Nothing is
unpacked to the disk.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from imf.data.files import short
from imf.data.prepare import labels
from imf.data.prepare.source import Options, Source, check_file
from imf.images import MAX_BYTES, BrokenImage, is_image
from imf.program import UserError, progress

LABELS = ("cls", "json", "txt")  # extensions of labels; of a JSON object the field "label"
_LONGEST = 1 << 24  # bytes of a label's file


@dataclass
class _Sample:
    name: str  # as in files.txt
    tar: int
    offset: int = -1
    size: int = 0
    label: str | None = None


def read_tars(paths: list[Path], options: Options) -> Source:
    """Lists the samples of tar files in the order of the files, each with an image and a label.

    Raises: UserError if a file is compressed or damaged, or a sample has no label or several images.
    """
    samples: dict[tuple[int, str], _Sample] = {}
    others: list[str] = []
    for number, path in enumerate(progress(paths, "listing", "tar", brief=True)):
        for member, file in _members(path):
            key, extension = _split(member.name)
            sample = samples.setdefault((number, key), _Sample("", number))
            wanted = extension == options.image_key if options.image_key else is_image(f"x.{extension}")
            if wanted:
                if sample.offset >= 0:
                    raise UserError(
                        f"{path}: sample {key} must have one image, got {sample.name} and {member.name}; "
                        "--image-key EXTENSION says which is meant"
                    )
                sample.name, sample.size = f"{path.name}/{member.name}", member.size
                sample.offset = member.offset_data
            elif not options.unconditional and extension in _label_extensions(options):
                label = _label(path, member, file, extension, options)
                if label is not None and (sample.label is None or extension == "cls"):
                    sample.label = label
            else:
                others.append(f"{path.name}/{member.name}")
    found = [sample for sample in samples.values() if sample.offset >= 0]
    if not found:
        ends = options.image_key or "an image's extension, such as jpg"
        raise UserError(f"{paths[0]}: must hold files that end in {ends}, got none")
    if options.unconditional:
        numbered = labels.unconditional(len(found), options.class_names)
    else:
        without = [sample.name for sample in found if sample.label is None]
        if without:
            extensions = ", ".join(f".{name}" for name in _label_extensions(options))
            raise UserError(
                f"{paths[0]}: every image must have a label beside it in {extensions} (a field "
                f"{options.label_key or 'label'} of .json), got none for {len(without):,}, such as "
                f"{without[0]}; --label-key NAME says which extension or field holds it, --unconditional "
                "trains without"
            )
        where = f"{paths[0]}:"
        numbered = labels.of_texts([x.label or "" for x in found], where, options.class_names)

    def content(place: int) -> bytes:
        return _read(paths[found[place].tar], found[place])

    files = [(sample.name, sample.size) for sample in found]
    containers = [(path.name, check_file(path)) for path in paths]
    return Source(paths[0].parent, files, *numbered, content, others, containers)


def _read(tar: Path, sample: _Sample) -> bytes:
    """Reads the bytes of an image from its place in a tar."""
    if sample.size > MAX_BYTES:
        raise BrokenImage(f"{sample.size:,} bytes: at most {MAX_BYTES:,} are read")
    with tar.open("rb", buffering=0) as file:
        file.seek(sample.offset)
        content = bytearray()
        while len(content) < sample.size and (part := file.read(sample.size - len(content))):
            content += part
    if len(content) != sample.size:
        raise OSError(f"{tar.name} has become shorter")
    return bytes(content)


def _label_extensions(options: Options) -> tuple[str, ...]:
    return LABELS if options.label_key is None else (options.label_key, "json")


def _label(
    path: Path, member: tarfile.TarInfo, file: IO[bytes], extension: str, options: Options
) -> str | None:
    """Reads a label from the file of a sample; None if a JSON object has no such field."""
    where = f"{path}: {member.name}"
    if member.size > _LONGEST:
        raise UserError(f"{where}: a label must be short, got {member.size:,} bytes")
    content = file.read()
    try:
        if extension != "json":
            text = content.decode().strip()
        else:
            values = json.loads(content)
            value: Any = values.get(options.label_key or "label") if isinstance(values, dict) else None
            if value is None:
                return None
            if isinstance(value, bool) or not isinstance(value, (int, str)):
                raise UserError(f"{where}: a label must be an integer or a text, got {short(value)}")
            text = str(value).strip()
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: a label must be text in UTF-8, or JSON, got {error}") from error
    if not text or len(text.splitlines()) != 1 or len(text) > 100:
        hint = "; a caption? --unconditional trains without labels" if extension == "txt" else ""
        raise UserError(f"{where}: a label must be a line of 1 to 100 characters, got {short(text)}{hint}")
    return text


def _split(name: str) -> tuple[str, str]:
    """Splits a member's name at the first dot of its last part, as WebDataset does: key, extension."""
    folder, slash, last = name.rpartition("/")
    key, _, extension = last.partition(".")
    return f"{folder}{slash}{key}", extension.lower()


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    """Yields the regular files of a tar and how to read them; UserError if it is damaged or compressed."""
    size = check_file(path)
    try:
        with path.open("rb") as file:
            if file.read(2) == b"\x1f\x8b":
                raise UserError(
                    f"{path}: must be without compression, so that images can be read in any order: gunzip it"
                )
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if not member.isreg() or os.path.basename(member.name).startswith("."):
                        continue
                    if member.issparse() or member.offset_data + member.size > size:
                        raise UserError(f"{path}: {member.name} is not whole in it: truncated, or sparse")
                    content = tar.extractfile(member)
                    assert content is not None  # of a regular file
                    yield member, content
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(f"{path}: not a whole tar file: {error}") from error

"""From images to packed data for training.

Shard k is made of the images k · shard_size ... of the source's listing and of nothing else, and is recorded
when it is completely on the disk. So a process may be killed at any moment: the next one resumes with the
first shard that has no record, and leaves, byte for byte, what an uninterrupted one leaves.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from contextlib import closing
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from imf.data.files import short, write_array, write_file, write_json
from imf.data.packed import FORMAT, INDEX, LABELS, PLAN, ROWS, PackedData
from imf.data.prepare.encoder import Encoder, Latents, Pixels
from imf.data.prepare.form import Form
from imf.data.prepare.formats import find
from imf.data.prepare.plan import RECORDS, begin, locked, read_record, record_path, shard_path, warn
from imf.data.prepare.source import Options, Source
from imf.distributed import choose_device
from imf.evaluation import fid, inception
from imf.images import EXTENSIONS, BrokenImage
from imf.io import check_regular, check_target
from imf.program import UserError, progress

FILES, SKIPPED = "files.txt", "skipped.tsv"
Record = dict[str, Any]  # the content of a JSON file
LATENTS_SIZE = 256  # pixels of a side, by default
SHOWN = 5  # of the skipped images, with their reasons, at the end


def pack(
    source: Source, out: Path, encoder: Encoder, *, form: Form, batch_size: int, shard_size: int, workers: int
) -> PackedData:
    """Encodes all images of `source` into the folder `out`, or resumes one that was begun alike.

    form: of the images that the encoder gets.  batch_size: images encoded together.  shard_size: images per
    shard, which are lost at most when the process is killed.  workers: threads that decode images.
    Raises: UserError if `out` holds something else, was begun from another source, autoencoder or settings,
    or cannot be written, or if an image cannot be read from the disk.
    """
    settings = {"size": form.size, "batch_size": batch_size, "shard_size": shard_size}
    for name, value in settings.items():
        if value < 1:
            raise UserError(f"prepare: {name} must be at least 1, got {value}")
    count = len(source.files)
    parts, dtype = ROWS[encoder.kind]
    shape = (min(shard_size, count), *parts, *encoder.shape)
    try:
        rows = np.empty(shape, dtype)  # of a shard; allocated before anything is written
    except (MemoryError, ValueError) as error:  # ValueError: more than can be addressed
        raise UserError(f"--shard-size and --size: a shard of {list(shape)} is too large: {error}") from error
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: OUT must be a folder, or a path where one can be made: {error}") from error
    plan = {
        "format": FORMAT,
        "kind": encoder.kind,
        "shape": list(encoder.shape),
        **settings,
        "fit": form.fit,
        "background": form.background and list(form.background),
        "class_names": source.class_names,
        "encoder": encoder.about,
        "source": {"images": count, "sha256": source.fingerprint()},
        "versions": {name: version(name) for name in ("torch", "numpy", "pillow")},  # warned of, not refused
    }
    with locked(out):
        plan = begin(out, plan)
        for path in [*out.glob(".*.tmp"), *(out / RECORDS).glob(".*.tmp")]:  # of a process that was killed
            path.unlink()
        if not (out / INDEX).exists():
            (out / RECORDS).mkdir(exist_ok=True)
            needed = rows[0].nbytes * count - sum(path.stat().st_size for path in out.glob("shard-*.npy"))
            if needed > (free := shutil.disk_usage(out).free):
                warn(f"{out} needs {needed:,} bytes more, {free:,} are free there")
            _finish(out, source, plan, _make_shards(out, source, encoder, plan, rows, form, workers))
        # The plan last: records without it belong to nobody.
        shutil.rmtree(out / RECORDS, ignore_errors=True)
        (out / PLAN).unlink(missing_ok=True)
    return PackedData(out)


def _make_shards(
    out: Path, source: Source, encoder: Encoder, plan: Record, rows: NDArray[Any], form: Form, workers: int
) -> list[Record]:
    """Makes the shards that are missing, each in the buffer `rows`; returns the records of all."""
    count, batch_size, shard_size = len(source.files), plan["batch_size"], plan["shard_size"]
    shards = [range(first, min(first + shard_size, count)) for first in range(0, count, shard_size)]
    records = [read_record(out, shard, places, plan) for shard, places in enumerate(shards)]
    missing = [shard for shard, record in enumerate(records) if record is None]
    todo = [place for shard in missing for place in shards[shard]]
    decoded = source.decoded(todo, form, workers, ahead=2 * batch_size + workers)
    bar = progress(None, out.name, "image", total=count, initial=count - len(todo))
    with closing(decoded), bar:
        for shard in missing:
            filled, skipped = 0, []
            for first in range(0, len(shards[shard]), batch_size):
                batch = list(zip(shards[shard][first : first + batch_size], decoded, strict=False))
                skipped += [[place, str(image)] for place, image in batch if isinstance(image, BrokenImage)]
                if good := [image for _, image in batch if not isinstance(image, BrokenImage)]:
                    rows[filled : filled + len(good)] = encoder(np.stack(good))
                    filled += len(good)
                bar.update(len(batch))
            records[shard] = _write_shard(out, shard, rows[:filled], skipped)
    return [record for record in records if record is not None]


def _write_shard(out: Path, shard: int, rows: NDArray[Any], skipped: list[list[Any]]) -> Record:
    """Writes the shard, then its record: without the record it does not count."""
    record: Record = {"rows": len(rows), "skipped": skipped}
    if len(rows):
        path = shard_path(out, shard)
        digest = write_array(path, rows)
        record |= {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}
        if rows.dtype != np.uint8:  # sums over rows and places, a value per channel, for `_sample_statistics`
            mean, std = rows[:, 0], rows[:, 1]
            squares = (np.einsum("nchw,nchw->c", x, x, dtype=np.float64) for x in (mean, std))
            record["sums"] = [np.einsum("nchw->c", mean, dtype=np.float64).tolist(), sum(squares).tolist()]
    write_json(record_path(out, shard), record)
    return record


def _finish(out: Path, source: Source, plan: Record, records: list[Record]) -> None:
    """Writes labels, names and what was skipped, then the index, whose presence marks the folder complete."""
    skipped = dict(pair for record in records for pair in record["skipped"])
    kept = [place for place in range(len(source.files)) if place not in skipped]
    if not kept:  # nothing to keep for the next command, which may be another one
        shutil.rmtree(out / RECORDS)
        (out / PLAN).unlink()
        raise UserError(f"{source.root}: none of the {len(skipped):,} images could be decoded: {skipped[0]}")
    labels = source.labels[kept]
    for label in sorted(set(range(len(source.class_names))) - set(labels.tolist())):
        warn(f"{source.class_names[label]}: a class of which no image could be used")
    labels_sha256 = write_array(out / LABELS, labels)
    names = [name for name, _ in source.files]
    left_out = [f"{names[place]}\t{reason}" for place, reason in sorted(skipped.items())]
    for file, lines in ((FILES, [names[place] for place in kept]), (SKIPPED, left_out)):
        write_file(out / file, "".join(line + "\n" for line in lines).encode(errors="surrogateescape"))
    index = {
        **plan,
        "rows": len(kept),
        "skipped": len(skipped),
        "labels_sha256": labels_sha256,
        "samples": _sample_statistics(plan, records, len(kept)),
        "shards": [{k: r[k] for k in ("file", "rows", "bytes", "sha256")} for r in records if r["rows"]],
    }
    write_json(out / INDEX, index)


def _sample_statistics(plan: Record, records: list[Record], rows: int) -> dict[str, list[float]] | None:
    """Mean and standard deviation of the latents as the network sees them, per channel; None for pixels.

    By E[x] = E[mean] and E[x²] = E[mean² + std²].
    """
    if plan["kind"] == "pixels":
        return None
    sums = np.sum([record["sums"] for record in records if record["rows"]], axis=0)
    first, second = sums / (rows * math.prod(plan["shape"][1:]))
    mean, std = (np.array(plan["encoder"][name]) for name in ("mean", "std"))
    deviation = np.sqrt(np.maximum(second - first**2, 0))
    return {"mean": ((first - mean) / std).tolist(), "std": (deviation / std).tolist()}


def source_statistics(
    source: Source, form: Form, extractor: inception.Extractor, workers: int
) -> fid.Statistics:
    """Computes FID statistics of the source's images, in the network's form; broken ones are left out.

    Raises: UserError for fewer than 2 images, one that cannot be read, or features that are not finite.
    """
    places = range(len(source.files))
    with closing(source.decoded(places, form, workers, ahead=128)) as decoded:
        bar = progress(decoded, "statistics", "image", total=len(places))
        good = (torch.from_numpy(image) for image in bar if not isinstance(image, BrokenImage))
        batches = iter(lambda: list(islice(good, 64)), [])
        try:
            return fid.statistics(map(torch.stack, batches), extractor)
        except ValueError as error:  # too few images, or features that are not finite
            raise UserError(f"--statistics: {error}") from error


def pack_command(arguments: argparse.Namespace) -> None:
    """Packs as the command line says, and prints what was made."""
    out, sources = arguments.out, arguments.sources
    if arguments.statistics is not None:
        try:
            check_target(arguments.statistics)  # before hours of work
        except OSError as error:
            raise UserError(f"--statistics {error}") from error
    device = choose_device(arguments.device)
    extractor = inception.load(arguments.extractor, device) if arguments.extractor else None
    for path in sources:
        if out.resolve().is_relative_to(path.resolve()):
            raise UserError(f"{out}: OUT must lie outside of SOURCE, {path}")
    options = Options(
        arguments.labels,
        arguments.image_key,
        arguments.label_key,
        arguments.unconditional,
        _class_names(arguments.class_names),
    )
    source = find(sources, options)
    one = source.num_classes == 1
    classes = f"one class, {source.class_names[0]}" if one else f"{source.num_classes:,} classes"
    _say(f"{source.root}: {len(source.files):,} images in {classes}")
    if source.others:
        shown, ends = ", ".join(source.others[:3]), ", ".join(sorted(EXTENSIONS))
        why = "" if source.containers else f" (images end in {ends})"
        _say(f"{len(source.others):,} others are left out{why}: such as {shown}")
    form = _form(source, arguments)
    encoder: Encoder = (
        Pixels(form.channels, form.size)
        if arguments.pixels
        else Latents(arguments.vae, form.size, device, arguments.precision)
    )
    sizes = {name: getattr(arguments, name) for name in ("batch_size", "shard_size", "workers")}
    data = pack(source, out, encoder, form=form, **sizes)
    kind = f"{data.kind} {list(data.shape)}"
    _say(f"{out}: {len(data):,} {kind} of {data.num_classes:,} classes, {len(data.shards):,} shards")
    if skipped := data.index["skipped"]:
        _say(f"{skipped:,} images skipped, all listed in {out / SKIPPED}:")
        with (out / SKIPPED).open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            for line in islice(file, SHOWN):
                _say("  " + line.rstrip("\n").replace("\t", ": ", 1))
        if skipped > SHOWN:
            _say("  ...")
    if samples := data.index["samples"]:
        mean, std = (", ".join(f"{value:.3f}" for value in samples[name]) for name in ("mean", "std"))
        _say(f"Channels as the network sees them: mean {mean}; std {std} (on ImageNet 0 and 1)")
        if max(map(abs, samples["mean"])) > 0.5 or not all(0.5 < value < 2 for value in samples["std"]):
            warn("far from 0 and 1: images unlike ImageNet, or not the autoencoder of the constants")
    if extractor is not None:
        source_statistics(source, form, extractor, arguments.workers).save(arguments.statistics)
        _say(f"{arguments.statistics}: statistics of the images by {arguments.extractor}")


def _form(source: Source, arguments: argparse.Namespace) -> Form:
    """Returns the form that the command line asks for; where it does not say, that of the images."""
    size, channels = arguments.size, arguments.channels
    if not arguments.pixels:
        size, channels = size or LATENTS_SIZE, 3
    if size is None or channels is None:
        look = source.survey(sized=size is None, workers=arguments.workers)
        if look is not None:  # else all are broken, and `pack` says why
            channels, size = channels or look[0], size or look[1][0]
    return Form(size or 1, channels or 3, arguments.fit, arguments.background)


def _class_names(text: str | None) -> list[str] | None:
    """Reads --class-names: names between commas, or the lines of a file; None without."""
    if text is None:
        return None
    names = text.split(",")
    if len(names) == 1:
        try:
            check_regular(Path(text))
            names = Path(text).read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            wanted = "names between commas, or a file with a name per line"
            raise UserError(f"--class-names must be {wanted}, got {text}: {error}") from error
    names = [name.strip() for name in names]
    if not names or not all(names) or len(set(names)) != len(names):
        raise UserError(f"--class-names must be different names, none of them empty, got {short(names)}")
    return names


def verify_command(out: Path) -> None:
    """Checks every byte of a finished folder, and prints that all is well."""
    data = PackedData(out)
    for _ in progress(data.verify(), out.name, "shard", total=len(data.shards)):
        pass
    _say(f"{out}: {len(data):,} rows of {data.kind} in {len(data.shards):,} shards, every checksum agrees")


def _say(text: str) -> None:
    """Prints a line, in which a file name may hold bytes that are not text."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, errors="backslashreplace").decode(encoding))

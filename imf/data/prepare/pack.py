"""From an image folder to packed data for training: `python -m imf.data.prepare SOURCE OUT --vae PATH`.

Shard k is made of the images k · shard_size ... of the source's listing and of nothing else, and is recorded
when it is whole on the disk. So a process may be killed at any moment: the next one goes on with the first
shard that has no record, and what it leaves in the end is, byte for byte, what an uninterrupted one leaves.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from imf.data.files import write_json, write_whole
from imf.data.index import INDEX
from imf.data.packed import LABELS, PackedData
from imf.data.prepare import source as sources
from imf.data.prepare.encoder import PRECISIONS, Encoder, Latents, Pixels
from imf.data.prepare.plan import (
    RECORDS,
    agree,
    locked,
    make_folder,
    read_record,
    record_path,
    remove_scaffold,
    remove_temporaries,
    shard_name,
    warn,
)
from imf.data.prepare.source import Source
from imf.distributed import choose_device
from imf.evaluation import fid
from imf.evaluation import inception as features
from imf.images import EXTENSIONS, BrokenImage
from imf.io import check_target
from imf.program import UserError

FILES, SKIPPED = "files.txt", "skipped.tsv"
SHOWN = 5  # of the skipped images, with their reasons, at the end


def prepare(
    source: Source,
    out: Path,
    encoder: Encoder,
    *,
    size: int = 256,
    batch_size: int = 64,
    shard_size: int = 4096,
    workers: int | None = None,
) -> PackedData:
    """Encode all images of `source` into the folder `out`, or go on with one that was begun alike.

    size: pixels of a side after the crop.  batch_size: images encoded together.  shard_size: images a shard,
    which are lost at most when the process is killed.  workers: threads that decode images (default: a core
    each).
    Raises: UserError if `out` holds something else, was begun from another source, autoencoder or settings,
    or cannot be written, or if an image cannot be read from the disk.
    """
    for name, value in (("size", size), ("batch_size", batch_size), ("shard_size", shard_size)):
        if value < 1:
            raise UserError(f"prepare: {name} must be at least 1, got {value}")
    shape = (min(shard_size, len(source.files)), *encoder.row_shape)
    try:
        rows = np.empty(shape, encoder.dtype)  # before anything is written
    except (MemoryError, ValueError) as error:  # ValueError: more than can be addressed
        raise UserError(f"--shard-size and --size: a shard of {list(shape)} is too large: {error}") from error
    make_folder(out)
    with locked(out):
        plan = agree(out, source, encoder, size, batch_size, shard_size)
        remove_temporaries(out)
        if (out / INDEX).exists():  # killed, if at all, after the last step that matters
            remove_scaffold(out)
            return PackedData(out)
        (out / RECORDS).mkdir(exist_ok=True)
        _warn_if_small(out, source, encoder)
        records = {
            shard: read_record(out, shard, _places(source, shard, shard_size), encoder)
            for shard in range(-(-len(source.files) // shard_size))
        }
        missing = [shard for shard, record in records.items() if record is None]
        records |= _encode_shards(out, source, encoder, plan, missing, rows, workers or os.cpu_count() or 1)
        _finish(out, source, encoder, plan, [record for record in records.values() if record is not None])
        remove_scaffold(out)
    return PackedData(out)


def source_statistics(
    source: Source, size: int, extractor: features.Extractor, workers: int
) -> fid.Statistics:
    """FID statistics of the source's images, cropped as for the network; broken ones are left out.

    Raises: UserError for fewer than 2 images, one that cannot be read, or features that are not finite.
    """
    places = range(len(source.files))
    bar = tqdm(total=len(places), desc="statistics", unit="image", dynamic_ncols=True)

    def batches() -> Iterator[torch.Tensor]:
        with closing(source.decoded(places, size, workers, ahead=128)) as images, bar:
            while part := [image for _, image in zip(range(64), images, strict=False)]:
                bar.update(len(part))
                good = [torch.from_numpy(image) for image in part if not isinstance(image, BrokenImage)]
                if good:
                    yield torch.stack(good)

    try:
        return fid.statistics(batches(), extractor)
    except ValueError as error:  # too few images, or features that are not finite
        raise UserError(f"--statistics: {error}") from error


def _places(source: Source, shard: int, shard_size: int) -> range:
    """The images of a shard, as places in the listing."""
    return range(shard * shard_size, min((shard + 1) * shard_size, len(source.files)))


def _encode_shards(
    out: Path,
    source: Source,
    encoder: Encoder,
    plan: dict[str, Any],
    missing: list[int],
    rows: NDArray[Any],
    workers: int,
) -> dict[int, dict[str, Any]]:
    """Make the shards that are missing, each by way of `rows`; returns their records."""
    size, batch_size, shard_size = plan["size"], plan["batch_size"], plan["shard_size"]
    count = len(source.files)
    places = {shard: _places(source, shard, shard_size) for shard in missing}
    todo = [place for shard in missing for place in places[shard]]
    records = {}
    bar = tqdm(
        total=count, initial=count - len(todo), desc=out.name, unit="image", dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 10,
    )  # fmt: skip
    with closing(source.decoded(todo, size, workers, ahead=2 * batch_size + workers)) as images, bar:
        for shard in missing:
            filled, skipped = 0, []
            for first in range(places[shard].start, places[shard].stop, batch_size):
                batch = range(first, min(first + batch_size, places[shard].stop))
                good = []
                for place, image in zip(batch, images, strict=False):  # `images` goes on after the batch
                    if isinstance(image, BrokenImage):
                        skipped.append([place, str(image)])
                    else:
                        good.append(image)
                if good:
                    rows[filled : filled + len(good)] = encoder(np.stack(good))
                    filled += len(good)
                bar.update(len(batch))
            records[shard] = _write_shard(out, shard, rows[:filled], skipped)
    return records


def _write_shard(out: Path, shard: int, rows: NDArray[Any], skipped: list[list[Any]]) -> dict[str, Any]:
    """The shard, then its record: without the record it does not count."""
    record: dict[str, Any] = {"rows": len(rows), "skipped": skipped}
    if len(rows):
        path = out / shard_name(shard)
        header = BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(rows))
        digest = write_whole(path, [header.getvalue(), rows.data.cast("B")])
        record |= {"file": path.name, "bytes": header.tell() + rows.nbytes, "sha256": digest}
        if rows.dtype != np.uint8:  # sums over rows and places, a value a channel, for `_sample_statistics`
            mean, std = rows[:, 0], rows[:, 1]
            squares = (np.einsum("nchw,nchw->c", x, x, dtype=np.float64) for x in (mean, std))
            record["sums"] = [np.einsum("nchw->c", mean, dtype=np.float64).tolist(), sum(squares).tolist()]
    write_json(record_path(out, shard), record)
    return record


def _finish(
    out: Path, source: Source, encoder: Encoder, plan: dict[str, Any], records: list[dict[str, Any]]
) -> None:
    """Labels, names and what was skipped, then the index, whose presence says that the folder is whole."""
    skipped = {place: reason for record in records for place, reason in record["skipped"]}
    kept = [place for place in range(len(source.files)) if place not in skipped]
    if not kept:
        raise UserError(f"{source.root}: none of the {len(skipped):,} images could be decoded: {skipped[0]}")
    used = np.bincount(source.labels[kept], minlength=len(source.class_names))
    for label in np.flatnonzero(used == 0):
        warn(f"{source.class_names[label]}: a class of which no image could be used")
    labels = BytesIO()
    np.lib.format.write_array(labels, source.labels[kept], version=(1, 0), allow_pickle=False)
    labels_sha256 = write_whole(out / LABELS, [labels.getvalue()])
    names = [source.files[place][0] for place in kept]
    write_whole(out / FILES, [_lines(names)])
    write_whole(out / SKIPPED, [_lines([f"{source.files[p][0]}\t{skipped[p]}" for p in sorted(skipped)])])
    index = {
        **plan,
        "rows": len(kept),
        "skipped": len(skipped),
        "labels_sha256": labels_sha256,
        "samples": _sample_statistics(records, encoder, len(kept)),
        "shards": [{k: r[k] for k in ("file", "rows", "bytes", "sha256")} for r in records if r["rows"]],
    }
    write_json(out / INDEX, index)


def _sample_statistics(
    records: list[dict[str, Any]], encoder: Encoder, rows: int
) -> dict[str, list[float]] | None:
    """Mean and standard deviation of the latents as the network sees them, a value a channel.

    By E[x] = E[mean] and E[x²] = E[mean² + std²]; for pixels None.
    """
    sums = [record["sums"] for record in records if "sums" in record]
    if not sums:
        return None
    first, second = np.sum(sums, axis=0) / (rows * encoder.shape[1] * encoder.shape[2])
    mean, std = np.array(encoder.about["mean"]), np.array(encoder.about["std"])
    return {
        "mean": ((first - mean) / std).tolist(),
        "std": (np.sqrt(np.maximum(second - first**2, 0)) / std).tolist(),
    }


def _warn_if_small(out: Path, source: Source, encoder: Encoder) -> None:
    row = math.prod(encoder.row_shape) * np.dtype(encoder.dtype).itemsize
    needed = row * len(source.files) - sum(path.stat().st_size for path in out.glob("shard-*.npy"))
    free = shutil.disk_usage(out).free
    if needed > free:
        warn(f"{out} needs {needed:,} bytes more, {free:,} are free there")


def _lines(texts: list[str]) -> bytes:
    return "".join(text + "\n" for text in texts).encode(errors="surrogateescape")


def _first_lines(path: Path, count: int) -> list[str]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        return [line.rstrip("\n") for _, line in zip(range(count), file, strict=False)]


def _say(text: str) -> None:
    """A line on standard output, in which a file name may hold bytes that are no text."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, errors="backslashreplace").decode(encoding))


def main(argv: list[str] | None = None) -> int:
    """`python -m imf.data.prepare`; returns the exit status: 0, 1 error, 2 wrong argument, 130 stopped."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such images are skipped, and listed
    try:
        if arguments.verify:
            _verify(arguments.verify)
            return 0
        if arguments.source is None or arguments.out is None:
            parser.error("SOURCE and OUT are needed, or --verify OUT")
        if (arguments.vae is None) != arguments.pixels:
            parser.error("either --vae PATH, for latents, or --pixels is needed")
        if (arguments.statistics is None) != (arguments.extractor is None):
            parser.error("--statistics FILE and --extractor NAME go together")
        if arguments.workers < 0:
            parser.error(f"--workers must be at least 0, got {arguments.workers}")
        _run(arguments)
    except KeyboardInterrupt:
        print("\nimf.data.prepare: stopped; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        print(f"\nimf.data.prepare: {error}", file=sys.stderr)
        return 1
    return 0


def _run(arguments: argparse.Namespace) -> None:
    size, workers = arguments.size, arguments.workers or os.cpu_count() or 1
    if arguments.statistics is not None:
        try:
            check_target(arguments.statistics)  # before hours of work
        except OSError as error:
            raise UserError(f"--statistics {error}") from error
    device = choose_device(arguments.device)
    extractor = features.load(arguments.extractor, device) if arguments.extractor else None
    encoder = Pixels(size) if arguments.pixels else Latents(arguments.vae, size, device, arguments.precision)
    source = sources.find(arguments.source, arguments.labels)
    if arguments.out.resolve().is_relative_to(arguments.source.resolve()):
        raise UserError(f"{arguments.out}: OUT must lie outside of SOURCE, {arguments.source}")
    _say(f"{source.root}: {len(source.files):,} images in {len(source.class_names):,} classes")
    if source.others:
        _say(
            f"{len(source.others):,} other files are left out, which do not end in "
            f"{', '.join(sorted(EXTENSIONS))}: such as {', '.join(source.others[:3])}"
        )
    data = prepare(
        source,
        arguments.out,
        encoder,
        size=size,
        batch_size=arguments.batch_size,
        shard_size=arguments.shard_size,
        workers=workers,
    )
    _say(
        f"{arguments.out}: {len(data):,} {data.kind} {list(data.shape)} of {data.num_classes:,} classes, "
        f"{len(data.shards):,} shards"
    )
    if skipped := data.index["skipped"]:
        _say(f"{skipped:,} images skipped, all listed in {arguments.out / SKIPPED}:")
        for line in _first_lines(arguments.out / SKIPPED, SHOWN):
            _say("  " + line.replace("\t", ": ", 1))
        if skipped > SHOWN:
            _say("  ...")
    if samples := data.index["samples"]:
        mean, std = (", ".join(f"{value:.3f}" for value in samples[name]) for name in ("mean", "std"))
        _say(f"Channels as the network sees them: mean {mean}; std {std} (on ImageNet 0 and 1)")
        if max(map(abs, samples["mean"])) > 0.5 or not all(0.5 < value < 2 for value in samples["std"]):
            warn(
                "far from 0 and 1: images unlike ImageNet, or another autoencoder than that of the constants"
            )
    if extractor is not None:
        source_statistics(source, size, extractor, workers).save(arguments.statistics)
        _say(f"{arguments.statistics}: statistics of the images by {arguments.extractor}")


def _verify(out: Path) -> None:
    data = PackedData(out)
    for _ in tqdm(data.verify(), total=len(data.shards), desc=out.name, unit="shard", dynamic_ncols=True):
        pass
    _say(f"{out}: {len(data):,} rows of {data.kind} in {len(data.shards):,} shards, every checksum agrees")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m imf.data.prepare",
        description="Pack a folder of images, as latents or pixels, for imf.train. The same command goes on "
        "where a stopped or killed one was.",
    )
    add = parser.add_argument
    add("source", type=Path, nargs="?", metavar="SOURCE", help="folder with a folder a class, or ImageNet's")
    add("out", type=Path, nargs="?", metavar="OUT", help="folder to write: new, empty, or begun alike")
    add("--vae", type=Path, metavar="PATH", help="folder of diffusers' AutoencoderKL (sd-vae-ft-mse)")
    add("--pixels", action="store_true", help="store the pixels, without an autoencoder")
    add("--labels", type=Path, metavar="FILE", help="lines `file label`, for images without class folders")
    add("--size", type=int, default=256, help="pixels of a side after the crop (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="images encoded together (default: %(default)s)")
    add("--shard-size", type=int, default=4096, help="images a shard (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<index> (default: %(default)s)")
    add("--precision", choices=PRECISIONS, default="fp32", help="of the encoder (default: %(default)s)")
    add("--workers", type=int, default=0, help="threads that decode images (default: a core each)")
    add("--statistics", type=Path, metavar="FILE", help="write FID statistics of the images (.npz) too")
    add("--extractor", metavar="NAME", help=f"by these features: {features.FORMS}")
    add("--verify", type=Path, metavar="OUT", help="only check every byte of a finished folder")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""How good samples are: FID and Inception score, `python -m imf.evaluate`.

On many processes (`torchrun -m imf.evaluate …`) each makes a slice of the samples; sums of features, and the
logits, are combined on the first.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from imf import data
from imf.distributed import DistributedContext, initialized
from imf.evaluation import fid
from imf.evaluation import inception as features
from imf.evaluation import vae as autoencoder
from imf.evaluation.fid import Statistics
from imf.evaluation.inception import Extractor
from imf.evaluation.results import Row, figures, measure, plot, read_results, table, write_results
from imf.evaluation.samples import Settings, claim, fingerprint, generate, image_files, read_images, to_bytes
from imf.io import check_target, locked
from imf.model.imf import IMF
from imf.program import UserError, exit_status, interruptible
from imf.sampling import check_inputs_of
from imf.training import checkpoint

COUNT = 50_000  # images of the published figures


def reference_statistics(
    name: str, extractor: Extractor, processes: DistributedContext, batch_size: int = 64
) -> Statistics | None:
    """What samples are compared with, on the first process; None on the others.

    name: a file of statistics (.npz), a folder of images, "digits" or a folder of prepared images.
    Raises: UserError or ValueError for what cannot be read or is no image.
    """
    path = Path(name)
    if path.suffix == ".npz":
        return fid.load_statistics(path) if processes.rank == 0 else None
    return measure(_images_of(name, processes, batch_size), extractor, processes)[0]


def _images_of(name: str, processes: DistributedContext, batch_size: int) -> Iterable[Tensor]:
    """This process's slice of the images of a folder or of a data set."""
    path = Path(name)
    if name != "digits" and not path.is_dir():
        raise UserError(
            f"{name}: no such file or folder; wanted statistics (.npz), a folder of images or a data set"
        )
    if path.is_dir() and (files := image_files(path)):
        rows = processes.slice(len(files))
        batches = read_images(files[rows.start : rows.stop], batch_size)
        return _with_bar(batches, len(rows), name, processes)
    dataset = data.load(name)
    if dataset.shape[0] not in (1, 3):
        raise UserError(
            f"{name}: images have 1 or 3 channels, got {dataset.shape[0]}: latents; statistics of the images "
            "that they were made of are written by imf.data.prepare --statistics"
        )
    rows = processes.slice(len(dataset))
    generator = torch.Generator()
    parts = torch.arange(rows.start, rows.stop).split(batch_size)
    batches = (to_bytes(dataset.fetch(part, generator)[0]) for part in parts)
    return _with_bar(batches, len(rows), name, processes)


def main(argv: list[str] | None = None) -> int:
    """`python -m imf.evaluate`; returns the exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such images are refused by name
    try:
        _check(parser, arguments)
        with interruptible(), initialized(arguments.device) as processes:
            extractor = features.load(arguments.extractor, processes.device)
            if arguments.make_statistics:
                _make_statistics(arguments, extractor, processes)
            else:
                _evaluate(arguments, extractor, processes)
    except (UserError, ValueError, OSError) as error:
        print(f"imf.evaluate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print("\nimf.evaluate: stopped; the same command goes on from there", file=sys.stderr)
        return exit_status(stop)
    return 0


def _make_statistics(
    arguments: argparse.Namespace, extractor: Extractor, processes: DistributedContext
) -> None:
    source, out = arguments.make_statistics
    found = reference_statistics(source, extractor, processes, arguments.batch_size)
    if found is not None:
        found.save(Path(out))
        print(f"{out}: mean and covariance of {found.mean.size} features of the images in {source}")


def _evaluate(arguments: argparse.Namespace, extractor: Extractor, processes: DistributedContext) -> None:
    """Every setting in turn: samples, features, figures; results are written after each."""
    a, path = arguments, arguments.out / "results.json"
    network = vae = None
    cells: list[Settings | None] = [None]  # images that were found have no setting
    if a.checkpoint:
        network, vae, cells = _sampler(a, processes.device)
    reference = reference_statistics(a.reference, extractor, processes, a.batch_size) if a.reference else None
    of = _what_is_judged(a, cells[0])
    with contextlib.ExitStack() as locks:
        if processes.rank == 0:
            written = [a.out, a.samples_dir] if a.checkpoint and a.samples_dir else [a.out]
            for folder in written:
                folder.mkdir(parents=True, exist_ok=True)
            for folder in {folder.resolve() for folder in written}:
                locks.enter_context(locked(folder))
        rows = processes.broadcast(read_results(path, of) if processes.rank == 0 else None)
        for cell in cells:
            if any(row.setting == _setting(cell) for row in rows):
                continue
            began = time.perf_counter()
            images = _samples(a, cell, network, vae, processes)
            found, logits = measure(images, extractor, processes, reference.mean.size if reference else None)
            if found is not None:
                seconds = round(time.perf_counter() - began, 3)
                rows.append(Row(*_setting(cell), a.count, *figures(found, logits, reference), seconds))
                made = {"checkpoint": str(a.checkpoint or ""), **checkpoint.environment(processes.device)}
                write_results(path, of, rows, made)
    if processes.rank == 0:
        wanted = [_setting(cell) for cell in cells]
        shown = [row for row in rows if row.setting in wanted]
        if a.plot:
            plot(a.plot, shown)
        print(f"{table(shown)}\n\nResults: {path}")


def _what_is_judged(a: argparse.Namespace, cell: Settings | None) -> dict[str, Any]:
    """What the rows of one file of results have in common: which figures may stand beside each other."""
    same = asdict(cell) if cell else {"count": a.count}
    return {
        **{name: same.get(name, "") for name in ("weights", "vae", "precision", "count", "seed")},
        "samples": "" if a.checkpoint else str(a.samples_dir),
        "extractor": _named(a.extractor),
        "reference": _named(a.reference or ""),
    }


def _sampler(a: argparse.Namespace, device: torch.device) -> tuple[IMF, Any, list[Settings | None]]:
    """Network, autoencoder and the settings of the grid."""
    network, metadata = checkpoint.load_network(checkpoint.find(a.checkpoint), a.weights)
    omega, t_min, t_max = metadata.config.sampling
    precision = a.precision or metadata.precision
    network.compute_dtype = checkpoint.DTYPES[precision]
    network.to(device).eval()
    vae = autoencoder.of_network(a.vae, network.config.in_channels, device, metadata.autoencoder)
    base = Settings(
        weights=fingerprint(network.state_dict()),
        vae=fingerprint(vae.state_dict()) if vae else "",
        precision=precision,
        count=a.count,
        seed=a.seed,
        steps=1,
        omega=omega,
        t_min=t_min,
        t_max=t_max,
    )
    grid = product(a.steps, a.interval or [(t_min, t_max)], a.omega or [omega])
    cells = [replace(base, steps=n, omega=w, t_min=low, t_max=high) for n, (low, high), w in grid]
    for cell in cells:
        check_inputs_of(network.config, cell.omega, cell.t_min, cell.t_max)
    return network, vae, list(dict.fromkeys(cells))


def _samples(
    a: argparse.Namespace, cell: Settings | None, network: IMF | None, vae: Any, processes: DistributedContext
) -> Iterable[Tensor]:
    """This process's batches of a setting's samples, or of the images that were found."""
    rows = processes.slice(a.count)
    if cell is None or network is None:
        files = image_files(a.samples_dir)
        if len(files) != a.count:
            raise UserError(f"{a.samples_dir}: wanted {a.count} images (--count), found {len(files)}")
        batches = read_images(files[rows.start : rows.stop], a.batch_size)
        return _with_bar(batches, len(rows), str(a.samples_dir), processes)
    folder = a.samples_dir / cell.name if a.samples_dir else None
    if folder and processes.rank == 0:
        claim(folder, cell)  # before another process looks
    processes.broadcast(None)
    batches = generate(network, cell, rows, batch_size=a.batch_size, vae=vae, folder=folder)
    return _with_bar(batches, len(rows), cell.name, processes)


def _with_bar(
    batches: Iterable[Tensor], total: int, title: str, processes: DistributedContext
) -> Iterable[Tensor]:
    quiet = processes.rank > 0
    interval = 0.5 if sys.stderr.isatty() else 10
    with tqdm(total=total, desc=title, unit="image", disable=quiet, mininterval=interval) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


def _setting(cell: Settings | None) -> tuple[int | None, float | None, float | None, float | None]:
    return (cell.steps, cell.omega, cell.t_min, cell.t_max) if cell else (None, None, None, None)


def _named(name: str) -> str:
    """An extractor or reference as it was given; a file by its name and the first digits of its digest."""
    path = Path(name)
    if not path.is_file():
        return name
    return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m imf.evaluate",
        description="FID and Inception score of a network's samples, or of images in a folder.",
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, help="a checkpoint, or the folder of a run (its newest one)")
    add(
        "--weights", choices=("ema", "model"), default="ema", help="averaged or latest (default: %(default)s)"
    )
    add("--precision", choices=tuple(checkpoint.DTYPES), help="of products and attention (default: its own)")
    add(
        "--samples-dir",
        type=Path,
        help="keep samples here, a folder a setting, and go on from those that are there; "
        "without --checkpoint: the images to judge",
    )
    add(
        "--count",
        type=int,
        help=f"images, as many of each class (default: {COUNT:,}, or all that --samples-dir holds)",
    )
    add("--steps", type=int, nargs="+", default=[1], help="network calls per sample (default: 1)")
    add("--omega", type=float, nargs="+", help="guidance scales (default: its own)")
    add(
        "--interval",
        type=float,
        nargs=2,
        action="append",
        metavar=("T_MIN", "T_MAX"),
        help="guidance interval; may be given several times (default: its own)",
    )
    add("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="images at a time a process (default: %(default)s)")
    add("--vae", type=Path, help="folder of the AutoencoderKL (sd-vae-ft-mse) that decodes latents")
    add("--extractor", required=True, help=f"what makes features of images: {features.FORMS}")
    add("--reference", help="statistics (.npz), a folder of images or a data set; without it no FID")
    add(
        "--make-statistics",
        nargs=2,
        metavar=("SOURCE", "OUT"),
        help="write the statistics of a folder of images or of a data set, and nothing else",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<index> (default: %(default)s)")
    add("--out", type=Path, default=Path("evaluation"), help="folder of results.json (default: %(default)s)")
    add("--plot", type=Path, help="draw the figures over ω into this PNG")
    return parser


def _check(parser: argparse.ArgumentParser, a: argparse.Namespace) -> None:
    if a.make_statistics and (a.checkpoint or a.samples_dir):
        parser.error("--make-statistics goes with neither --checkpoint nor --samples-dir")
    if not (a.make_statistics or a.checkpoint or a.samples_dir):
        parser.error("one of --checkpoint, --samples-dir and --make-statistics is required")
    if a.samples_dir and not a.checkpoint and not a.samples_dir.is_dir():
        parser.error(f"--samples-dir: no such folder: {a.samples_dir}")
    if a.make_statistics and not a.make_statistics[1].endswith(".npz"):
        parser.error(f"--make-statistics: OUT must end in .npz, got {a.make_statistics[1]}")
    if a.count is None:
        a.count = COUNT if a.checkpoint or not a.samples_dir else len(image_files(a.samples_dir))
        if not a.count:
            parser.error(f"--samples-dir: no images in {a.samples_dir}")
    for name in ("count", "batch_size"):
        if getattr(a, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(a, name)}")
    if min(a.steps) < 1:
        parser.error(f"--steps must be at least 1, got {min(a.steps)}")
    if not 0 <= a.seed < 2**63:
        parser.error(f"--seed must be at least 0 and below 2 ** 63, got {a.seed}")
    if a.plot and not a.checkpoint:
        parser.error("--plot draws over the guidance of samples: it needs --checkpoint")
    if not a.make_statistics and a.out.exists() and not a.out.is_dir():
        parser.error(f"--out must be a folder, got a file or a device: {a.out}")
    for path in (a.plot, Path(a.make_statistics[1]) if a.make_statistics else None):
        if path:
            check_target(path)  # before hours of work


if __name__ == "__main__":
    sys.exit(main())

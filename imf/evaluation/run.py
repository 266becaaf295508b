"""An evaluation by its command line arguments: samples of every setting, their figures, results after each.

With several processes each makes a slice of the samples; sums of features, and the logits, are combined on
the first.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from imf import random
from imf.distributed import DistributedContext
from imf.evaluation import samples
from imf.evaluation import vae as autoencoder
from imf.evaluation.fid import Statistics, frechet_distance, inception_score, load_statistics, measure
from imf.evaluation.inception import Extractor
from imf.evaluation.results import Row, plot, read_results, table
from imf.io import check_target, locked, sha256, write_json
from imf.model.sampler import check_inputs_of
from imf.program import UserError, bar_options

COUNT = 50_000  # images of the published figures
SPLITS = 10  # of the Inception score
Setting = tuple[Any, Any, Any, Any]  # steps, omega, t_min, t_max; None for images that were found


def check_arguments(a: argparse.Namespace, error: Callable[[str], Any]) -> None:
    """Checks the arguments of `imf.evaluate` before hours of work, and sets --count where it is not given.

    error: `ArgumentParser.error`.
    Raises: UserError or OSError if a file could not be written, or the images cannot be listed.
    """
    out = a.make_statistics[1] if a.make_statistics else ""
    if a.make_statistics and (a.checkpoint or a.samples_dir):
        error("--make-statistics goes with neither --checkpoint nor --samples-dir")
    if not (a.make_statistics or a.checkpoint or a.samples_dir):
        error("one of --checkpoint, --samples-dir and --make-statistics is required")
    if a.samples_dir and not a.checkpoint and not a.samples_dir.is_dir():
        error(f"--samples-dir: no such folder: {a.samples_dir}")
    if a.make_statistics and not out.endswith(".npz"):
        error(f"--make-statistics: OUT must end in .npz, got {out}")
    if a.count is None:
        a.count = COUNT if a.checkpoint or not a.samples_dir else len(samples.image_files(a.samples_dir))
        if not a.count:
            error(f"--samples-dir: no images in {a.samples_dir}")
    for name, value in (("count", a.count), ("batch-size", a.batch_size), ("steps", min(a.steps))):
        if value < 1:
            error(f"--{name} must be at least 1, got {value}")
    if not 0 <= a.seed < 2**63:
        error(f"--seed must be at least 0 and below 2 ** 63, got {a.seed}")
    if a.plot and not a.checkpoint:
        error("--plot draws over the guidance of samples: it needs --checkpoint")
    if not a.make_statistics and a.out.exists() and not a.out.is_dir():
        error(f"--out must be a folder, got a file or a device: {a.out}")
    for path in filter(None, (a.plot, out and Path(out))):
        check_target(path)


@dataclass(frozen=True)
class Evaluation:
    """One process's part in an evaluation with these arguments of `imf.evaluate`.

    load_data: `imf.data.load`.  network: of --checkpoint, on the processes' device.
    """

    arguments: argparse.Namespace
    processes: DistributedContext
    extractor: Extractor
    load_data: Callable[[str], Any]
    network: Any = None

    def make_statistics(self) -> None:
        """Writes the statistics of --make-statistics SOURCE to OUT; UserError or OSError if that fails."""
        source, out = self.arguments.make_statistics
        found = self._statistics(source)
        if found is not None:
            found.save(Path(out))
            print(f"{out}: mean and covariance of {found.mean.size} features of the images in {source}")

    def run(self, environment: dict[str, str]) -> None:
        """Measures every setting in turn; results are written after each, and those of an earlier run kept.

        environment: noted in the results.
        Raises: UserError or OSError, naming the argument or the file.
        """
        a, processes, path = self.arguments, self.processes, self.arguments.out / "results.json"
        settings: list[Setting] = [(None, None, None, None)]
        shared = {"weights": "", "vae": "", "precision": "", "count": a.count, "seed": ""}
        folders, decode = [a.out], None
        if self.network is not None:
            config, folders = self.network.config, [a.out, *filter(None, [a.samples_dir])]
            sampling, channels = self.network.sampling, config.in_channels
            vae = autoencoder.of_network(a.vae, channels, processes.device, sampling.autoencoder)
            decode = partial(autoencoder.decode, vae) if vae else None
            weights, vae_weights = (
                samples.fingerprint(x.state_dict()) if x else "" for x in (self.network, vae)
            )
            shared |= {"weights": weights, "vae": vae_weights, "precision": a.precision, "seed": a.seed}
            interval = sampling.t_min, sampling.t_max
            grid = product(a.steps, a.interval or [interval], a.omega or [sampling.omega])
            settings = list(dict.fromkeys((n, w, low, high) for n, (low, high), w in grid))
            for _, *guidance in settings:
                check_inputs_of(config, *guidance)
        reference = self._statistics(a.reference) if a.reference else None
        judged = {
            **shared,
            "random_scheme": random.SCHEME,
            "samples": "" if a.checkpoint else str(a.samples_dir),
            "extractor": _named(a.extractor),
            "reference": _named(a.reference or ""),
        }
        with contextlib.ExitStack() as locks:
            if processes.rank == 0:
                for folder in folders:
                    folder.mkdir(parents=True, exist_ok=True)
                for folder in {folder.resolve() for folder in folders}:
                    locks.enter_context(locked(folder))
            rows = processes.broadcast(read_results(path, judged) if processes.rank == 0 else None)
            for setting in settings:
                if any(row.setting == setting for row in rows):
                    continue
                began = time.perf_counter()
                images = self._images(setting, shared, decode)
                width = reference.mean.size if reference else None
                found, logits = measure(images, self.extractor, processes, width)
                if found is None:
                    continue
                if reference:
                    print(f"Fréchet distance of {reference.mean.size:,} features", file=sys.stderr)
                fid = frechet_distance(found, reference) if reference else None
                enough = logits if logits is not None and len(logits) >= SPLITS else None
                score, deviation = (None, None) if enough is None else inception_score(enough, SPLITS)
                seconds = round(time.perf_counter() - began, 3)
                rows.append(Row(*setting, a.count, fid, score, deviation, seconds))
                values = {"settings": judged, "environment": environment, "rows": [vars(row) for row in rows]}
                write_json(path, values)
        if processes.rank == 0:
            shown = [row for row in rows if row.setting in settings]
            if a.plot:
                plot(a.plot, shown)
            print(f"{table(shown)}\n\nResults: {path}")

    def _statistics(self, source: str) -> Statistics | None:
        """Reads statistics (.npz), or make those of images, on the first process; None on the others."""
        if Path(source).suffix == ".npz":
            return load_statistics(Path(source)) if self.processes.rank == 0 else None
        return measure(self._images_of(source), self.extractor, self.processes)[0]

    def _images_of(self, source: str) -> Iterable[Tensor]:
        """Reads this process's slice of the images in a folder, of "digits" or of prepared images."""
        path, size, slice_of = Path(source), self.arguments.batch_size, self.processes.slice
        if source != "digits" and not path.is_dir():
            wanted = "wanted statistics (.npz), a folder of images or a data set"
            raise UserError(f"{source}: no such file or folder; {wanted}")
        if path.is_dir() and (files := samples.image_files(path)):
            rows = slice_of(len(files))
            batches = samples.read_images([files[i] for i in rows], size)
            return self._with_bar(batches, len(rows), source)
        dataset = self.load_data(source)
        if dataset.shape[0] not in (1, 3):
            raise UserError(
                f"{source}: images have 1 or 3 channels, got {dataset.shape[0]}: latents; statistics of the "
                "images that they were made of are written by imf.data.prepare --statistics"
            )
        rows = slice_of(len(dataset))
        generator, parts = torch.Generator(), torch.arange(rows.start, rows.stop).split(size)
        batches = (samples.to_bytes(dataset.fetch(part, generator)[0]) for part in parts)
        return self._with_bar(batches, len(rows), source)

    def _images(self, setting: Setting, shared: dict[str, Any], decode: Any) -> Iterable[Tensor]:
        """Makes this process's slice of the samples of a setting, or read that of the images to judge."""
        a, rows = self.arguments, self.processes.slice(self.arguments.count)
        if self.network is None:
            if (count := len(samples.image_files(a.samples_dir))) != a.count:
                raise UserError(f"{a.samples_dir}: wanted {a.count} images (--count), found {count}")
            return self._images_of(str(a.samples_dir))
        values = zip(("steps", "omega", "t_min", "t_max"), setting, strict=True)
        settings = samples.Settings(**shared, **dict(values))
        folder = a.samples_dir / settings.name if a.samples_dir else None
        if folder and self.processes.rank == 0:
            samples.claim(folder, settings)  # before another process looks
        self.processes.broadcast(None)
        options = {"batch_size": a.batch_size, "decode": decode, "folder": folder}
        batches = samples.sample_images(self.network, settings, rows, **options)
        return self._with_bar(batches, len(rows), settings.name)

    def _with_bar(self, batches: Iterable[Tensor], total: int, title: str) -> Iterable[Tensor]:
        quiet = self.processes.rank > 0
        with tqdm(total=total, desc=title, unit="image", disable=quiet, **bar_options()) as bar:
            for batch in batches:
                yield batch
                bar.update(len(batch))


def _named(name: str) -> str:
    """Returns an extractor or reference as it was given; a file by its name and the start of its digest."""
    path = Path(name)
    return f"{path.name} {sha256(path)[:16]}" if path.is_file() else name

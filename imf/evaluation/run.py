"""An evaluation by its command line arguments: samples of every setting, their figures, results after each.

With several processes each makes a slice of the samples; sums of features, the logits, and what precision,
recall and variance are made of are combined on the first.
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

from imf import random
from imf.distributed import DistributedContext
from imf.evaluation import convnet, quality, samples
from imf.evaluation import vae as autoencoder
from imf.evaluation.convnet import RunExtractor
from imf.evaluation.fid import Statistics, frechet_distance, inception_score, load_statistics, measure
from imf.evaluation.inception import Extractor
from imf.evaluation.quality import WithinClasses, precision_recall, variance_ratio
from imf.evaluation.results import Row, plot, read_results, table
from imf.io import check_target, fingerprint, locked, sha256, write_json
from imf.model.sampler import check_inputs_of
from imf.program import UserError, progress

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
class Images:
    """One process's part of `total` images: the numbers `rows`, in batches.

    batches: [B, C, H, W] uint8 on any device, and labels [B] int64, None where the images have none.
    """

    batches: Iterable[tuple[Tensor, Tensor | None]]
    rows: range
    total: int


@dataclass(frozen=True)
class Observation:
    """What the first process knows of images: moments of features, and what the other figures are made of.

    features: of at most `quality.MOST` images, evenly spaced, None of statistics that were read.
    labels: [N] int64, None for images without.
    """

    statistics: Statistics
    logits: Tensor | None = None
    features: Tensor | None = None
    within: WithinClasses | None = None
    labels: Tensor | None = None


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
        found = self._reference(source)
        if found is not None:
            found.statistics.save(Path(out))
            size = found.statistics.mean.size
            print(f"{out}: mean and covariance of {size} features of the images in {source}")

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
            weights, vae_weights = (fingerprint(x.state_dict()) if x else "" for x in (self.network, vae))
            shared |= {"weights": weights, "vae": vae_weights, "precision": a.precision, "seed": a.seed}
            interval = sampling.t_min, sampling.t_max
            grid = product(a.steps, a.interval or [interval], a.omega or [sampling.omega])
            settings = list(dict.fromkeys((n, w, low, high) for n, (low, high), w in grid))
            for _, *guidance in settings:
                check_inputs_of(config, *guidance)
        reference = self._reference(a.reference) if a.reference else None
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
                width = reference.statistics.mean.size if reference else None
                found = self._observe(self._images(setting, shared, decode), width)
                if found is None:
                    continue
                figures = self._figures(found, reference)
                seconds = round(time.perf_counter() - began, 3)
                rows.append(Row(*setting, a.count, seconds=seconds, **figures))
                values = {"settings": judged, "environment": environment, "rows": [vars(row) for row in rows]}
                write_json(path, values)
        if processes.rank == 0:
            shown = [row for row in rows if row.setting in settings]
            if a.plot:
                plot(a.plot, shown)
            print(f"{table(shown)}\n\nResults: {path}")

    def _reference(self, source: str) -> Observation | None:
        """Reads statistics (.npz), or observes images, on the first process; None on the others."""
        if Path(source).suffix == ".npz":
            return None if self.processes.rank else Observation(load_statistics(Path(source)))
        return self._observe(self._images_of(source))

    def _observe(self, images: Images, width: int | None = None) -> Observation | None:
        """Measures images and keeps a part of their features; None on all processes but the first."""
        kept: list[Tensor] = []
        labels: list[Tensor] = []
        within = WithinClasses()
        wanted = quality.spaced(torch.arange(images.total), quality.MOST)

        def extracted() -> Iterable[tuple[Tensor, Tensor | None]]:
            place = images.rows.start
            for batch, own in images.batches:
                if own is not None:
                    labels.append(own)
                    within.add(batch.float() / 127.5 - 1, own)
                features, logits = self.extractor(batch)
                rows = wanted[(wanted >= place) & (wanted < place + len(batch))] - place
                kept.append(features[rows.to(features.device)].cpu())
                place += len(batch)
                yield features, logits

        found, logits = measure(extracted(), self.processes, width)
        parts = self.processes.gather((kept, labels, within))
        if found is None:
            return None
        for _, _, other in parts[1:]:
            within.merge(other)
        features = torch.cat([x for part, _, _ in parts for x in part])
        known = [x for _, part, _ in parts for x in part]
        return Observation(found, logits, features, within, torch.cat(known) if known else None)

    def _figures(self, found: Observation, reference: Observation | None) -> dict[str, Any]:
        """Returns the figures of a row, None for those that these images and this reference do not have."""
        score, deviation = None, None
        if found.logits is not None and len(found.logits) >= SPLITS:
            score, deviation = inception_score(found.logits, SPLITS)
        fid = precision = recall = ratio = accuracy = None
        if reference is not None:
            print(f"Fréchet distance of {reference.statistics.mean.size:,} features", file=sys.stderr)
            fid = frechet_distance(found.statistics, reference.statistics)
            a, b = found.features, reference.features
            if a is not None and b is not None and min(len(a), len(b)) > quality.NEIGHBOURS:
                precision, recall = precision_recall(a, b, device=self.processes.device, quiet=False)
            if found.within is not None and reference.within is not None:
                ratio = variance_ratio(found.within, reference.within)
        if isinstance(self.extractor, RunExtractor) and found.logits is not None and found.labels is not None:
            classes, known = self.network.config.num_classes, self.extractor.network.about.classes
            if known == classes:  # else it is of other data
                accuracy = float((found.logits.argmax(1) == found.labels).double().mean())
        return {
            "fid": fid,
            "inception_score": score,
            "inception_score_std": deviation,
            "precision": precision,
            "recall": recall,
            "variance_ratio": ratio,
            "accuracy": accuracy,
        }

    def _images_of(self, source: str) -> Images:
        """Reads this process's slice of the images in a folder, of "digits" or of prepared images."""
        path, size, slice_of = Path(source), self.arguments.batch_size, self.processes.slice
        if source != "digits" and not path.is_dir():
            wanted = "wanted statistics (.npz), a folder of images or a data set"
            raise UserError(f"{source}: no such file or folder; {wanted}")
        if path.is_dir() and (files := samples.image_files(path)):
            rows = slice_of(len(files))
            batches = samples.read_images([files[i] for i in rows], size)
            return Images(self._with_bar(((x, None) for x in batches), len(rows), source), rows, len(files))
        dataset = self.load_data(source)
        if dataset.shape[0] not in (1, 3):
            raise UserError(
                f"{source}: images have 1 or 3 channels, got {dataset.shape[0]}: latents; statistics of the "
                "images that they were made of are written by imf.data.prepare --statistics"
            )
        rows = slice_of(len(dataset))
        generator, parts = torch.Generator(), torch.arange(rows.start, rows.stop).split(size)
        pairs = (dataset.fetch(part, generator) for part in parts)
        prepared = ((samples.to_bytes(x), y) for x, y in pairs)
        return Images(self._with_bar(prepared, len(rows), source), rows, len(dataset))

    def _images(self, setting: Setting, shared: dict[str, Any], decode: Any) -> Images:
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
        labels = samples.classes(rows, a.count, self.network.config.num_classes).split(a.batch_size)
        pairs = self._with_bar(zip(batches, labels, strict=True), len(rows), settings.name)
        return Images(pairs, rows, a.count)

    def _with_bar(
        self, batches: Iterable[tuple[Tensor, Tensor | None]], total: int, title: str
    ) -> Iterable[tuple[Tensor, Tensor | None]]:
        quiet = self.processes.rank > 0
        with progress(None, title, "image", total=total, quiet=quiet) as bar:
            for images, labels in batches:
                yield images, labels
                bar.update(len(images))


def _named(name: str) -> str:
    """Returns an extractor or reference as it was given; a file by its name and the start of its digest."""
    path = Path(name)
    file = path / convnet.FILE if (path / convnet.FILE).is_file() else path
    return f"{path.name} {sha256(file)[:16]}" if file.is_file() else name

"""FID and Inception score of sets of images, over processes; as a file of results, a table and a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imf.distributed import DistributedContext
from imf.evaluation.fid import Moments, Statistics, frechet_distance, inception_score
from imf.evaluation.inception import Extractor
from imf.evaluation.samples import different
from imf.io import check_regular, naming, replacing, write_json
from imf.program import UserError

SPLITS = 10  # of the Inception score


@dataclass(frozen=True)
class Row:
    """The figures of one setting; None where there is no such thing.

    steps, omega, t_min, t_max: of the sampling, None for images that were found.  count: images.
    fid: against the reference.  inception_score, inception_score_std: mean and deviation over the splits.
    """

    steps: int | None
    omega: float | None
    t_min: float | None
    t_max: float | None
    count: int
    fid: float | None
    inception_score: float | None
    inception_score_std: float | None
    seconds: float

    @property
    def setting(self) -> tuple[int | None, float | None, float | None, float | None]:
        return self.steps, self.omega, self.t_min, self.t_max


def measure(
    images: Iterable[Tensor], extractor: Extractor, processes: DistributedContext, width: int | None = None
) -> tuple[Statistics | None, Tensor | None]:
    """Statistics and logits of all processes' images together, on the first process; elsewhere (None, None).

    images: this process's, in batches [B, C, H, W] uint8.  width: how many features there must be.
    Raises: ValueError for fewer than 2 images in all or features of another width, what the extractor raises.
    """
    moments: Moments | None = None
    parts: list[Tensor] = []
    for batch in images:
        features, logits = extractor(batch)
        moments = moments or Moments(width or features.shape[1], features.device)
        moments.update(features)
        if logits is not None:
            parts.append(logits.cpu())
    sums = (moments.count, moments.mean.cpu(), moments.scatter.cpu()) if moments else None
    all_sums = [s for s in processes.gather(sums) if s]
    all_logits = [x for part in processes.gather(parts) for x in part]
    if processes.rank:
        return None, None
    total = Moments(len(all_sums[0][1]) if all_sums else 0)
    for count, mean, scatter in all_sums:
        total.merge(count, mean, scatter)
    return total.statistics(), torch.cat(all_logits) if all_logits else None


def figures(
    found: Statistics, logits: Tensor | None, reference: Statistics | None
) -> tuple[float | None, float | None, float | None]:
    """FID, Inception score and its deviation; None without a reference, logits, or enough images."""
    distance = frechet_distance(found, reference) if reference else None
    if logits is None or len(logits) < SPLITS:
        return distance, None, None
    return distance, *inception_score(logits, SPLITS)


def read_results(path: Path, settings: dict[str, Any]) -> list[Row]:
    """The rows that an earlier evaluation of the same settings left in a file; none if there is no file.

    Raises: UserError if the file is damaged or of other settings.
    """
    if not path.exists():
        return []
    try:
        check_regular(path)
        values = json.loads(path.read_text())
        held, rows = dict(values["settings"]), [_checked(Row(**row)) for row in values["rows"]]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{path}: no results of imf.evaluate, or damaged: {error}; move it away, or choose another --out"
        ) from error
    if differences := different(held, settings):
        raise UserError(f"{path}: results of {differences}; choose another --out")
    return rows


def _checked(row: Row) -> Row:
    """The row, if its values are finite numbers, or None where that may be; ValueError otherwise."""
    for name, value in vars(row).items():
        optional = name not in ("count", "seconds")
        kinds = (int,) if name in ("steps", "count") else (int, float)
        fits = type(value) in kinds and math.isfinite(value)
        if not fits and not (optional and value is None):
            raise ValueError(f"{name} must be a number, got {value!r}")
    return row


def write_results(
    path: Path, settings: dict[str, Any], rows: Sequence[Row], environment: dict[str, str]
) -> None:
    """Write the rows with what they are of and what they were made with, whole or not at all."""
    values = {"settings": settings, "environment": environment, "rows": [asdict(row) for row in rows]}
    write_json(path, values)


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    lines = [f"{'steps':>5}  {'ω':>6}  {'interval':>12}  {'images':>7}  {'FID':>9}  {'IS':>16}"]
    for row in rows:
        steps = "" if row.steps is None else row.steps
        omega = "" if row.omega is None else f"{row.omega:g}"
        interval = "" if row.t_min is None else f"[{row.t_min:g}, {row.t_max:g}]"
        distance = "—" if row.fid is None else f"{row.fid:.3f}"
        score = "—"
        if row.inception_score is not None:
            score = f"{row.inception_score:.2f} ± {row.inception_score_std:.2f}"
        lines.append(f"{steps:>5}  {omega:>6}  {interval:>12}  {row.count:>7}  {distance:>9}  {score:>16}")
    return "\n".join(lines)


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Draw FID, and the Inception score where there is one, over ω: a line for each interval and step count.

    Raises: UserError if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install -e '.[bench]'") from error
    panels = [
        (name, label)
        for name, label in (("fid", "FID"), ("inception_score", "Inception score"))
        if any(getattr(row, name) is not None for row in rows)
    ]
    if not panels:
        raise UserError("--plot: no row has an FID or an Inception score")
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    lines = sorted({(row.steps, row.t_min, row.t_max) for row in rows})
    for axes, (name, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for steps, t_min, t_max in lines:
            of_line = [row for row in rows if (row.steps, row.t_min, row.t_max) == (steps, t_min, t_max)]
            points = sorted((row.omega, getattr(row, name)) for row in of_line)
            text = f"{steps} step{'s' if steps != 1 else ''}, [{t_min:g}, {t_max:g}]"
            axes.plot(*zip(*points, strict=True), marker="o", label=text)
        axes.set(xlabel="ω", ylabel=label)
        axes.legend()
    with naming(path), replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)

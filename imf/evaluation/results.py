"""Results of an evaluation: a row per setting, as a JSON file, a table and a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imf.evaluation.samples import different
from imf.io import check_regular, naming, replacing
from imf.program import UserError


@dataclass(frozen=True)
class Row:
    """Figures of one setting; None where there is no such value.

    steps, omega, t_min, t_max: of the sampling, None for images that were found.  count: images.
    fid: of the reference.  inception_score, inception_score_std: mean and deviation over the splits.
    precision, recall, variance_ratio, accuracy: see `imf.evaluation.quality`.
    Raises: UserError for a value that is not a finite number, or None where that may not be.
    """

    steps: int | None
    omega: float | None
    t_min: float | None
    t_max: float | None
    count: int
    fid: float | None
    inception_score: float | None
    inception_score_std: float | None
    precision: float | None
    recall: float | None
    variance_ratio: float | None
    accuracy: float | None
    seconds: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            kinds = (int,) if name in ("steps", "count") else (int, float)
            fits = type(value) in kinds and math.isfinite(value)
            if not fits and (value is not None or name in ("count", "seconds")):
                raise UserError(f"{name} must be a number, got {value!r}")

    @property
    def setting(self) -> tuple[int | None, float | None, float | None, float | None]:
        return self.steps, self.omega, self.t_min, self.t_max


def read_results(path: Path, settings: dict[str, Any]) -> list[Row]:
    """Reads the rows that an earlier evaluation of these settings left in a file; none without one.

    Raises: UserError if the file is damaged or of other settings.
    """
    if not path.exists():
        return []
    try:
        check_regular(path)
        values = json.loads(path.read_text())
        held, rows = dict(values["settings"]), [Row(**row) for row in values["rows"]]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{path}: no results of imf.evaluate, or damaged: {error}; move it away, or choose another --out"
        ) from error
    if differences := different(held, settings):
        raise UserError(f"{path}: results of {differences}; choose another --out")
    return rows


def table(rows: Sequence[Row]) -> str:
    """Formats the rows as aligned text; — where there is no figure."""
    more = ("precision", 9), ("recall", 6), ("variance_ratio", 8), ("accuracy", 8)
    lines = [
        f"{'steps':>5}  {'ω':>6}  {'interval':>12}  {'images':>7}  {'FID':>9}  {'IS':>16}  "
        f"{'precision':>9}  {'recall':>6}  {'variance':>8}  {'accuracy':>8}"
    ]
    for row in rows:
        steps, omega, interval, score = "", "", "", "—"
        if row.steps is not None:
            steps, omega, interval = f"{row.steps}", f"{row.omega:g}", f"[{row.t_min:g}, {row.t_max:g}]"
        if row.inception_score is not None:
            score = f"{row.inception_score:.2f} ± {row.inception_score_std:.2f}"
        distance = "—" if row.fid is None else f"{row.fid:.3f}"
        values = ((getattr(row, name), width) for name, width in more)
        others = "  ".join(f"{'—' if x is None else f'{x:.3f}':>{width}}" for x, width in values)
        lines.append(
            f"{steps:>5}  {omega:>6}  {interval:>12}  {row.count:>7}  {distance:>9}  {score:>16}  {others}"
        )
    return "\n".join(lines)


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Draws FID, and the Inception score where there is one, over ω: a line per interval and step count.

    Raises: UserError if matplotlib is not installed, or there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install -e '.[bench]'") from error
    labels = {"fid": "FID", "inception_score": "Inception score"}
    panels = [name for name in labels if any(getattr(row, name) is not None for row in rows)]
    if not panels:
        raise UserError("--plot: no row has an FID or an Inception score")
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    lines: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        lines.setdefault((row.steps, row.t_min, row.t_max), []).append(row)
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for (steps, t_min, t_max), of_line in sorted(lines.items()):
            points = sorted((row.omega, getattr(row, name)) for row in of_line)
            text = f"{steps} step{'s' if steps != 1 else ''}, [{t_min:g}, {t_max:g}]"
            axes.plot(*zip(*points, strict=True), marker="o", label=text)
        axes.set(xlabel="ω", ylabel=labels[name])
        axes.legend()
    with naming(path), replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)

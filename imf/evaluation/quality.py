"""Figures of samples and data: Fréchet distance, variance within classes, precision, recall, accuracy.

No one of them is enough: averages of the images of a class are all recognised, and lie among the data, so
accuracy and precision are near 1; the variance within classes and recall show what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from imf.evaluation.fid import frechet_distance, of_rows
from imf.program import UserError, progress

# Images [B, C, H, W] fp32 in [-1, 1], not clipped → features [B, D], or labels [B] int64.
Features = Callable[[Tensor], Tensor]
Classifier = Callable[[Tensor], Tensor]
NEIGHBOURS = 3  # of the published precision and recall
MOST = 10_000  # images of each side in precision and recall, whose time grows with the square
SIDE = 64  # pixels of the variance within classes, at most
_BLOCK = 2**24  # distances at a time: 128 MiB


def figures(
    samples: Tensor,
    labels: Tensor,
    data_images: Tensor,
    data_labels: Tensor,
    *,
    features: Features | None = None,
    classifier: Classifier | None = None,
    batch_size: int = 256,
) -> dict[str, float | None]:
    """Compares samples [N, C, H, W] of labels [N] with data [M, C, H, W] of labels [M].

    features: default the pixels themselves.  classifier: for the accuracy.
    Returns: `frechet_distance` of the features (lower is better); `variance_ratio`, of samples over data, of
        pixels within classes, clipped to [-1, 1] (1 is right); `precision` and `recall` in the features
        (higher is better); `accuracy` where there is a classifier (higher is better). None for a figure that
        these images do not have.
    Raises: UserError for shapes that do not fit, or values that are not finite.
    """
    sides = []
    for name, x, y in (("samples", samples, labels), ("data_images", data_images, data_labels)):
        if x.ndim != 4 or y.shape != x.shape[:1] or y.is_floating_point():
            raise UserError(
                f"figures: {name} must be [N, C, H, W] with integer labels [N], got {list(x.shape)} and "
                f"{list(y.shape)} {y.dtype}"
            )
        batches = zip(x.split(batch_size), y.split(batch_size), strict=True)
        sides.append(observe(batches, features or flat, classifier if name == "samples" else None))
    if (got := list(samples.shape[1:])) != (wanted := list(data_images.shape[1:])):
        raise UserError(f"figures: samples must be [N, {wanted}] like the data, got [N, {got}]")
    return compare(*sides)


def flat(images: Tensor) -> Tensor:
    """Returns the values of images [B, C, H, W] as features [B, C H W]."""
    return images.flatten(1)


class WithinClasses:
    """Count, sum and sum of squares of the images of each class, fp64: their variance within classes.

    Images of more than `SIDE` pixels are averaged over areas to that size. It takes 8 bytes per class and
    pixel.
    """

    def __init__(self) -> None:
        self._sums: dict[int, tuple[int, Tensor, float]] = {}

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Counts in images [B, C, H, W] of labels [B]."""
        height, width = images.shape[2:]
        if max(height, width) > SIDE:
            images = adaptive_avg_pool2d(images, (min(height, SIDE), min(width, SIDE)))
        rows = images.flatten(1).cpu().double()
        for label in labels.unique().tolist():
            own = rows[(labels == label).cpu()]
            self._merge(label, (len(own), own.sum(0), float(own.square().sum())))

    def merge(self, other: WithinClasses) -> None:
        """Counts in the images of another one."""
        for label, sums in other._sums.items():
            self._merge(label, sums)

    def _merge(self, label: int, sums: tuple[int, Tensor, float]) -> None:
        if label in self._sums:
            n, total, squares = self._sums[label]
            sums = n + sums[0], total + sums[1], squares + sums[2]
        self._sums[label] = sums

    def variances(self) -> dict[int, float]:
        """Returns the variance (divided by N - 1), summed over pixels, of each class of at least 2 images."""
        return {
            label: max(0.0, squares - float(total.square().sum()) / n) / (n - 1)
            for label, (n, total, squares) in self._sums.items()
            if n > 1
        }


def variance_ratio(samples: WithinClasses, data: WithinClasses) -> float | None:
    """Divides the mean over classes of the samples' variance by that of the data's.

    Classes that have fewer than two samples or images are left out; None if that leaves none, or if the
    images of each class are all the same. 1 is right; less: the samples of a class are alike.
    """
    a, b = samples.variances(), data.variances()
    shared = a.keys() & b.keys()
    whole = sum(b[label] for label in shared)
    return sum(a[label] for label in shared) / whole if whole > 0 else None


def precision_recall(
    samples: Tensor,
    data: Tensor,
    *,
    neighbours: int = NEIGHBOURS,
    device: torch.device | str = "cpu",
    quiet: bool = True,
) -> tuple[float, float]:
    """Returns precision and recall of samples [N, D] compared with data [M, D], both of them features.

    The manifold of a set is the union of balls around its points, each up to its `neighbours`-th nearest
    other point. Precision is the share of samples in the manifold of the data, recall the share of the data
    in that of the samples. n = min(N, M, `MOST`) of each, evenly spaced, are compared: radii depend on n.
    Distances in fp64 on `device`, in blocks of 128 MiB.  quiet: without a progress bar.
    Raises: UserError for too few rows, features of two widths, or not finite.
    Source: Kynkäänniemi et al., arXiv 1904.06991.
    """
    n = min(len(samples), len(data), MOST)
    if samples.ndim != 2 or data.ndim != 2 or samples.shape[1] != data.shape[1]:
        got = f"{list(samples.shape)} and {list(data.shape)}"
        raise UserError(f"precision_recall: features must be [N, D] and [M, D], got {got}")
    if n <= neighbours:
        raise UserError(f"precision_recall: each side must have more than {neighbours} rows, got {n}")
    a, b = (spaced(x, n).to(device, torch.float64) for x in (samples, data))
    if not (a.isfinite().all() and b.isfinite().all()):
        raise UserError("precision_recall: features must be finite; got inf or NaN: are the samples?")
    centre = b.mean(0)  # rounding of distances grows with the norms
    a, b = a - centre, b - centre
    blocks = torch.arange(n, device=device).split(max(1, _BLOCK // n))
    radii: dict[str, Tensor] = {}
    inside: dict[str, Tensor] = {}
    with progress(None, "precision and recall", "row", total=4 * n, brief=True, quiet=quiet) as shown:
        for name, x in (("samples", a), ("data", b)):
            parts = []
            for rows in blocks:  # the nearest point is the row itself
                parts.append(_squared_distances(x[rows], x).kthvalue(neighbours + 1, 1).values)
                shown.update(len(rows))
            radii[name] = torch.cat(parts)
        for name, x, others, radius in (("samples", a, b, radii["data"]), ("data", b, a, radii["samples"])):
            parts = []
            for rows in blocks:
                parts.append((_squared_distances(x[rows], others) <= radius).any(1))
                shown.update(len(rows))
            inside[name] = torch.cat(parts)
    return inside["samples"].double().mean().item(), inside["data"].double().mean().item()


def spaced(x: Tensor, count: int) -> Tensor:
    """Returns `count` of the rows of x, evenly spaced, in order; all of them if there are no more."""
    return x if count >= len(x) else x[torch.arange(count) * len(x) // count]


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Returns |x_i - y_j|² [B, N] fp64, exactly 0 for equal rows."""
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    squares = torch.addmm(norms, x, y.T, alpha=-2)
    return squares.masked_fill_(squares < 1e-12 * norms, 0.0)


@dataclass
class Population:
    """Record of images seen: features [N, D] fp32 on the CPU, labels, variance within classes, right labels.

    right: images to which the classifier gave their label; None without one.
    """

    features: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    within: WithinClasses = field(default_factory=WithinClasses)
    right: int | None = None

    @property
    def rows(self) -> Tensor:
        return torch.cat(self.features) if self.features else torch.empty(0, 0)


def observe(
    batches: Iterable[tuple[Tensor, Tensor]], features: Features, classifier: Classifier | None = None
) -> Population:
    """Observes batches of images [B, C, H, W] fp32 and labels [B]; UserError for what is not finite."""
    found = Population(right=None if classifier is None else 0)
    for images, labels in batches:
        if not images.isfinite().all():
            raise UserError("images must be finite, got inf or NaN: samples of a network that diverged?")
        found.features.append(features(images).float().cpu())
        found.labels.append(labels)
        found.within.add(images.clamp(-1, 1), labels)  # as they are shown
        if classifier is not None:
            found.right = (found.right or 0) + int((classifier(images).cpu() == labels.cpu()).sum())
    return found


def compare(samples: Population, data: Population, **options: Any) -> dict[str, float | None]:
    """Returns the figures of `figures` for two sides that were observed.  options: of `precision_recall`."""
    a, b = samples.rows, data.rows
    precision = recall = None
    if min(len(a), len(b)) > NEIGHBOURS:
        precision, recall = precision_recall(a, b, **options)
    found = {
        "frechet_distance": frechet_distance(of_rows(a), of_rows(b)),
        "variance_ratio": variance_ratio(samples.within, data.within),
        "precision": precision,
        "recall": recall,
    }
    return found if samples.right is None else found | {"accuracy": samples.right / len(a)}

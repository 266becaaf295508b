"""Fréchet Inception distance and Inception score, and the statistics of features that they are made from.

All sums are in fp64: batch size and number of processes change a figure by no more than their rounding.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.special import entr

from imf.distributed import DistributedContext
from imf.io import check_regular, naming, replacing
from imf.program import UserError

if TYPE_CHECKING:  # for the annotations
    from imf.evaluation.inception import Extractor

Array = NDArray[np.float64]
# Keys of mean and covariance in a statistics file, of the official PyTorch and of the official JAX programs.
KEYS = (("mu", "sigma"), ("ref_mu", "ref_sigma"))
WIDEST = 16_384  # features, whose covariance is 2 GiB in fp64


@dataclass(frozen=True)
class Statistics:
    """Mean [D] and covariance [D, D] (divided by N - 1) of features, fp64: the Gaussian that FID compares.

    Raises: UserError if the shapes do not fit, a value is not finite, or the second is no covariance.
    """

    mean: Array
    covariance: Array

    def __post_init__(self) -> None:
        mean, covariance, d = self.mean, self.covariance, self.mean.size
        if mean.shape != (d,) or covariance.shape != (d, d) or d == 0:
            got = f"{list(mean.shape)} and {list(covariance.shape)}"
            raise UserError(f"Statistics: mean must be [D] and covariance [D, D], got {got}")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise UserError("Statistics: mean and covariance must be finite")
        slack = 1e-3 * np.abs(covariance).max()  # the rounding of programs that sum in fp32
        if np.abs(covariance - covariance.T).max() > slack or covariance.diagonal().min() < -slack:
            raise UserError("Statistics: covariance must be symmetric, without a negative variance")

    def save(self, path: Path) -> None:
        """Writes an .npz with the keys `mu` and `sigma`, whole or not at all; OSError if that fails."""
        with naming(path), replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, mu=self.mean, sigma=self.covariance)


def load_statistics(path: Path) -> Statistics:
    """Reads the statistics in an .npz, `mu` and `sigma` or `ref_mu` and `ref_sigma`; nothing is unpickled.

    Raises: UserError if the file is missing, damaged or without them, or they do not fit together: shapes
        and types are known before anything of that size is allocated.
    """
    try:
        check_regular(path)
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            for pair in KEYS:
                if names.count(pair[0]) == names.count(pair[1]) == 1:
                    mean, covariance = (_read_array(archive, name) for name in pair)
                    return Statistics(mean, covariance)
            raise ValueError(f"it must hold {' or '.join(map(' and '.join, KEYS))}, got {', '.join(names)}")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; wanted statistics (.npz)") from error
    except Exception as error:  # zipfile's, zlib's, NumPy's: a damaged archive fails in many ways
        raise UserError(f"{path}: no statistics can be read from it: {error}") from error


def _read_array(archive: zipfile.ZipFile, name: str) -> Array:
    """Reads an array of real numbers as fp64; ValueError for anything else, or for more than `WIDEST`."""
    with archive.open(f"{name}.npy") as file:
        first = np.lib.format.read_magic(file) == (1, 0)
        read_header = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if max(shape, default=0) > WIDEST or len(shape) > 2:
            raise ValueError(f"{name} must be of at most {WIDEST:,} features, got {list(shape)}")
        if dtype.kind not in "fiuO":  # objects are refused by NumPy
            raise ValueError(f"{name} must hold real numbers, got {dtype}")
        file.seek(0)
        array: Array = np.lib.format.read_array(file, allow_pickle=False).astype(np.float64)
    return array


class Moments:
    """Count, mean [D] and sum of centred outer products [D, D] of rows in batches, fp64 on `device`.

    Merged by Chan's formula, which, unlike the sum of x xᵀ, is exact where the mean is large.
    Raises: UserError for more than `WIDEST` features.
    """

    def __init__(self, size: int, device: torch.device | None = None) -> None:
        if size > WIDEST:
            raise UserError(
                f"features must be at most {WIDEST:,} wide, got {size:,}, whose covariance takes "
                f"{8 * size**2 / 1e9:,.0f} GB: pixels are features of small images only"
            )
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(size, size, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Counts in features [B, D]; UserError if one is not finite or of another width."""
        d, got = len(self.mean), list(features.shape)
        if features.ndim != 2 or features.shape[1] != d:
            wanted = f"[B, {d}] like those before or of the reference"
            raise UserError(f"features must be {wanted}, got {got}: of another extractor?")
        if not features.isfinite().all():
            raise UserError("features must be finite; got inf or NaN: are the samples?")
        if len(features):
            rows = features.to(self.mean)
            centred = rows - (mean := rows.mean(0))
            self.merge(len(rows), mean, centred.T @ centred)

    def merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        """Counts in `count` >= 1 rows of that mean [D] and centred outer products [D, D]."""
        total = self.count + count
        change = mean - self.mean
        self.mean = self.mean + change * (count / total)
        self.scatter += scatter + torch.outer(change, change) * (self.count * count / total)
        self.count = total

    def statistics(self) -> Statistics:
        """Returns the statistics of all rows; UserError for fewer than 2, which have no covariance."""
        if self.count < 2:
            raise UserError(f"statistics need at least 2 images, got {self.count}")
        return Statistics(self.mean.cpu().numpy().copy(), (self.scatter / (self.count - 1)).cpu().numpy())


def of_rows(features: Tensor) -> Statistics:
    """Returns statistics of features [N, ...], flattened to [N, D], N >= 2; UserError unless finite."""
    return statistics([features], lambda rows: (rows.flatten(1), None))


def measure(
    extracted: Iterable[tuple[Tensor, Tensor | None]],
    processes: DistributedContext,
    width: int | None = None,
) -> tuple[Statistics | None, Tensor | None]:
    """Returns statistics of the features of all processes' images, and logits [N, K], on the first process.

    extracted: this process's features and logits, as an extractor gives them per batch of images.
    width: of the features, if known.
    Returns: (None, None) on the other processes; no logits where the extractor has none.
    Raises: UserError for fewer than 2 images in all, features of another width or not finite.
    """
    moments: Moments | None = None
    logits: list[Tensor] = []
    for features, more in extracted:
        moments = moments or Moments(width or features.shape[1], features.device)
        moments.update(features)
        if more is not None:
            logits.append(more.cpu())
    sums = (moments.count, moments.mean.cpu(), moments.scatter.cpu()) if moments else None
    parts = processes.gather((sums, logits))
    if processes.rank:
        return None, None
    total = Moments(max((len(part[1]) for part, _ in parts if part), default=0))
    for part in (part for part, _ in parts if part):
        total.merge(*part)
    all_logits = [x for _, part in parts for x in part]
    return total.statistics(), torch.cat(all_logits) if all_logits else None


def statistics(images: Iterable[Tensor], extractor: Extractor) -> Statistics:
    """Returns the statistics of features of images, in batches [B, C, H, W] uint8, in one process."""
    found, _ = measure(map(extractor, images), DistributedContext())
    assert found is not None
    return found


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Returns the squared Wasserstein-2 distance of two Gaussians.

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), computed in fp64.

    Accuracy: absolute 1e-6 for features of order 1, for singular covariances too.
    Raises: UserError if a and b are of different sizes.
    Source: Heusel et al., arXiv 1706.08500.
    """
    if a.mean.shape != b.mean.shape:
        got = f"{a.mean.size} and {b.mean.size} features (of two extractors?)"
        raise UserError(f"frechet_distance: statistics must be of one size, got {got}")
    # tr (A B)^(1/2) = sum of the singular values of A^(1/2) B^(1/2): real and at least 0, where a square root
    # of a singular A B may fail or turn complex.
    cross = np.linalg.svd(_square_root(a.covariance) @ _square_root(b.covariance), compute_uv=False).sum()
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return max(0.0, float(np.square(a.mean - b.mean).sum() + traces - 2 * cross))


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """Returns mean and standard deviation over `splits` of exp(mean of KL(p(y|x) ‖ p(y))), computed in fp64.

    The rows of `logits` [N, K] are shuffled as by torch-fidelity, whose figures are the published ones.
    Raises: UserError for fewer than `splits` rows, or a logit that is NaN.
    Source: Salimans et al., arXiv 1606.03498.
    """
    n = len(logits)
    if logits.ndim != 2 or n < splits:
        raise UserError(
            f"inception_score: logits must be [N, K] with N >= {splits}, got {list(logits.shape)}"
        )
    if logits.isnan().any():
        raise UserError("inception_score: logits must be numbers, got NaN: are the samples?")
    order = torch.from_numpy(np.random.RandomState(2020).permutation(n))
    p = logits.cpu()[order].double().softmax(1)
    parts = [p[i * n // splits : (i + 1) * n // splits] for i in range(splits)]
    # The mean of the divergences is the entropy of the mean less the mean of the entropies.
    information = [entr(part.mean(0)).sum() - entr(part).sum(1).mean() for part in parts]
    scores = torch.stack(information).exp()
    return scores.mean().item(), scores.std(correction=0).item()


def _square_root(covariance: Array) -> Array:
    """Returns the symmetric square root; rounding may push a zero eigenvalue below zero."""
    values, vectors = np.linalg.eigh(covariance)
    root: Array = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return root

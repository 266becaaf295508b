"""How close samples are to the data: Fréchet distance in pixel space, accuracy of a classifier on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.svm import SVC
from torch import Tensor

from imf.data import LabelledImages
from imf.model import IMF
from imf.sample import sample


@dataclass(frozen=True)
class Score:
    """One row of the table: samples in `steps` network calls against the data."""

    steps: int
    frechet_distance: float
    svc_accuracy: float


def evaluate(
    model: IMF,
    data: LabelledImages,
    *,
    steps: Sequence[int] = (1, 2, 4),
    omega: float = 1.0,
    t_min: float = 0.0,
    t_max: float = 1.0,
    count: int = 1800,
    seed: int = 0,
) -> list[Score]:
    """A score for each number of steps, all from the same noise.

    Fréchet distance between `count` class-balanced samples, as the network gives them (not clipped), and all
    the data, in pixel units squared; share of the samples that an SVC trained on the data gives their label.
    """
    scores = []
    for n in steps:
        samples, labels = class_balanced_samples(
            model, count, steps=n, omega=omega, t_min=t_min, t_max=t_max, seed=seed
        )
        distance = frechet_distance(data.images, samples)
        scores.append(Score(n, distance, svc_accuracy(data, samples, labels)))
    return scores


def class_balanced_samples(
    model: IMF,
    count: int = 1800,
    *,
    steps: int = 1,
    omega: float = 1.0,
    t_min: float = 0.0,
    t_max: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """`count` samples, as many of each class, on the CPU: images [count, C, H, W] fp32, labels [count] int64.

    Sample i has label i mod num_classes; the noise depends on seed and count, not on batch size or device.
    Raises: ValueError if count is not a positive multiple of the number of classes.
    """
    classes, c, size = model.config.num_classes, model.config.in_channels, model.config.input_size
    if count < 1 or count % classes:
        raise ValueError(
            f"class_balanced_samples: count must be a positive multiple of the {classes} classes, got {count}"
        )
    device = next(model.parameters()).device
    noise = torch.randn(count, c, size, size, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(count) % classes
    parts = [
        sample(model, z.to(device), y.to(device), steps=steps, omega=omega, t_min=t_min, t_max=t_max).cpu()
        for z, y in zip(noise.split(batch_size), labels.split(batch_size), strict=True)
    ]
    return torch.cat(parts), labels


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Wasserstein-2 distance of the Gaussians with the means and covariances of the rows of a and b.

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), computed in fp64.

    a, b: [N, ...] and [M, ...], flattened to the same number of features; N, M >= 2.
    Accuracy: absolute 1e-6 for features of order 1.
    Raises: ValueError if shapes do not fit or a value is not finite.
    Source: Heusel et al., arXiv 1706.08500, without the Inception features.
    """
    x, y = (t.detach().cpu().flatten(1).double().numpy() for t in (a, b))
    if x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            "frechet_distance: a and b must be [N, D] and [M, D] with N, M >= 2, "
            f"got {list(x.shape)} and {list(y.shape)}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("frechet_distance: a and b must be finite")
    mean_x, mean_y = x.mean(0), y.mean(0)
    cov_x, cov_y = np.atleast_2d(np.cov(x, rowvar=False)), np.atleast_2d(np.cov(y, rowvar=False))
    # tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2) = sum of the singular values of A^(1/2) B^(1/2): real and
    # at least 0 for singular matrices too, where a matrix square root of A B may fail or turn complex.
    cross = np.linalg.svd(_square_root(cov_x) @ _square_root(cov_y), compute_uv=False).sum()
    distance = np.square(mean_x - mean_y).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * cross
    return max(0.0, float(distance))


def svc_accuracy(data: LabelledImages, samples: Tensor, labels: Tensor) -> float:
    """Share of `samples` [N, C, H, W] that a support vector classifier of `data` gives their label."""
    # An RBF kernel of width 0.001 on pixels 0 ... 16 separates the digits; here pixels are 8 times smaller.
    classifier = SVC(kernel="rbf", gamma=0.064, C=10.0)
    classifier.fit(data.images.cpu().flatten(1).numpy(), data.labels.cpu().numpy())
    return float(classifier.score(samples.cpu().flatten(1).numpy(), labels.cpu().numpy()))


def table(scores: Sequence[Score]) -> str:
    """The scores as aligned text."""
    lines = [f"{'steps':>5}  {'Fréchet distance':>16}  {'SVC accuracy':>12}"]
    lines += [f"{s.steps:>5}  {s.frechet_distance:>16.3f}  {s.svc_accuracy:>12.3f}" for s in scores]
    return "\n".join(lines)


def _square_root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Symmetric square root; rounding may push a zero eigenvalue below zero."""
    values, vectors = np.linalg.eigh(covariance)
    root: NDArray[np.float64] = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return root

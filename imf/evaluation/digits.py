"""Scores of samples of the digits, too small for FID: Fréchet distance of pixels, a classifier's accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imf.data import LabelledImages
from imf.evaluation.fid import frechet_distance, of_rows
from imf.model.imf import IMF
from imf.sampling import generate


@dataclass(frozen=True)
class Score:
    """One row of the digits' table: samples in `steps` network calls against the data."""

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
        distance = frechet_distance(of_rows(data.images), of_rows(samples))
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
        generate(model, z.to(device), y.to(device), steps=steps, omega=omega, t_min=t_min, t_max=t_max).cpu()
        for z, y in zip(noise.split(batch_size), labels.split(batch_size), strict=True)
    ]
    return torch.cat(parts), labels


def svc_accuracy(data: LabelledImages, samples: Tensor, labels: Tensor) -> float:
    """Share of `samples` [N, C, H, W] that a support vector classifier of `data` gives their label."""
    from sklearn.svm import SVC  # importing it takes a second

    # An RBF kernel of width 0.001 on pixels 0 ... 16 separates the digits; here pixels are 8 times smaller.
    classifier = SVC(kernel="rbf", gamma=0.064, C=10.0)
    classifier.fit(data.images.cpu().flatten(1).numpy(), data.labels.cpu().numpy())
    return float(classifier.score(samples.cpu().flatten(1).numpy(), labels.cpu().numpy()))


def table(scores: Sequence[Score]) -> str:
    """The scores as aligned text."""
    lines = [f"{'steps':>5}  {'Fréchet distance':>16}  {'SVC accuracy':>12}"]
    lines += [f"{s.steps:>5}  {s.frechet_distance:>16.3f}  {s.svc_accuracy:>12.3f}" for s in scores]
    return "\n".join(lines)

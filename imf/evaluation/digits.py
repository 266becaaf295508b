"""Scores of samples of the digits, too small for FID: Fréchet distance of pixels, a classifier's accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from imf.evaluation.fid import frechet_distance, of_rows
from imf.model.config import config_of
from imf.model.sampler import sample_labels
from imf.program import UserError


@dataclass(frozen=True)
class Score:
    """One row of the digits' table: samples in `steps` network calls compared with the data."""

    steps: int
    frechet_distance: float
    svc_accuracy: float


def evaluate(
    model: nn.Module, data: Any, *, steps: Sequence[int] = (1, 2, 4), count: int = 1800, **options: Any
) -> list[Score]:
    """Scores `count` samples for each number of steps, all from the same noise.

    Fréchet distance between class-balanced samples, as the network gives them (not clipped), and all the
    data, in pixel units squared; share of the samples that an SVC trained on the data gives their label.
    data: has images [N, C, H, W] fp32 and labels [N] int64.  options: of `class_balanced_samples`.
    """
    reference, scores = of_rows(data.images), []
    for n in steps:
        samples, labels = class_balanced_samples(model, count, steps=n, **options)
        distance = frechet_distance(reference, of_rows(samples))
        scores.append(Score(n, distance, svc_accuracy(data, samples, labels)))
    return scores


def class_balanced_samples(
    model: nn.Module, count: int = 1800, *, batch_size: int = 256, **options: Any
) -> tuple[Tensor, Tensor]:
    """Samples as many images of each class, on the CPU: images [count, C, H, W] fp32, labels [count] int64.

    Sample i has label i mod num_classes.  options: seed, and those of `imf.generate`.
    Raises: UserError if count is not a positive multiple of the number of classes.
    """
    classes = config_of(model).num_classes
    if count < 1 or count % classes:
        raise UserError(
            f"class_balanced_samples: count must be a positive multiple of the {classes} classes, got {count}"
        )
    labels = torch.arange(count) % classes
    return sample_labels(model, labels, batch_size=batch_size, **options).cpu(), labels


def svc_accuracy(data: Any, samples: Tensor, labels: Tensor) -> float:
    """Returns the share of samples [N, C, H, W] that an SVC trained on the data gives their label."""
    from sklearn.svm import SVC  # importing it takes a second

    # An RBF kernel of width 0.001 on pixels 0 ... 16 separates the digits; here pixels are 8 times smaller.
    classifier = SVC(kernel="rbf", gamma=0.064, C=10.0)
    classifier.fit(data.images.cpu().flatten(1).numpy(), data.labels.cpu().numpy())
    return float(classifier.score(samples.cpu().flatten(1).numpy(), labels.cpu().numpy()))


def table(scores: Sequence[Score]) -> str:
    """Formats the scores as aligned text."""
    lines = [f"{'steps':>5}  {'Fréchet distance':>16}  {'SVC accuracy':>12}"]
    lines += [f"{s.steps:>5}  {s.frechet_distance:>16.3f}  {s.svc_accuracy:>12.3f}" for s in scores]
    return "\n".join(lines)

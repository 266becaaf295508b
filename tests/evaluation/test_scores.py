"""Scores of the digits: balanced samples, the classifier, the table."""

import numpy as np
import pytest
import torch
from torch import nn

from imf import data
from imf.evaluation import digits as scores
from imf.evaluation.fid import frechet_distance, of_rows
from imf.training.config import DIGITS_NETWORK


class Oracle(nn.Module):
    """Velocity from noise towards a given image of the class: one step of any size lands on it exactly."""

    config = DIGITS_NETWORK

    def __init__(self, images):
        super().__init__()
        self.images = nn.Parameter(images, requires_grad=False)

    def forward(self, z, t, h, omega, t_min, t_max, y, heads="u"):
        assert heads == "u"
        return (z - self.images[y]) / h[:, None, None, None]  # right in one step, from t = 1 to 0


def test_samples_are_balanced_and_do_not_depend_on_the_batch_size():
    model = Oracle(data.load("digits").images[:10])
    samples, labels = scores.class_balanced_samples(model, 50, seed=4, batch_size=50)
    assert samples.shape == (50, 1, 8, 8) and labels.bincount().tolist() == [5] * 10
    torch.testing.assert_close(samples, model.images[labels], atol=1e-5, rtol=0)
    again, _ = scores.class_balanced_samples(model, 50, seed=4, batch_size=7)
    torch.testing.assert_close(again, samples, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="multiple of the 10 classes, got 55"):
        scores.class_balanced_samples(model, 55)


def test_svc_accuracy_counts_right_labels():
    digits = data.load("digits")
    assert scores.svc_accuracy(digits, digits.images, digits.labels) > 0.99
    swapped = digits.labels.clone()
    swapped[: len(swapped) // 2] = (swapped[: len(swapped) // 2] + 1) % 10
    assert scores.svc_accuracy(digits, digits.images, swapped) == pytest.approx(0.5, abs=0.01)


def test_the_table_holds_what_was_measured():
    digits = data.load("digits")
    model = Oracle(digits.images[:10])
    rows = scores.evaluate(model, digits, steps=(1,), count=100, seed=0)
    samples, _ = scores.class_balanced_samples(model, 100, seed=0)
    assert rows[0].steps == 1 and rows[0].svc_accuracy == 1.0
    assert rows[0].frechet_distance == pytest.approx(
        frechet_distance(of_rows(digits.images), of_rows(samples))
    )
    row = scores.table(rows).splitlines()[1].split()
    assert row == ["1", f"{rows[0].frechet_distance:.3f}", "1.000"]
    assert np.isfinite(rows[0].frechet_distance)

"""Evaluation: the Fréchet distance against closed forms, balanced samples, the classifier, the table."""

import numpy as np
import pytest
import torch
from torch import nn

from imf import data, evaluate
from imf.config import DIGITS_NETWORK


class Oracle(nn.Module):
    """Velocity from noise towards a given image of the class: one step of any size lands on it exactly."""

    config = DIGITS_NETWORK

    def __init__(self, images):
        super().__init__()
        self.images = nn.Parameter(images, requires_grad=False)

    def forward(self, z, h, omega, t_min, t_max, y, heads="uv"):
        assert heads == "u"
        return (z - self.images[y]) / h[:, None, None, None]  # right in one step, from t = 1 to 0


def with_moments(count, mean, factor, generator):
    """Rows whose sample mean and covariance are exactly `mean` and factor @ factor.T."""
    x = torch.randn(count, len(factor.T), generator=generator, dtype=torch.float64)
    x -= x.mean(0)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov(), upper=True), x, upper=True, left=False)
    return x @ factor.T + mean


def test_frechet_distance_of_gaussians_whose_covariances_commute():
    # |m1 - m2|^2 + sum (s1 - s2)^2 for equal eigenvectors with standard deviations s1 and s2.
    g = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64)).Q
    s1 = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1, 0.0], dtype=torch.float64)
    s2 = torch.tensor([1.0, 2.5, 0.0, 0.5, 0.7, 0.0], dtype=torch.float64)
    m1, m2 = torch.randn(2, 6, generator=g, dtype=torch.float64)
    a = with_moments(40, m1, rotation * s1, g)
    b = with_moments(50, m2, rotation * s2, g)
    exact = ((m1 - m2).square().sum() + (s1 - s2).square().sum()).item()
    assert evaluate.frechet_distance(a, b) == pytest.approx(exact, abs=1e-6)
    assert evaluate.frechet_distance(b, a) == pytest.approx(exact, abs=1e-6)


def test_frechet_distance_of_two_dimensional_gaussians_that_do_not_commute():
    # For 2 x 2 matrices tr M^(1/2) = sqrt(tr M + 2 sqrt(det M)), here with M = A B.
    g = torch.Generator().manual_seed(1)
    f1, f2 = torch.randn(2, 2, 2, generator=g, dtype=torch.float64)
    m = torch.zeros(2, dtype=torch.float64)
    c1, c2 = f1 @ f1.T, f2 @ f2.T
    cross = (torch.trace(c1 @ c2) + 2 * torch.linalg.det(c1 @ c2).sqrt()).sqrt()
    exact = (torch.trace(c1) + torch.trace(c2) - 2 * cross).item()
    got = evaluate.frechet_distance(with_moments(30, m, f1, g), with_moments(30, m, f2, g))
    assert got == pytest.approx(exact, rel=1e-6)


def test_frechet_distance_to_itself_is_zero_though_pixels_are_constant():
    images = data.load("digits").images
    assert (
        images.flatten(1).std(0) == 0
    ).any()  # singular covariance: the case that a plain square root fails
    assert evaluate.frechet_distance(images, images) < 1e-6
    moved = images + 0.5
    assert evaluate.frechet_distance(images, moved) == pytest.approx(64 * 0.25, abs=1e-6)


def test_halves_of_the_digits():
    images = data.load("digits").images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    assert evaluate.frechet_distance(images[order[:898]], images[order[898:]]) == pytest.approx(0.3, abs=0.05)
    assert evaluate.frechet_distance(images[:898], images[898:]) == pytest.approx(1.2, abs=0.05)


def test_frechet_distance_refuses():
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"got \[4, 3\] and \[4, 2\]"):
        evaluate.frechet_distance(x, torch.zeros(4, 2))
    with pytest.raises(ValueError, match="N, M >= 2"):
        evaluate.frechet_distance(x, x[:1])
    with pytest.raises(ValueError, match="finite"):
        evaluate.frechet_distance(x, torch.full((4, 3), float("nan")))


def test_samples_are_balanced_and_do_not_depend_on_the_batch_size():
    model = Oracle(data.load("digits").images[:10])
    samples, labels = evaluate.class_balanced_samples(model, 50, seed=4, batch_size=50)
    assert samples.shape == (50, 1, 8, 8) and labels.bincount().tolist() == [5] * 10
    torch.testing.assert_close(samples, model.images[labels], atol=1e-5, rtol=0)
    again, _ = evaluate.class_balanced_samples(model, 50, seed=4, batch_size=7)
    torch.testing.assert_close(again, samples, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="multiple of the 10 classes, got 55"):
        evaluate.class_balanced_samples(model, 55)


def test_svc_accuracy_counts_right_labels():
    digits = data.load("digits")
    assert evaluate.svc_accuracy(digits, digits.images, digits.labels) > 0.99
    swapped = digits.labels.clone()
    swapped[: len(swapped) // 2] = (swapped[: len(swapped) // 2] + 1) % 10
    assert evaluate.svc_accuracy(digits, digits.images, swapped) == pytest.approx(0.5, abs=0.01)


def test_the_table_holds_what_was_measured():
    digits = data.load("digits")
    model = Oracle(digits.images[:10])
    scores = evaluate.evaluate(model, digits, steps=(1,), count=100, seed=0)
    samples, _ = evaluate.class_balanced_samples(model, 100, seed=0)
    assert scores[0].steps == 1 and scores[0].svc_accuracy == 1.0
    assert scores[0].frechet_distance == pytest.approx(evaluate.frechet_distance(digits.images, samples))
    row = evaluate.table(scores).splitlines()[1].split()
    assert row == ["1", f"{scores[0].frechet_distance:.3f}", "1.000"]
    assert np.isfinite(scores[0].frechet_distance)

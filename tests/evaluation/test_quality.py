"""Figures of samples compared with data: plain loops, known answers, and what each is there to show."""

import math

import pytest
import torch

from imf import data
from imf.evaluation import quality
from imf.evaluation.fid import frechet_distance, of_rows
from imf.program import UserError


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain_precision(samples, data_rows, k):
    """Kynkäänniemi's definition, a pair at a time."""

    def radius(rows, i):
        return sorted(math.dist(rows[i], rows[j]) for j in range(len(rows)) if j != i)[k - 1]

    a, b = samples.double().tolist(), data_rows.double().tolist()
    radii = [radius(b, j) for j in range(len(b))]
    return sum(any(math.dist(x, y) <= r for y, r in zip(b, radii, strict=True)) for x in a) / len(a)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_the_definition(k, monkeypatch):
    a, b = drawn(60, 3), drawn(60, 3, seed=1) * 0.7 + 0.4
    wanted = plain_precision(a, b, k), plain_precision(b, a, k)
    assert 0.1 < wanted[0] < wanted[1] <= 1  # the broader side covers the narrower one
    assert quality.precision_recall(a, b, neighbours=k) == pytest.approx(wanted)
    monkeypatch.setattr(quality, "_BLOCK", 60 * 7)  # in blocks of 7 rows, and of one
    assert quality.precision_recall(a, b, neighbours=k) == pytest.approx(wanted)
    monkeypatch.setattr(quality, "_BLOCK", 1)
    assert quality.precision_recall(a + 1000, b + 1000, neighbours=k) == pytest.approx(wanted)


def test_precision_and_recall_where_they_are_known():
    grid = torch.arange(40.0)[:, None]
    assert quality.precision_recall(grid, grid) == (1, 1)
    assert quality.precision_recall(grid + 1000, grid) == (0, 0)
    pairs = grid[:20].repeat(2, 1)  # balls of radius 1, up to 20
    assert quality.precision_recall(pairs, grid) == (1, 21 / 40)
    repeated = grid[:5].repeat_interleave(8, 0)  # radius 0
    assert quality.precision_recall(repeated * 1e3 + 0.1, repeated * 1e3 + 0.1) == (1, 1)


def test_as_many_of_each_side_are_compared(monkeypatch):
    a, b = drawn(90, 2), drawn(30, 2, seed=1)
    assert quality.precision_recall(a, b) == quality.precision_recall(a[::3], b)
    monkeypatch.setattr(quality, "MOST", 15)
    assert quality.precision_recall(a, b) == quality.precision_recall(a[::6], b[::2])
    assert quality.spaced(torch.arange(7), 3).tolist() == [0, 2, 4]


def test_variance_within_classes_in_any_batches():
    x, y = drawn(50, 2, 3, 3) + 5, torch.arange(50) % 4
    whole, parts = quality.WithinClasses(), [quality.WithinClasses() for _ in range(2)]
    whole.add(x, y)
    for i in range(0, 50, 7):
        parts[i % 2].add(x[i : i + 7], y[i : i + 7])
    parts[0].merge(parts[1])
    wanted = {k: x[y == k].double().flatten(1).var(0).sum().item() for k in range(4)}
    assert whole.variances() == pytest.approx(wanted) and parts[0].variances() == pytest.approx(wanted)

    shrunk = quality.WithinClasses()
    shrunk.add(x * 0.5, y)
    shrunk.add(x[:1], torch.tensor([9]))  # a class that the data lack
    assert quality.variance_ratio(shrunk, whole) == pytest.approx(0.25)
    single = quality.WithinClasses()
    single.add(x[:4], y[:4])
    assert quality.variance_ratio(single, whole) is None
    equal = quality.WithinClasses()
    equal.add(torch.ones(4, 1, 1, 1), torch.zeros(4, dtype=torch.int64))
    assert quality.variance_ratio(whole, equal) is None


def test_averages_of_classes_are_told_from_digits():
    """What accuracy and precision do not see: samples that are all near the average of their class."""
    digits = data.load("digits")
    means = torch.stack([digits.images[digits.labels == k].mean(0) for k in range(10)])
    centres = means[digits.labels]

    def nearest(x):
        return torch.cdist(x.flatten(1), means.flatten(1)).argmin(1)

    def measured(x, labels=digits.labels):
        return quality.figures(x, labels, digits.images, digits.labels, classifier=nearest)

    narrow = measured(centres + 0.2 * (digits.images - centres))
    real = measured(digits.images)
    assert narrow["accuracy"] == 1 > real["accuracy"] and narrow["precision"] > 0.98
    assert narrow["variance_ratio"] == pytest.approx(0.04, rel=1e-4) and narrow["recall"] < 0.1
    assert real["variance_ratio"] == real["precision"] == real["recall"] == 1
    assert narrow["frechet_distance"] > 1 > real["frechet_distance"]
    noisy = measured(digits.images + 0.3 * drawn(*digits.images.shape))
    assert noisy["variance_ratio"] > 1.05 and noisy["precision"] < 0.6
    halved = digits.labels[: len(digits.labels) // 2]
    assert measured(digits.images[: len(halved)], (halved + 1) % 10)["accuracy"] < 0.05


def test_figures_of_given_features():
    x, y = drawn(40, 1, 4, 4), torch.arange(40) % 2
    other = drawn(30, 1, 4, 4, seed=1)

    def rows(images):
        return images.mean(2).flatten(1)

    got = quality.figures(x, y, other, y[:30], features=rows, batch_size=7)
    assert got["frechet_distance"] == pytest.approx(frechet_distance(of_rows(rows(x)), of_rows(rows(other))))
    assert (got["precision"], got["recall"]) == quality.precision_recall(rows(x), rows(other))
    assert "accuracy" not in got
    few = quality.figures(x[:3], y[:3], other, y[:30])
    assert few["precision"] is None and few["recall"] is None and few["frechet_distance"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((drawn(8, 1, 4, 4), torch.arange(7)), r"samples must be \[N, C, H, W\] with integer labels \[N\]"),
        ((drawn(8, 16), torch.arange(8)), r"got \[8, 16\] and \[8\] torch.int64"),
        ((drawn(8, 1, 4, 4), torch.ones(8)), "got .* torch.float32"),
        ((drawn(8, 1, 2, 2), torch.arange(8)), r"samples must be \[N, \[1, 4, 4\]\] like the data"),
        ((drawn(8, 1, 4, 4) / 0, torch.arange(8)), "must be finite, got inf or NaN"),
    ],
)
def test_what_does_not_fit_is_said(arguments, message):
    with pytest.raises(UserError, match=message):
        quality.figures(*arguments, drawn(9, 1, 4, 4), torch.arange(9) % 2)


def test_features_that_do_not_fit_are_refused():
    for a, b, message in (
        (drawn(5, 2), drawn(5, 3), r"must be \[N, D\] and \[M, D\], got \[5, 2\] and \[5, 3\]"),
        (drawn(3, 2), drawn(5, 2), "more than 3 rows, got 3"),
        (drawn(5, 2) * math.inf, drawn(5, 2), "must be finite"),
    ):
        with pytest.raises(UserError, match=message):
            quality.precision_recall(a, b)

"""Scores of a network's samples: its judge, labels, samples by many processes, the table."""

import dataclasses

import pytest
import torch
from torch import nn

from imf import data
from imf.distributed import DistributedContext
from imf.evaluation import convnet, quality, scores
from imf.evaluation import samples as numbered
from imf.training.config import DIGITS_NETWORK


class Oracle(nn.Module):
    """Velocity from noise towards a given image of the class: one step of any size lands on it exactly."""

    config = DIGITS_NETWORK

    def __init__(self, images):
        super().__init__()
        self.images = nn.Parameter(images, requires_grad=False)
        self.calls = []

    def forward(self, z, t, h, omega, t_min, t_max, y, heads="u"):
        assert heads == "u"
        self.calls.append(len(z))
        return (z - self.images[y]) / h[:, None, None, None]  # right in one step, from t = 1 to 0


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def judge(digits):
    return scores.judge_of(digits, digits=True)


def test_labels_have_the_proportions_of_the_data(judge, digits):
    counts = judge.labels_like(1797).bincount()
    assert torch.equal(counts, digits.labels.bincount())
    assert torch.equal(judge.labels_like(1797), digits.labels.sort().values)
    assert (judge.labels_like(100).bincount() - 10).abs().max() <= 1
    skewed = dataclasses.replace(judge, labels=torch.tensor([2, 0, 0, 0]))
    assert skewed.labels_like(8).tolist() == [0, 0, 0, 0, 0, 0, 2, 2]
    assert skewed.labels_like(4).tolist() == [0, 0, 0, 2]
    assert skewed.labels_like(1).tolist() == [0]


def test_samples_are_those_of_evaluate_in_any_batches(digits):
    model, labels = Oracle(digits.images[:10]), torch.arange(50) % 10
    whole = scores.sample(model, labels, seed=4, batch_size=50)
    torch.testing.assert_close(whole, model.images[labels], atol=1e-5, rtol=0)
    parts = scores.sample(model, labels, seed=4, batch_size=7)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)

    class Passing(Oracle):
        def forward(self, z, *_, **__):
            return torch.zeros_like(z)

    got = scores.sample(Passing(digits.images[:10]), labels, seed=4)
    assert torch.equal(got, numbered.noise(4, range(50), (1, 8, 8)))


@pytest.mark.parametrize(("count", "processes"), [(10, 3), (2, 4), (9, 3)])
def test_processes_share_the_samples(count, processes, digits, monkeypatch):
    """Each calls the network as often as the others; what a process has too much is cut off."""
    labels, found, calls = torch.arange(count), [], []
    for rank in range(processes):
        context = DistributedContext(rank, processes)
        model = Oracle(digits.images[:10])
        with monkeypatch.context() as patch:
            patch.setattr(DistributedContext, "gather", lambda self, value: found.append(value) or [])
            scores.sample(model, labels, seed=1, batch_size=2, processes=context)
        calls.append(model.calls)
    assert calls == [calls[0]] * processes
    model = Oracle(digits.images[:10])
    wanted = scores.sample(model, labels, seed=1)
    torch.testing.assert_close(torch.cat(found)[:count], wanted)


def test_the_svc_counts_right_labels_and_says_how_good_it_is(judge, digits):
    assert judge.classified_by == "an SVC" and 0.95 < judge.held_out < 1
    score = judge.score(digits.images, digits.labels, 1)
    assert score.accuracy > 0.99
    swapped = digits.labels.clone()
    swapped[: len(swapped) // 2] = (swapped[: len(swapped) // 2] + 1) % 10
    assert judge.score(digits.images, swapped, 1).accuracy == pytest.approx(0.5, abs=0.01)


def test_the_table_holds_what_was_measured(judge, digits):
    model = Oracle(digits.images[:10])
    labels = judge.labels_like(100)
    samples = scores.sample(model, labels)
    score = judge.score(samples, labels, 2)
    wanted = quality.figures(samples, labels, digits.images, digits.labels)
    assert score.accuracy == 1 and score.variance_ratio < 1e-6 and score.recall < 0.1
    assert score.figures == pytest.approx({**wanted, "accuracy": 1.0})
    titles, row = (text.split() for text in scores.table([score]).splitlines())
    figures = [score.frechet_distance, score.variance_ratio, score.precision, score.recall, score.accuracy]
    assert row == ["2", *(f"{x:.3f}" for x in figures)]
    assert titles == ["steps", "Fréchet", "distance", "variance", "precision", "recall", "accuracy"]
    few = judge.score(samples[:2], labels[:2], 1)
    assert few.precision is None and scores.table([few]).split().count("—") == 2
    assert "precision" not in few.figures and "precision" not in scores.line(few)


def test_other_data_are_judged_by_a_network_of_their_own(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(convnet, "BATCH", 32)
    monkeypatch.setattr(convnet, "STEPS", 120)
    path = tmp_path / convnet.FILE
    judge = scores.judge_of(digits, path=path)
    assert judge.held_out > 0.9 and path.exists() and "small network" in judge.of
    real = judge.score(digits.images, digits.labels, 1)
    assert real.accuracy > 0.9 and real.precision == real.recall == real.variance_ratio == 1
    before = path.read_bytes()
    again = scores.judge_of(digits, path=path)  # read, not trained again
    assert path.read_bytes() == before and torch.equal(again.data.rows, judge.data.rows)
    blurred = judge.score(nn.functional.avg_pool2d(digits.images, 3, 1, 1), digits.labels, 1)
    assert blurred.frechet_distance > 1 > real.frechet_distance and blurred.precision < 0.9
    pixels = scores.judge_of(digits, "pixels", path=path)  # the network still classifies
    assert torch.equal(pixels.data.rows, digits.images.flatten(1))
    assert pixels.held_out == judge.held_out


def test_data_without_labels_have_no_accuracy(digits, monkeypatch):
    monkeypatch.setattr(convnet, "LEAST", 2)
    monkeypatch.setattr(convnet, "STEPS", 2)
    images = data.LabelledImages(digits.images[:300], torch.zeros(300, dtype=torch.int64), ["all"])
    judge = scores.judge_of(images)
    assert judge.classifier is None and judge.held_out is None and "rotations" in judge.of
    score = judge.score(images.images, images.labels, 1)
    assert score.accuracy is None and score.precision == 1 and score.variance_ratio == 1

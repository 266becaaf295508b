"""Batches: a function of (seed, micro step, process, processes) alone, fetched ahead by a thread or not."""

import itertools
import threading

import pytest
import torch

from imf import data


class Noisy:
    """Rows that hold their number and what their seed gives: a data set with a posterior."""

    shape, num_classes = (1, 1, 2), 7

    def __len__(self):
        return 23

    def fetch(self, rows, generator):
        seeds = data.row_seeds(generator, len(rows))
        x = torch.stack([rows.double(), (seeds % 2**20).double()], dim=-1)
        return x.float()[:, None, None], rows % 7


class Broken(Noisy):
    def fetch(self, rows, generator):
        raise OSError("the disk is gone")


def take(count, dataset=None, **options):
    with data.Batches(dataset or Noisy(), **{"batch_size": 8, "seed": 3, **options}) as batches:
        return list(itertools.islice(batches, count))


def same(a, b):
    return all(torch.equal(x, v) and torch.equal(y, w) for (x, y), (v, w) in zip(a, b, strict=True))


def test_rows_are_those_of_the_order():
    for step, (x, y) in enumerate(take(5)):
        rows = data.batch_indices(23, 8, seed=3, step=step)
        assert torch.equal(x[:, 0, 0, 0], rows.float()) and torch.equal(y, rows % 7)


def test_noise_differs_between_rows_steps_and_seeds():
    noise = torch.cat([x[:, 0, 0, 1] for x, _ in take(6) + take(6, seed=4)])
    assert len(noise.unique()) == len(noise)


def test_begins_at_any_step_as_if_it_had_run_through():
    assert same(take(6)[4:], take(2, first=4)) and same(take(3), take(3))


def test_a_thread_changes_nothing():
    assert same(take(7, ahead=3), take(7, ahead=0)) and same(take(2, first=4, ahead=1), take(2, first=4))


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_together_see_what_one_sees(processes):
    parts = [take(4, process=p, processes=processes) for p in range(processes)]
    together = [tuple(map(torch.cat, zip(*step, strict=True))) for step in zip(*parts, strict=True)]
    assert same(together, take(4))


@pytest.mark.parametrize("ahead", [0, 3])
def test_what_fetching_raises_is_raised_by_next(ahead):
    with pytest.raises(OSError, match="the disk is gone"):
        take(1, Broken(), ahead=ahead)


def test_the_thread_ends_with_the_context():
    with data.Batches(Noisy(), batch_size=8, seed=0, ahead=3) as batches:
        next(batches)
        assert any(thread.name.startswith("imf-data") for thread in threading.enumerate())
    assert not any(thread.name.startswith("imf-data") for thread in threading.enumerate())


def test_digits():
    (x, y), *_ = take(1, data.load("digits"), batch_size=4, device="cpu")
    rows = data.batch_indices(1797, 4, seed=3, step=0)
    digits = data.load("digits")
    assert torch.equal(x, digits.images[rows]) and torch.equal(y, digits.labels[rows])
    assert digits.shape == (1, 8, 8) and len(digits) == 1797


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"processes": 0}, "process must be in .0, processes., got process 0 of 0"),
        ({"process": 2, "processes": 2}, "got process 2 of 2"),
        ({"processes": 3}, "batch_size must be a positive multiple of the 3 processes, got 8"),
        ({"batch_size": 0}, "batch_size .* got 0"),
        ({"first": -1}, "first, seed and ahead must be at least 0, got -1, 3 and None"),
        ({"seed": -1}, "got 0, -1 and None"),
        ({"ahead": -1}, "got 0, 3 and -1"),
    ],
)
def test_out_of_range_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        take(1, **wrong)


class Wide(Noisy):
    """Rows that tell left from right."""

    def fetch(self, rows, generator):
        x, y = super().fetch(rows, generator)
        x[:, 0, 0, 1] = -x[:, 0, 0, 0] - 1
        return x, y


def test_flips_are_a_function_of_seed_step_and_place():
    plain, flipped, again = take(30, Wide()), take(30, Wide(), flip=True), take(30, Wide(), flip=True)
    assert same(flipped, again) and not same(flipped, plain) and not same(flipped, take(30, Wide(), seed=4))
    turned = []
    for (x, y), (z, w) in zip(plain, flipped, strict=True):
        assert torch.equal(y, w)
        turned += [torch.equal(b, a.flip(2)) for a, b in zip(x, z, strict=True)]
        assert all(torch.equal(b, a.flip(2)) or torch.equal(b, a) for a, b in zip(x, z, strict=True))
    assert 80 < sum(turned) < 160  # of 240: seven deviations of a fair coin
    parts = [take(30, Wide(), flip=True, process=p, processes=4) for p in range(4)]
    whole = [
        (torch.cat([x for x, _ in step]), torch.cat([y for _, y in step]))
        for step in zip(*parts, strict=True)
    ]
    assert same(whole, flipped)
    assert same(take(5, Wide(), flip=True, first=25), flipped[25:])  # a run that resumes

"""Data: the digits as they are, and an order that depends on (seed, step) alone."""

import pytest
import torch

from imf import data
from imf.program import UserError


def test_digits():
    digits = data.load("digits")
    assert digits.images.shape == (1797, 1, 8, 8) and digits.images.dtype == torch.float32
    assert digits.labels.shape == (1797,) and digits.labels.dtype == torch.int64
    assert digits.images.min() == -1 and digits.images.max() == 1
    assert digits.labels.unique().tolist() == list(range(10)) and digits.num_classes == 10
    assert digits.labels[:10].tolist() == list(range(10))  # file order: the set begins 0, 1, ... 9
    assert (digits.images[0, 0, 0] * 8 + 8).tolist() == [0, 0, 5, 13, 9, 1, 0, 0]  # its first row of pixels


def test_unknown_data_set_is_named():
    with pytest.raises(UserError, match=r"^cats: no such folder; a data set is 'digits' or"):
        data.load("cats")


# Batches that fit an epoch, that do not, that equal it, and that hold several epochs.
@pytest.mark.parametrize(("size", "batch_size"), [(12, 4), (10, 4), (7, 7), (5, 13), (1, 3)])
def test_every_epoch_sees_every_example_once(size, batch_size):
    steps = 3 * size  # so that the walk ends with an epoch
    walk = torch.cat([data.batch_indices(size, batch_size, seed=3, step=step) for step in range(steps)])
    assert len(walk) == steps * batch_size and walk.dtype == torch.int64
    for epoch in walk.split(size):
        assert epoch.sort().values.tolist() == list(range(size))


def test_order_depends_on_seed_and_epoch_and_nothing_else():
    def epoch(seed, number):
        return torch.cat(
            [data.batch_indices(50, 10, seed=seed, step=5 * number + i) for i in range(5)]
        ).tolist()

    first = epoch(0, 0)
    assert first != epoch(0, 1) and first != epoch(1, 0) and epoch(0, 1) != epoch(1, 0)
    data.batch_indices(1797, 128, seed=9, step=1000)  # neither another call nor the global generator matters
    torch.manual_seed(5)
    assert epoch(0, 0) == first


def test_micro_batches_are_parts_of_the_batch():
    whole = data.batch_indices(1797, 128, seed=0, step=14)
    parts = [data.batch_indices(1797, 32, seed=0, step=14 * 4 + i) for i in range(4)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("wrong", [{"size": 0}, {"batch_size": 0}, {"seed": -1}, {"step": -1}])
def test_out_of_range_is_named(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"{name} must be at least [01], got {value}"):
        data.batch_indices(**{"size": 4, "batch_size": 2, "seed": 0, "step": 0, **wrong})

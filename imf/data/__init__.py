"""Data sets, and the order in which training walks through one."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class LabelledImages:
    """A data set that fits into memory.

    images: [N, C, H, W] fp32, pixels in [-1, 1].
    labels: [N] int64 in 0 ... num_classes - 1.
    """

    images: Tensor
    labels: Tensor
    num_classes: int

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> LabelledImages:
        """The same data with images and labels on `device`."""
        return LabelledImages(self.images.to(device), self.labels.to(device), self.num_classes)


def load(name: str) -> LabelledImages:
    """The data set called `name`; ValueError if there is none of that name."""
    if name == "digits":
        from imf.data import digits

        return digits.load()
    raise ValueError(f"load: name must be 'digits', got {name!r}")


def batch_indices(size: int, batch_size: int, *, seed: int, step: int) -> Tensor:
    """Rows of the batch of step `step`: a function of the arguments alone, so a resumed run needs no state.

    Every epoch walks through the `size` examples once, in an order of its own; a batch runs across the end of
    an epoch, so none is short and no example is left out.

    Returns: [batch_size] int64 on the CPU, values in 0 ... size - 1.
    Raises: ValueError unless size >= 1, batch_size >= 1, seed >= 0 and step >= 0.
    """
    for name, value, least in (
        ("size", size, 1),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
        ("step", step, 0),
    ):
        if value < least:
            raise ValueError(f"batch_indices: {name} must be at least {least}, got {value}")
    first, last = step * batch_size, (step + 1) * batch_size  # positions in the endless walk
    epochs = range(first // size, (last - 1) // size + 1)
    walk = np.concatenate([_epoch_order(size, seed, epoch) for epoch in epochs])
    start = first - epochs[0] * size
    return torch.from_numpy(walk[start : start + batch_size].copy())


@functools.lru_cache(maxsize=2)  # a batch that runs across an epoch's end needs two
def _epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    # The third word keeps this stream apart from any other that is keyed by (seed, number).
    return np.random.default_rng((seed, epoch, 0x0DA7A)).permutation(size).astype(np.int64)

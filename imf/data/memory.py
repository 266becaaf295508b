"""Data sets in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

UNCONDITIONAL = "all"  # name of the one class of images without labels


@dataclass(frozen=True)
class LabelledImages:
    """A data set in memory, see `imf.data.DataSet`.

    images: [N, C, H, W], uint8 or fp32 in [-1, 1].
    labels: [N] int64 in 0 ... num_classes - 1.
    class_names: a name per label.
    """

    images: Tensor
    labels: Tensor
    class_names: Sequence[str]

    autoencoder = ""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        _, c, height, width = self.images.shape
        return c, height, width

    def fetch(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns images in [-1, 1] and labels of `rows`; nothing is drawn from the generator."""
        x = self.images[rows]
        return (x if x.is_floating_point() else x.float().sub_(127.5).div_(127.5)), self.labels[rows]

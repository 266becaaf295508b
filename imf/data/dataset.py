"""What training asks of a data set, and the simplest one: images in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class DataSet(Protocol):
    """Labelled images or latents, in any order by row number.

    shape: (C, H, W) of a row as the network sees it.
    num_classes: labels are 0 ... num_classes - 1.
    autoencoder: `imf.evaluation.vae.digest` of the one that made the latents; "" where there are none.
    """

    @property
    def autoencoder(self) -> str: ...

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def num_classes(self) -> int: ...

    def __len__(self) -> int: ...

    def fetch(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Data x [B, C, H, W] fp32, normalised, and labels y [B] int64, on the CPU, of rows [B] int64.

        What is random in x[i] (a latent is a sample of its posterior) depends on the i-th of the `row_seeds`
        of the CPU `generator`; nothing else is drawn from it, so a part of a batch can be had alone.
        """
        ...


def row_seeds(generator: torch.Generator, count: int) -> Tensor:
    """The next `count` seeds of a CPU generator, [count] int64; n, then m equal n + m at once."""
    return torch.randint(2**63 - 1, (count,), generator=generator)


@dataclass(frozen=True)
class LabelledImages:
    """A data set that fits into memory.

    images: [N, C, H, W] fp32, pixels in [-1, 1].
    labels: [N] int64 in 0 ... num_classes - 1.
    """

    images: Tensor
    labels: Tensor
    num_classes: int

    autoencoder = ""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        _, c, height, width = self.images.shape
        return c, height, width

    def fetch(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images and labels of `rows`, see `DataSet.fetch`; nothing of it is random."""
        return self.images[rows], self.labels[rows]

    def to(self, device: torch.device) -> LabelledImages:
        """The same data with images and labels on `device`."""
        return LabelledImages(self.images.to(device), self.labels.to(device), self.num_classes)

"""scikit-learn's handwritten digits: 1,797 real images, 8 x 8 pixels, 10 classes, part of its installation.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository,
1998.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class LabelledImages:
    """A data set in memory, see `imf.data.DataSet`.

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
        """Returns images and labels of `rows`; nothing is drawn from the generator."""
        return self.images[rows], self.labels[rows]


def load() -> LabelledImages:
    """Loads all digits in file order: images [1797, 1, 8, 8], 0..16 mapped to [-1, 1]; labels [1797]."""
    from sklearn.datasets import load_digits  # only here: the import takes a second

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels.astype(np.float32)).reshape(-1, 1, 8, 8) / 8 - 1
    return LabelledImages(images, torch.from_numpy(labels.astype(np.int64)), num_classes=10)

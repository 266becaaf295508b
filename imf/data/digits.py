"""scikit-learn's handwritten digits: 1,797 real images, 8 x 8 pixels, 10 classes, part of its installation.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository,
1998.
"""

from __future__ import annotations

import numpy as np
import torch

from imf.data.memory import LabelledImages


class Digits(LabelledImages):
    """The digits; a class of their own, since a classifier's settings are known for these alone."""


def load() -> Digits:
    """Loads all digits in file order: images [1797, 1, 8, 8], 0..16 mapped to [-1, 1]; labels [1797]."""
    from sklearn.datasets import load_digits  # only here: the import takes a second

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels.astype(np.float32)).reshape(-1, 1, 8, 8) / 8 - 1
    return Digits(images, torch.from_numpy(labels.astype(np.int64)), [str(digit) for digit in range(10)])

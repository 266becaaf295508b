"""scikit-learn's handwritten digits: 1,797 real images, 8 x 8 pixels, 10 classes, part of its installation.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository,
1998.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits

from imf.data.dataset import LabelledImages


def load() -> LabelledImages:
    """All digits in file order: images [1797, 1, 8, 8] fp32, 0..16 mapped to [-1, 1]; labels [1797] int64."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels.astype(np.float32)).reshape(-1, 1, 8, 8) / 8 - 1
    return LabelledImages(images, torch.from_numpy(labels.astype(np.int64)), num_classes=10)

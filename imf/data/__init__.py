"""Data sets, and the order in which training walks through one."""

from __future__ import annotations

from pathlib import Path

from imf.data.batches import Batches, batch_indices
from imf.data.dataset import DataSet, LabelledImages, row_seeds

__all__ = ["Batches", "DataSet", "LabelledImages", "batch_indices", "load", "row_seeds"]


def load(name_or_path: str | Path) -> DataSet:
    """The data set called "digits"; ValueError if there is none of that name."""
    if name_or_path == "digits":
        from imf.data import digits

        return digits.load()
    raise ValueError(f"load: name_or_path must be 'digits', got '{name_or_path}'")

"""Labels of a source: from the texts or numbers in its files to 0 ... classes - 1 and a name for each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imf.data.files import short
from imf.data.memory import UNCONDITIONAL
from imf.program import UserError

Labels = tuple[NDArray[np.int64], list[str]]  # [N] in 0 ... number of names - 1; a name per label

_NUMBER = re.compile(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", re.ASCII | re.IGNORECASE)
_GAP = "; number them without gaps, or name all classes by --class-names"


def unconditional(count: int, class_names: Sequence[str] | None) -> Labels:
    """Returns labels 0 of one class; UserError if several classes are named."""
    return np.zeros(count, np.int64), renamed([UNCONDITIONAL], class_names)


def renamed(names: list[str], class_names: Sequence[str] | None) -> list[str]:
    """Returns the names that --class-names gives instead; UserError unless it gives as many."""
    if class_names is None:
        return names
    if len(class_names) != len(names):
        raise UserError(
            f"--class-names must be {len(names)} names, one per class ({', '.join(names[:3])}"
            f"{', ...' if len(names) > 3 else ''}), got {len(class_names)}"
        )
    return list(class_names)


def of_texts(texts: Sequence[str], where: str, class_names: Sequence[str] | None) -> Labels:
    """Numbers labels that are texts: 0, 1, ... as they are, names in sorted order.

    where: begins the message of an error.
    Raises: UserError if some are numbers and others not, or a number is negative or left out.
    """
    names = sorted(set(texts))
    if all(map(_NUMBER.fullmatch, names)):
        if wrong := [text for text in names if not (text.isdecimal() and len(text) <= 18)]:
            raise UserError(f"{where} labels must be 0, 1, 2 ... or names, got {short(wrong[0])}")
        return of_array(np.array([int(text) for text in texts]), where, class_names)
    number_of = {text: number for number, text in enumerate(names)}
    return np.array([number_of[text] for text in texts], np.int64), renamed(names, class_names)


def of_array(values: NDArray[Any], where: str, class_names: Sequence[str] | None) -> Labels:
    """Checks labels that are numbers [N] or [N, 1], or numbers those that are texts.

    class_names: where given, labels are below their number, and a class may have no image.
    Raises: UserError, beginning with `where`, for another shape or type, or labels out of range.
    """
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        hint = "; one-hot? Store y.argmax(1)" if values.ndim == 2 else ""
        raise UserError(f"{where} labels must be [N], got {list(values.shape)}{hint}")
    if values.dtype.kind in "US":
        texts = values if values.dtype.kind == "U" else np.char.decode(values, "utf-8", "replace")
        return of_texts(texts.tolist(), where, class_names)
    if values.dtype.kind not in "iu":
        raise UserError(f"{where} labels must be integers or texts, got {values.dtype}")
    least, most = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    if least < 0:
        hint = ", as in a test split without labels" if least == -1 else ""
        raise UserError(f"{where} labels must be at least 0, got {least}{hint}")
    if class_names is not None:
        if most >= len(class_names):
            raise UserError(f"{where} labels must be below the {len(class_names)} class names, got {most}")
        return values.astype(np.int64), list(class_names)
    present = np.unique(values)
    if len(values) and len(present) != most + 1:
        missing = next(number for number, label in enumerate(present.tolist()) if label != number)
        raise UserError(
            f"{where} labels must be 0 ... {most} with none left out, got no image of label {missing}{_GAP}"
        )
    return values.astype(np.int64), [str(number) for number in range(most + 1)]

"""Progress bars of work that is short for small images and long for others."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def bar(total: int, title: str, unit: str, quiet: bool = False) -> tqdm[Any]:
    """Makes a bar that appears after a second on a terminal, after ten elsewhere, and leaves no line.

    quiet: makes one that never appears.
    """
    tick, delay = (0.5, 1) if sys.stderr.isatty() else (10, 10)
    options: dict[str, Any] = {"mininterval": tick, "delay": delay, "leave": False, "disable": quiet}
    return tqdm(total=total, desc=title, unit=unit, dynamic_ncols=True, **options)

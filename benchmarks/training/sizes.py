"""The sizes at which whole training steps are measured: a network and its batch."""

from __future__ import annotations

import dataclasses

from imf.model.config import IMFConfig

DIGITS = IMFConfig(
    input_size=8,
    patch_size=2,
    in_channels=1,
    hidden_size=128,
    depth=6,
    num_heads=2,
    aux_head_depth=2,
    num_classes=10,
)
SLICE = IMFConfig(hidden_size=768, depth=6, num_heads=12, aux_head_depth=2)
LONG = IMFConfig(input_size=64, hidden_size=384, depth=4, num_heads=6, aux_head_depth=2)
SIZES = {"digits": (DIGITS, 128), "slice": (SLICE, 4), "long": (LONG, 2)}
# With `long` and `slice` the points of the plots over the sequence's length and over depth.
SWEEPS = {
    **{f"{n * n // 4 + 20} tokens": (dataclasses.replace(LONG, input_size=n), 2) for n in (16, 32)},
    **{f"depth {n}": (dataclasses.replace(SLICE, depth=n), 4) for n in (2, 4)},
}
PLOTTED = {"long": "1044 tokens", "slice": "depth 6"}

"""The network of any configuration."""

from __future__ import annotations

from typing import Any

from imf.mean_flow.network import DiT
from imf.model.config import PRESETS, IMFConfig
from imf.model.imf import IMF


def build(x: str | IMFConfig) -> Any:
    """A network with fresh weights, of a preset (a key of `PRESETS`: "iMF-B/2" …) or of an `IMFConfig`.

    Returns:
        An `IMF`, or an `imf.mean_flow.network.DiT` where the blocks are plain.
    """
    if isinstance(x, str):
        if x not in PRESETS:
            raise ValueError(f"build: no preset {x!r}; there are {', '.join(PRESETS)}")
        x = PRESETS[x]
    if not isinstance(x, IMFConfig):
        raise TypeError(f"build: wanted the name of a preset or an IMFConfig, got {type(x).__name__}")
    return network_class(x)(x)


def network_class(config: IMFConfig) -> type[IMF] | type[DiT]:
    """Returns the class of the networks of a configuration."""
    return IMF if config.block == "modern" else DiT

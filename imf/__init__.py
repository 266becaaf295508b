"""Improved Mean Flows (arXiv 2512.02012) in PyTorch, on the fused forward-mode kernels of `imf_kernels`.

import imf

network = imf.build("iMF-B/2")
loss = imf.improved_mean_flow(network, x, y, imf.Draws.sample(x, seed=0, step=0)).loss
images = imf.load("runs/digits").generate([3, 1, 4])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imf.adapted import adapt as adapt
    from imf.export import export_sampler as export_sampler
    from imf.model.config import IMFConfig as IMFConfig
    from imf.model.sampler import generate as generate
    from imf.networks import build as build
    from imf.objective.draws import Draws as Draws
    from imf.objective.draws import Guidance as Guidance
    from imf.objective.imf_loss import improved_mean_flow as improved_mean_flow
    from imf.training.checkpoint import load as load
    from imf.training.config import TrainConfig as TrainConfig
    from imf.training.session import fit as fit
    from imf_kernels import __version__ as __version__

# Imported when first asked for: a program that reads statistics needs no network, and no compiled module.
_MODULES = {
    "Draws": "imf.objective.draws",
    "Guidance": "imf.objective.draws",
    "IMFConfig": "imf.model.config",
    "TrainConfig": "imf.training.config",
    "__version__": "imf_kernels",
    "adapt": "imf.adapted",
    "build": "imf.networks",
    "export_sampler": "imf.export",
    "fit": "imf.training.session",
    "generate": "imf.model.sampler",
    "improved_mean_flow": "imf.objective.imf_loss",
    "load": "imf.training.checkpoint",
}
__all__ = [name for name in _MODULES if not name.startswith("_")]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'imf' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]

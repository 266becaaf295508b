"""The golden arrays of tests/golden as tensors, for the tests that compare with the official program."""

import ast
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import imf_kernels as ik
from imf.model.config import IMFConfig
from imf.model.imf import IMF
from imf.networks import build
from imf.objective.draws import Draws
from imf.official.names import from_flax

GOLDEN = Path(__file__).parents[1] / "golden"


@cache
def arrays() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "imf_tiny.npz") as file:
        return {name: file[name] for name in file.files}


def images(name: str) -> Tensor:
    """[B, H, W, C] in the file → [B, C, H, W]."""
    return torch.from_numpy(arrays()[name]).permute(0, 3, 1, 2).contiguous()


def weights(kind: str = "param") -> dict[str, np.ndarray]:
    """Weights ("param") or their gradients ("grad") in Flax names."""
    return {k.removeprefix(f"{kind}:"): v for k, v in arrays().items() if k.startswith(f"{kind}:")}


def config() -> IMFConfig:
    fields = ast.literal_eval(str(arrays()["config"]))
    fields.pop("args")
    return IMFConfig(**fields)


def network(backend: str | None) -> IMF:
    model = build(config())
    model.load_state_dict(from_flax(weights()))
    model.forward = ik.use_backend(backend)(model.forward)
    return model


def batch() -> tuple[Tensor, Tensor, Draws]:
    vector = {
        k: torch.from_numpy(arrays()[k]) for k in ("t", "r", "omega", "t_min", "t_max", "y", "y_dropped")
    }
    scalars = {k: vector[k] for k in ("t", "r", "omega", "t_min", "t_max")}
    null = config().num_classes
    draws = Draws(**scalars, noise=images("e"), drop=vector["y_dropped"] == null, n_fm=4)
    return images("x"), vector["y"].long(), draws

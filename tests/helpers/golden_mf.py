"""The golden arrays of original Mean Flows as tensors, for the tests that compare with its program."""

import ast
from functools import cache

import numpy as np
import torch
from torch import Tensor

import imf_kernels as ik
from imf.mean_flow.network import DiT
from imf.model.config import ORIGINAL, IMFConfig
from imf.networks import build
from imf.objective.draws import Draws, Guidance
from imf.official.names import from_flax
from tests.helpers.golden_imf import GOLDEN


@cache
def arrays() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "mf_tiny.npz") as file:
        return {name: file[name] for name in file.files}


def images(name: str) -> Tensor:
    """[B, H, W, C] in the file → [B, C, H, W]."""
    return torch.from_numpy(arrays()[name]).permute(0, 3, 1, 2).contiguous()


def weights(kind: str = "param") -> dict[str, np.ndarray]:
    """Weights ("param") or their gradients ("grad") in Flax names."""
    return {k.removeprefix(f"{kind}:"): v for k, v in arrays().items() if k.startswith(f"{kind}:")}


def settings() -> tuple[IMFConfig, Guidance]:
    fields = ast.literal_eval(str(arrays()["config"]))
    _, *guidance = map(float, fields.pop("args"))
    return IMFConfig(**fields, **ORIGINAL), Guidance(*guidance)


def network(backend: str | None) -> DiT:
    model = build(settings()[0])
    model.load_state_dict(from_flax(weights()))
    model.forward = ik.use_backend(backend)(model.forward)
    return model


def batch() -> tuple[Tensor, Tensor, Draws]:
    t, r, y, y_dropped = (torch.from_numpy(arrays()[k]) for k in ("t", "r", "y", "y_dropped"))
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    null = settings()[0].num_classes
    draws = Draws(t, r, images("e"), omega=one, t_min=zero, t_max=one, drop=y_dropped == null, n_fm=6)
    return images("x"), y.long(), draws

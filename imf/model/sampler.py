"""Sampling: images from noise in n network calls, one by default.

By the definition of the average velocity u over [r, t], z_r = z_t - (t - r) u(z_t, t, r) exactly: the only
error is the network's. One call serves guided sampling too: omega and the interval are inputs of the network.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from imf import random
from imf.model.config import IMFConfig, check_guidance, config_of
from imf.program import UserError, progress


@torch.no_grad()
def generate(
    model: nn.Module,
    noise: Tensor,
    y: Tensor,
    *,
    steps: int = 1,
    omega: float = 1.0,
    t_min: float = 0.0,
    t_max: float = 1.0,
) -> Tensor:
    """Samples images [B, C, H, W], fp32, from `noise` [B, C, H, W] ~ N(0, I) and labels `y` [B] int64.

    z <- z - (t - r) u(z, h = t - r, omega, t_min, t_max, y) on linspace(1, 0, steps + 1), a call per step, on
    the model's device.  omega: guidance scale, >= 1.  t_min, t_max: guidance interval in [0, 1].
    Raises: UserError for steps < 1, labels that do not fit the noise, or guidance out of range.
    Source: Improved Mean Flows, arXiv 2512.02012.
    """
    check_steps("generate: steps", steps)
    for name, x in (("noise", noise), ("y", y)):
        if not isinstance(x, Tensor):
            raise UserError(f"generate: {name} must be a tensor, got a {type(x).__name__}")
    if noise.ndim != 4 or y.shape != noise.shape[:1]:
        raise UserError(
            f"generate: noise must be [B, C, H, W] and y [B], got {list(noise.shape)} and {list(y.shape)}"
        )
    check_inputs_of(config_of(model), omega, t_min, t_max)
    device = next(model.parameters()).device
    z, y = noise.to(device, torch.float32), y.to(device)
    rows = z.new_ones(len(z))
    return walk(model, z, y, rows * float(omega), rows * t_min, rows * t_max, steps)


def walk(
    model: nn.Module, z: Tensor, y: Tensor, omega: Tensor, t_min: Tensor, t_max: Tensor, steps: int
) -> Tensor:
    """Walks from noise z [B, C, H, W] at time 1 to images at 0; labels and guidance [B]; no checks."""
    rows = torch.ones_like(omega)
    for t, r in pairwise(torch.linspace(1, 0, steps + 1, device="cpu").tolist()):
        u = model(z, rows * t, rows * (t - r), omega, t_min, t_max, y)
        z = z - (t - r) * u
    return z


def sample_labels(
    model: nn.Module,
    labels: Tensor,
    *,
    seed: int | torch.Generator | None = 0,
    batch_size: int | None = None,
    bar: bool = False,
    **options: Any,
) -> Tensor:
    """Samples an image per label [N] int64: [N, C, H, W] fp32 on the model's device.

    seed: of the noise; or a generator, or None for PyTorch's own one, that it is drawn from. It depends on
        the seed and N, not on batch_size, default N.
    bar: show a progress bar where it takes long.  options: of `generate`.
    """
    config, size = config_of(model), batch_size or len(labels)
    if not config.in_channels:  # adapted, and no batch has come yet
        raise UserError("samples: the size of images is not known yet: pass shape=(C, H, H) to imf.adapt")
    shape = len(labels), config.in_channels, config.input_size, config.input_size
    generator = random.generator(seed, "samples") if isinstance(seed, int) else seed
    noise = torch.randn(shape, generator=generator, device=generator.device if generator else "cpu")
    parts = zip(noise.split(size), labels.split(size), strict=True)
    shown = progress(list(parts), "samples", "batch", brief=True, quiet=not bar)
    return torch.cat([generate(model, z, y, **options) for z, y in shown])


def check_steps(name: str, steps: int) -> None:
    """Raises UserError, naming the argument, unless there is a network call."""
    if type(steps) is not int or steps < 1:
        raise UserError(f"{name} must be an integer of at least 1, got {steps!r}")


def check_inputs_of(config: IMFConfig, omega: float, t_min: float, t_max: float) -> None:
    """Raises UserError for guidance out of range, or that the network does not take as an input."""
    try:
        check_guidance(omega, t_min, t_max)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not config.omega_input and omega != 1:
        raise UserError(f"generate: omega must be 1, it is no input of this network, got {omega:g}")
    if not config.interval_input and (t_min, t_max) != (0, 1):
        raise UserError(
            "generate: t_min and t_max must be 0 and 1, the guidance interval is no input of this network, "
            f"got {t_min:g} and {t_max:g}"
        )

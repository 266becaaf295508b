"""Presets: the digits, other small images, and the published settings for ImageNet at 256² in latents.

Improved Mean Flows: its official program, 640 epochs of 1,251 steps, as for B/2, and the best published
guidance for one step. Mean Flows: its official program, 240 epochs of 5,004 steps.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from imf.model.config import PRESETS as NETWORKS
from imf.training.config import DIGITS_NETWORK, TrainConfig

# Settings that both programs have in common.
_IMAGENET: dict[str, Any] = {
    "lr": 1e-4,
    "decay": "constant",
    "beta1": 0.9,
    "beta2": 0.95,
    "weight_decay": 0.0,
    "ema_decay": 0.9999,
    "ema_warmup": 1.0,  # constant from the first step
    "r0_fraction": 0.0,
    "norm_p": 1.0,
    "norm_eps": 0.01,
    "drop_probability": 0.1,
    "time_mean": -0.4,
    "time_std": 1.0,
    "omega_max": 8.0,
    "omega_exponent": 1.0,
    "log_every": 100,
    "sample_every": 0,  # the network's samples are latents, of 1,000 classes
    "checkpoint_every": 5_000,
}
_IMF_EPOCH, _MF_EPOCH = 1_281_167 // 1024, 1_281_167 // 256
_IMF: dict[str, Any] = {
    "method": "imf",
    "batch_size": 1024,
    "steps": 640 * _IMF_EPOCH,
    "warmup_steps": 10 * _IMF_EPOCH,
}
_MF: dict[str, Any] = {"method": "mf", "batch_size": 256, "steps": 240 * _MF_EPOCH, "warmup_steps": 0}


def _improved(name: str, omega: float, t_min: float, t_max: float) -> TrainConfig:
    guidance: dict[str, Any] = {"omega": omega, "t_min": t_min, "t_max": t_max}
    return TrainConfig(network=NETWORKS[name], fm_fraction=0.5, **_IMF, **guidance, **_IMAGENET)


def _original(name: str, omega: float, kappa: float, t_max: float) -> TrainConfig:
    guidance: dict[str, Any] = {
        "fixed_omega": omega,
        "fixed_kappa": kappa,
        "fixed_t_min": 0.0,
        "fixed_t_max": t_max,
    }
    return TrainConfig(network=NETWORKS[name], fm_fraction=0.75, **_MF, **guidance, **_IMAGENET)


# Images of 16 to 64 pixels, on two CPU cores in half an hour, or on a GPU; the digits' recipe diverges there.
_SMALL = TrainConfig(
    network=replace(
        DIGITS_NETWORK,
        hidden_size=128,
        depth=6,
        aux_head_depth=3,
        class_tokens=4,
        omega_tokens=2,
        time_tokens=2,
    ),
    max_patches=64,
    steps=1500,
    lr=2e-3,
    r0_fraction=0.125,
    norm_p=0.5,
    warmup_steps=100,
    ema_decay=0.995,
    sample_every=250,
    checkpoint_every=250,
)

PRESETS = {
    "digits": TrainConfig(),
    "small": _SMALL,
    "iMF-B/2": _improved("iMF-B/2", 8.0, 0.4, 0.65),
    "iMF-M/2": _improved("iMF-M/2", 10.5, 0.4, 0.6),
    "iMF-L/2": _improved("iMF-L/2", 10.5, 0.4, 0.6),
    "iMF-XL/2": _improved("iMF-XL/2", 8.0, 0.42, 0.62),
    "MF-B/2": _original("MF-B/2", 1.0, 0.5, 1.0),
    "MF-M/2": _original("MF-M/2", 1.0, 0.5, 1.0),
    "MF-L/2": _original("MF-L/2", 0.2, 0.92, 0.8),
    "MF-XL/2": _original("MF-XL/2", 0.2, 0.92, 0.75),
}


def preset_of(argv: Sequence[str]) -> TrainConfig:
    """Returns the preset that `--preset` names; by default "digits" for the digits, "small" for others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset")
    parser.add_argument("--data", default="digits")
    name = None
    with contextlib.suppress(argparse.ArgumentError):  # without a value: the full parser says so
        given = parser.parse_known_args(argv)[0]
        name = given.preset or ("digits" if given.data == "digits" else "small")
    return PRESETS.get(name or "digits", PRESETS["digits"])

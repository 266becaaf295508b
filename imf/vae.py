"""The autoencoder between images and latents: Stable Diffusion's, read by diffusers from a local folder.

A latent as the networks see it is normalised per channel: (latent - MEAN) / STD, without the factor 0.18215
of Stable Diffusion itself. The constants belong to `sd-vae-ft-mse` at 256 x 256.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

MEAN = (0.86488, -0.27787343, 0.21616915, 0.3738409)
STD = (4.85503674, 5.31922414, 3.93725398, 3.9870003)
# What the configurations of Stable Diffusion 1's autoencoders say; SDXL's, of the same shape, says 0.13025.
SCALING_FACTOR = 0.18215


class VAEError(ValueError):
    """An autoencoder that cannot be loaded or is not the one of the latents; the message says why."""


def load(path: Path, device: torch.device) -> Any:
    """diffusers' `AutoencoderKL` from a folder (config.json and *.safetensors), fp32, without gradients.

    Raises: VAEError if diffusers is not installed, the folder holds no whole autoencoder, or another than
    Stable Diffusion 1's (4 latent channels, scaling factor 0.18215).
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise VAEError(f"{path}: an autoencoder needs diffusers: pip install -e '.[vae]'") from error
    if not (path / "config.json").is_file():
        raise VAEError(f"{path}: wanted the folder of an AutoencoderKL, there is no config.json in it")
    options = {"local_files_only": True, "use_safetensors": True, "low_cpu_mem_usage": False}
    speaker = logging.getLogger("diffusers")
    level = speaker.level
    try:
        speaker.setLevel(logging.ERROR)  # what it would warn of is raised below
        name = AutoencoderKL.load_config(path).get("_class_name")
        if name != "AutoencoderKL":
            raise VAEError(f"{path}: wanted an AutoencoderKL, got a {name}")
        vae, found = AutoencoderKL.from_pretrained(path, output_loading_info=True, **options)
    except VAEError:
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise VAEError(f"{path}: no AutoencoderKL can be read from it: {error}") from error
    finally:
        speaker.setLevel(level)
    lacking = [*found["missing_keys"], *found["mismatched_keys"]]
    if lacking:
        raise VAEError(f"{path}: its weights lack {', '.join(map(str, lacking[:5]))} ({len(lacking)} in all)")
    config = vae.config
    for option, wanted in (("latent_channels", len(MEAN)), ("scaling_factor", SCALING_FACTOR)):
        if config[option] != wanted:
            raise VAEError(
                f"{path}: wanted Stable Diffusion 1's autoencoder (sd-vae-ft-mse), of {option} {wanted}, "
                f"got {config[option]}: latents of another are not what these networks know"
            )
    return vae.float().to(device).eval().requires_grad_(False)


def of_network(path: Path | None, channels: int, device: torch.device) -> Any:
    """What decodes the samples of a network of so many channels: the autoencoder in `path`, None for images.

    Raises: VAEError, naming --vae, if latents have no autoencoder or images have one; and as `load`.
    """
    latents = channels not in (1, 3)
    if latents != (path is not None):
        what = "latents: pass the autoencoder's folder" if latents else "images already: leave it out"
        raise VAEError(f"--vae: the network makes {what} ({channels} channels)")
    return load(path, device) if path else None


def normalise(latents: Tensor) -> Tensor:
    """Latents [..., 4, H, W] of the autoencoder as the networks see them."""
    mean, std = _constants(latents)
    return (latents - mean) / std


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Images [B, 3, 8 H, 8 W] fp32, about within [-1, 1], of normalised latents [B, 4, H, W] fp32.

    Raises: VAEError for another number of channels.
    """
    if latents.ndim != 4 or latents.shape[1] != len(MEAN):
        raise VAEError(f"decode: latents must be [B, {len(MEAN)}, H, W], got {list(latents.shape)}")
    mean, std = _constants(latents)
    images: Tensor = vae.decode(latents * std + mean).sample
    return images.float()


def _constants(latents: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(c, dtype=latents.dtype, device=latents.device) for c in (MEAN, STD))
    return mean[:, None, None], std[:, None, None]

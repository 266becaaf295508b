"""The autoencoder between images and latents: Stable Diffusion's, read by diffusers from a local folder.

The networks see latents normalised per channel, (latent - MEAN) / STD by the constants of `sd-vae-ft-mse` at
256 x 256, without Stable Diffusion's own factor.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imf.io import read_json, sha256
from imf.program import UserError

MEAN = (0.86488, -0.27787343, 0.21616915, 0.3738409)
STD = (4.85503674, 5.31922414, 3.93725398, 3.9870003)
SCALING_FACTOR = 0.18215  # of Stable Diffusion 1's autoencoders; SDXL's, of the same shape, has 0.13025
WEIGHTS = "diffusion_pytorch_model.safetensors"


def load(path: Path, device: torch.device) -> Any:
    """Loads diffusers' `AutoencoderKL` from a folder (config.json and *.safetensors), in fp32, frozen.

    Raises: UserError if diffusers is not installed or the folder holds no complete autoencoder of Stable
        Diffusion 1 (4 latent channels, scaling factor 0.18215).
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise UserError(f"{path}: an autoencoder needs diffusers: pip install -e '.[vae]'") from error
    _check_folder(path)
    options = {"local_files_only": True, "use_safetensors": True, "low_cpu_mem_usage": False}
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it would warn of what is raised below
    try:
        vae, found = AutoencoderKL.from_pretrained(path, output_loading_info=True, **options)
    except Exception as error:  # of nearly any class, for a field of config.json of another type
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: no AutoencoderKL can be read from it: {reason}") from error
    finally:
        logger.setLevel(level)
    lacking = [*found["missing_keys"], *found["mismatched_keys"]]
    if lacking:
        raise UserError(f"{path}: its weights lack {', '.join(map(str, lacking[:5]))} ({len(lacking)})")
    check(str(path), vae)
    return vae.float().to(device).eval().requires_grad_(False)


def _check_folder(path: Path) -> None:
    """UserError, with the likely mistake, unless the folder looks like that of an AutoencoderKL."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    if not (path / "config.json").is_file():
        hint = "; it is a whole pipeline: pass the folder vae in it" if (path / "vae").is_dir() else ""
        raise UserError(f"{path}: must be an AutoencoderKL's folder, got no config.json{hint}")
    if (kind := read_json(path / "config.json").get("_class_name")) != "AutoencoderKL":
        raise UserError(f"{path}: must be an AutoencoderKL's folder, got one of {kind}")
    if not any(path.glob("*.safetensors")):
        names = ", ".join(sorted(file.name for file in path.iterdir()))
        raise UserError(
            f"{path}: must hold {WEIGHTS}, got {names}; nothing is unpickled here: a .bin that you trust can "
            f"be loaded by diffusers and written again with save_pretrained"
        )


def check(name: str, vae: Any) -> None:
    """Raises UserError, naming it, unless an AutoencoderKL is of the form of Stable Diffusion 1's."""
    for option, wanted in (("latent_channels", len(MEAN)), ("scaling_factor", SCALING_FACTOR)):
        if (got := vae.config[option]) != wanted:
            raise UserError(
                f"{name}: wanted Stable Diffusion 1's autoencoder (sd-vae-ft-mse), of {option} {wanted}, "
                f"got {got}: latents of another are not what these networks know"
            )


def digest(path: Path) -> str:
    """Returns the SHA-256 over those of config.json and the weights in a folder; UserError if unreadable."""
    try:
        parts = [sha256(path / name) for name in ("config.json", WEIGHTS)]
    except OSError as error:
        raise UserError(f"{path}: could not be read: {error}") from error
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def of_network(path: Path | None, channels: int, device: torch.device, prepared_by: str = "") -> Any:
    """Loads the autoencoder that decodes a network's samples of so many channels; None for images.

    prepared_by: `digest` of the autoencoder that made the latents of its training; "" if that is not known.
    Raises: UserError for latents without autoencoder or with another one, images with one, and as `load`.
    """
    latents = channels not in (1, 3)
    if latents != (path is not None):
        what = "latents: pass the autoencoder's folder" if latents else "images already: leave it out"
        raise UserError(f"--vae: the network makes {what} ({channels} channels)")
    if path is None:
        return None
    vae = load(path, device)
    if prepared_by and (got := digest(path)) != prepared_by:
        raise UserError(
            f"--vae {path}: must be the autoencoder whose latents the network was trained on, of digest "
            f"{prepared_by[:16]}… (vae_sha256 in the data's index.json), got {got[:16]}…: "
            f"pass the folder that imf.data.prepare was given"
        )
    return vae


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Decodes images [B, 3, 8 H, 8 W] fp32, about within [-1, 1], of normalised latents [B, 4, H, W] fp32.

    Raises: UserError for another number of channels.
    """
    if latents.ndim != 4 or latents.shape[1] != len(MEAN):
        raise UserError(f"decode: latents must be [B, {len(MEAN)}, H, W], got {list(latents.shape)}")
    mean, std = latents.new_tensor((MEAN, STD))[..., None, None]
    images: Tensor = vae.decode((latents * std + mean).to(vae.dtype)).sample
    return images.float()

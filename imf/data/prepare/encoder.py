"""From images to what is stored of them: the posterior of an autoencoder, or the pixels themselves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from imf.evaluation import vae
from imf.program import UserError

PRECISIONS = ("fp32", "tf32", "bf16")
CONSTANTS = "sd-vae-ft-mse"  # whose ImageNet latents gave MEAN and STD


class Encoder(ABC):
    """Images [B, C, S, S] uint8 -> the rows that are stored, see `imf.data.packed.ROWS`.

    kind: "latents" or "pixels".  shape: (C, H, W) of a row as the network sees it.
    about: what tells this encoder from others, JSON-compatible.
    """

    kind: str
    shape: tuple[int, int, int]
    about: dict[str, Any]

    @abstractmethod
    def __call__(self, images: NDArray[np.uint8]) -> NDArray[Any]: ...


class Pixels(Encoder):
    """Stores the pixels as they are; the network sees x / 127.5 - 1."""

    kind = "pixels"

    def __init__(self, channels: int, size: int) -> None:
        self.shape = (channels, size, size)
        self.about = {"mean": [127.5] * channels, "std": [127.5] * channels}

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[Any]:
        return images


class Latents(Encoder):
    """Stores mean and standard deviation of the posterior of diffusers' AutoencoderKL in the folder `path`.

    In fp32: rounding to fp16 moves a latent by 9.5e-4 RMS, as much as sampling a posterior of log-variance
    -13.9 does, and this autoencoder's posteriors are about as narrow.

    precision: of the products, "fp32", "tf32" or "bf16".
    Raises: UserError as `imf.evaluation.vae.load`, or if `size` does not fit the autoencoder.
    """

    kind = "latents"

    def __init__(self, path: Path, size: int, device: torch.device, precision: str) -> None:
        self._vae, self._path = vae.load(path, device), path
        self._device, self._precision = device, precision
        config = self._vae.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        if factor != 8:
            raise UserError(f"--vae {path}: must downsample by 8, as {CONSTANTS} does, got {factor}")
        if size % factor:
            raise UserError(
                f"--size must be a multiple of {factor}, as the VAE downsamples by it, got {size}"
            )
        self.shape = (config.latent_channels, size // factor, size // factor)
        self.about = {
            "mean": list(vae.MEAN),
            "std": list(vae.STD),
            "constants": CONSTANTS,
            "vae_sha256": vae.digest(path),
            "precision": precision,
            "device": device.type,
        }

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8]) -> NDArray[Any]:
        x = torch.from_numpy(images).to(self._device).float() / 127.5 - 1
        autocast = torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bf16")
        try:
            with _tf32(self._precision == "tf32"), autocast:
                posterior = self._vae.encode(x).latent_dist
        except torch.OutOfMemoryError as error:
            raise UserError(f"--batch-size must be smaller than {len(images)} here: {error}") from error
        except RuntimeError as error:  # layers that do not fit together
            reason = " ".join(str(error).split())
            raise UserError(f"--vae {self._path}: fails on images {list(x.shape)}: {reason}") from error
        # Not posterior.std: in bf16 the exponential would be rounded too.
        moments = torch.stack([posterior.mean.float(), torch.exp(0.5 * posterior.logvar.float())], dim=1)
        if not moments.isfinite().all():
            reason = f"its latents are not finite in {self._precision}: its weights may be damaged"
            raise UserError(f"--vae {self._path}: {reason}")
        return moments.cpu().numpy()


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Sets whether products and convolutions in fp32 may round their operands to TF32."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, allowed
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
            yield
    finally:
        matmul.allow_tf32 = before

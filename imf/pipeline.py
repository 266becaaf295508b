"""A pipeline of diffusers from labels to images: `from imf.pipeline import IMFPipeline`, with diffusers.

A saved pipeline is a folder with `model_index.json`; `network`, as `save_pretrained` of a network writes it
and `imf.load` reads it; and `vae`, the autoencoder of networks of latents, as diffusers writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from imf.evaluation import vae as autoencoders
from imf.model.config import IMFConfig
from imf.model.pretrained import PRECISIONS, Pretrained, read_network_config
from imf.model.sampler import check_inputs_of, check_steps, walk
from imf.networks import network_class
from imf.program import UserError

try:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise ImportError("imf.pipeline needs diffusers: pip install -e '.[vae]'") from error

OUTPUTS = ("pil", "np", "pt", "latent")


class IMFModel(ModelMixin):
    """A network as a component of diffusers' pipelines.

    Weights stay float32; a dtype that is asked of it, float32 or bfloat16, is that of its products.
    """

    def __init__(self, network: Pretrained) -> None:
        super().__init__()
        self.network = network

    @property
    def config(self) -> IMFConfig:
        """Returns the network's shape."""
        return self.network.config

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Calls the network."""
        return self.network(*inputs, **options)

    def save_pretrained(self, save_directory: str | Path) -> None:  # type: ignore[override]
        """Writes the network's folder, see `imf.model.pretrained.Pretrained.save_pretrained`."""
        self.network.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: str | Path, *, torch_dtype: torch.dtype | None = None, **options: Any
    ) -> IMFModel:
        """Reads a network's folder; UserError for what it cannot do of that which diffusers asks."""
        for name in ("variant", "device_map", "quantization_config", "use_flashpack"):
            if options.get(name):
                raise UserError(
                    f"{folder}: {name} does not apply to this network, got {options[name]!r}; leave it out"
                )
        model = cls(network_class(read_network_config(Path(folder))).from_pretrained(folder))
        return model if torch_dtype is None else model.to(torch_dtype)

    def to(self, *args: Any, **kwargs: Any) -> IMFModel:  # type: ignore[override]
        """Moves the weights to a device; a dtype becomes that of products. UserError for another dtype."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None:
            if dtype not in PRECISIONS.values():
                wanted = ", ".join(map(str, PRECISIONS.values()))
                raise UserError(f"the network's dtype must be one of {wanted}, got {dtype}")
            self.network.compute_dtype = dtype
        if device is not None:
            self.network.to(device)
        return self


class IMFPipeline(DiffusionPipeline):
    """Images of labels by an Improved Mean Flows network, in one call of it by default.

    network: of `imf.load`.  vae: of `imf.evaluation.vae.load`, for a network of latents; None for images.

    Raises: UserError for a network of latents without autoencoder, of images with one, or with another one
        than Stable Diffusion 1's. Whether its latents are those of the training is for the caller to know:
        `network.sampling.autoencoder`.
    """

    model_cpu_offload_seq = "network->vae"  # type: ignore[assignment]
    _optional_components: ClassVar[list[str]] = ["vae"]  # type: ignore[misc]

    network: IMFModel
    vae: AutoencoderKL | None

    def __init__(self, network: IMFModel | Pretrained, vae: AutoencoderKL | None = None) -> None:
        super().__init__()
        if isinstance(network, Pretrained):
            network = IMFModel(network)
        if not isinstance(network, IMFModel):
            raise UserError(f"IMFPipeline: network must be one of imf.load, got a {type(network).__name__}")
        channels = network.config.in_channels
        if (channels in (1, 3)) != (vae is None):
            what = "images, leave vae out" if vae is not None else "latents, pass the vae that decodes them"
            raise UserError(f"IMFPipeline: the network makes {what} ({channels} channels)")
        if vae is not None:
            autoencoders.check("IMFPipeline: vae", vae)
        self.register_modules(network=network.eval(), vae=vae)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int] | Sequence[str],
        num_inference_steps: int = 1,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws an image per label.

        Args:
            class_labels: integers, num_classes for no class, or names of classes where they are known.
            num_inference_steps: network calls per image.
            guidance_scale, guidance_interval: ω, at least 1, and the times in [0, 1] between which it acts;
                by default those of the network's run.
            generator: of the noise, or one per image, on any device; default PyTorch's own.
            output_type: "pil"; "np", [N, H, W, C] in [0, 1]; "pt", [N, C, H, W] in [0, 1]; "latent", what the
                network makes.
            return_dict: a named tuple with `images`, or a plain tuple of them.

        Raises:
            UserError: labels that are not known, steps below 1, guidance out of range or no input of the
                network, another output type.
        """
        if output_type not in OUTPUTS:
            wanted = ", ".join(map(repr, OUTPUTS))
            raise UserError(f"IMFPipeline: output_type must be one of {wanted}, got {output_type!r}")
        check_steps("IMFPipeline: num_inference_steps", num_inference_steps)
        network, device = self.network.network, self._execution_device
        sampling, config = network.sampling, network.config
        omega = sampling.omega if guidance_scale is None else guidance_scale
        t_min, t_max = guidance_interval or (sampling.t_min, sampling.t_max)
        check_inputs_of(config, omega, t_min, t_max)
        several: Any = [class_labels] if isinstance(class_labels, (int, str)) else class_labels
        labels = network.labels_of(several).to(device)
        shape = len(labels), config.in_channels, config.input_size, config.input_size
        noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        rows = noise.new_ones(len(labels))
        guidance = rows * float(omega), rows * t_min, rows * t_max
        # The component, not the network in it: diffusers moves components when they are called.
        images: Any = walk(self.network, noise, labels, *guidance, num_inference_steps)
        if output_type != "latent":
            images = self._as(output_type, images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _as(self, output_type: str, samples: Tensor) -> Any:
        """Returns images in [0, 1] of what the network made."""
        if self.vae is not None:
            samples = autoencoders.decode(self.vae, samples)
        images = (samples / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        return arrays if output_type == "np" else self.numpy_to_pil(arrays)

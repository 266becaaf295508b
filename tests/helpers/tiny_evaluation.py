"""What the tests of evaluation share: an extractor as a file, a tiny autoencoder, a network known to them."""

import warnings

import torch

from imf.model.config import IMFConfig
from imf.networks import build
from imf.training.checkpoint import Metadata, environment, save_network
from imf.training.config import TrainConfig

LATENTS = IMFConfig(
    input_size=4, patch_size=2, hidden_size=16, depth=2, num_heads=1, aux_head_depth=1, num_classes=5
)


class Means(torch.nn.Module):
    """Features: the mean of each channel, and what two of them have in common; logits: twice that."""

    def forward(self, x):
        means = x.float().mean((2, 3)) / 255
        return means, means * 2


class Nvidia(torch.nn.Module):
    """The signature of NVIDIA's Inception: features, or probabilities."""

    def forward(
        self, img, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ):
        means = img.float().mean((2, 3)) / 255
        return means if return_features else (means * 2).softmax(1)


def script(module, path):
    """Write a module as TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(path)
    return path


def autoencoder(folder, **changes):
    """Write a random AutoencoderKL that makes images twice the size of its latents; diffusers is there."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    options = {
        "latent_channels": 4,
        "block_out_channels": (4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 2,
    }
    AutoencoderKL(**{**options, **changes}).save_pretrained(folder)
    return folder


def network_file(path, config=LATENTS, seed=0, method="imf", class_names=()):
    """Write a network with random weights in every layer, the last too, as weights without a run."""
    torch.manual_seed(seed)
    state = {name: torch.randn_like(x) * 0.2 for name, x in build(config).state_dict().items()}
    settings = TrainConfig(method=method, network=config, omega=2.0, t_min=0.1, t_max=0.9)
    metadata = Metadata(3, 0.0, settings, "fp32", environment(torch.device("cpu")), class_names=class_names)
    save_network(path, {"ema": state, "model": {name: x / 2 for name, x in state.items()}}, metadata)
    return path

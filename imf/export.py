"""A network's sampler as a program of `torch.export`, which runs without the code that it was made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import imf_kernels as ik
from imf.model.pretrained import Pretrained
from imf.model.sampler import check_steps, walk
from imf.program import UserError


class Sampler(nn.Module):
    """A network with its number of steps, as one module from noise to images.

    It checks no values: labels in 0 … num_classes, omega >= 1, 0 <= t_min <= t_max <= 1.
    """

    def __init__(self, network: Pretrained, steps: int) -> None:
        super().__init__()
        self.network, self.steps = network, steps

    def forward(self, noise: Tensor, labels: Tensor, omega: Tensor, t_min: Tensor, t_max: Tensor) -> Tensor:
        """Returns images [B, C, H, W] of noise like them, labels [B] int64 and guidance [B], in float32."""
        return walk(self.network, noise, labels, omega, t_min, t_max, self.steps)


def export_sampler(
    network: Pretrained, *, steps: int = 1, backend: str | None = "reference"
) -> ExportedProgram:
    """Exports the sampler of a network, for any batch size.

    `program.module()(noise, labels, omega, t_min, t_max)` returns images [B, C, H, W] in float32, of noise
    like them, labels [B] in int64, and guidance per image, [B] in float32, all on the network's device. The
    weights are in the program. `torch.export.save` writes it, AOTInductor compiles it.

    steps: network calls per image.
    backend: of the operations, see `imf_kernels.use_backend`. "reference" is plain PyTorch: a process that
        loads the program needs nothing else. Another one, or None for the best, leaves operators in it that
        the process defines by `import imf_kernels`.
    Raises: UserError for steps below 1 or a network of another kind; ValueError for an unknown backend.
    """
    check_steps("export_sampler: steps", steps)
    if not isinstance(network, Pretrained):
        raise UserError(
            f"export_sampler: network must be one of imf.load or imf.build, got a {type(network).__name__}"
        )
    config, device = network.config, next(network.parameters()).device
    like: Any = {"device": device, "dtype": torch.float32}
    rows = 2  # an example of one row would bind the program to one
    noise = torch.zeros(rows, config.in_channels, config.input_size, config.input_size, **like)
    labels = torch.zeros(rows, dtype=torch.int64, device=device)
    arguments = noise, labels, *torch.ones(3, rows, **like)
    batch = Dim("batch", min=1)
    sampler = Sampler(network, steps)
    with torch.no_grad(), ik.use_backend(backend):
        sampler(*arguments)  # tables of positions move to the device here, not in the program
        return torch.export.export(sampler, arguments, dynamic_shapes=({0: batch},) * len(arguments))

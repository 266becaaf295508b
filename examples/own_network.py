"""Train a network of your own, a U-Net of diffusers, under iMF: `python examples/own_network.py`.

The U-Net has no head for v, so v(z, t) = u(z, t, t): the paper's v-loss with the boundary condition.
"""

import argparse
from types import SimpleNamespace

import torch
from diffusers import UNet2DModel
from torch import nn

import imf
import imf_kernels as ik
from imf.data import Batches, load
from imf.mean_flow.objective import mean_flow
from imf.objective.draws import Guidance


class Adapter(nn.Module):
    """A network of z, h and labels, called as `imf` calls one: z and h are `Dual`s where du/dt is wanted."""

    def __init__(self, network, num_classes):
        super().__init__()
        self.network = network
        self.config = SimpleNamespace(num_classes=num_classes, omega_input=False, interval_input=False)

    def forward(self, z, t, h, omega, t_min, t_max, y, heads="u"):
        def u(z, h):
            return self.network(z, h, class_labels=y).sample

        if not isinstance(z, ik.Dual):
            return u(z, h)
        value, tangent = ik.jvp(u, (z.primal, h.primal), (z.tangent, h.tangent))
        return ik.Dual(value, tangent.detach())


parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
for name, default in (("steps", 100), ("batch", 64), ("width", 32)):
    parser.add_argument(f"--{name}", type=int, default=default)
arguments = parser.parse_args()

digits = load("digits")
unet = UNet2DModel(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(arguments.width, 2 * arguments.width),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
    num_class_embeds=digits.num_classes + 1,  # the last is the null label
)
model = Adapter(unet, digits.num_classes)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
guidance = Guidance(omega=1.0, kappa=0.2)  # fixed in training: a scale of ω / (1 - κ) = 1.25

with Batches(digits, batch_size=arguments.batch, seed=0) as batches:
    for step in range(arguments.steps):
        x, y = next(batches)
        draws = imf.Draws.sample(x, seed=0, step=step)
        loss = mean_flow(model, x, y, draws, guidance=guidance, tangent="v_c")
        optimizer.zero_grad()
        loss.loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == arguments.steps - 1:
            print(f"step {step}: loss_u {loss.loss_u:.3f} (lower is better)")

samples = imf.generate(model, torch.randn(10, 1, 8, 8), torch.arange(10))
print(f"{len(samples)} samples in one step, mean {samples.mean():.2f} (data: {digits.images.mean():.2f})")

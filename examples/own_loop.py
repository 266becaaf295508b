"""Train iMF on scikit-learn's digits in a loop of your own: `python examples/own_loop.py`."""

import argparse

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import imf
from imf.data import load
from imf.sampling import draw_grid

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--epochs", type=int, default=40)
parser.add_argument("--out", default="digits.png")
arguments = parser.parse_args()

digits = load("digits")  # images [1797, 1, 8, 8] in [-1, 1], labels [1797]
loader = DataLoader(TensorDataset(digits.images, digits.labels), batch_size=128, shuffle=True, drop_last=True)
shape = {"hidden_size": 96, "depth": 5, "num_heads": 2, "aux_head_depth": 2}
model = imf.build(imf.IMFConfig(input_size=8, in_channels=1, num_classes=10, **shape))
average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0)

step = 0
for epoch in range(arguments.epochs):
    for x, y in loader:
        draws = imf.Draws.sample(x, seed=0, step=step, std=1.6, omega_exponent=3.0)
        loss = imf.improved_mean_flow(model, x, y, draws)
        optimizer.zero_grad()
        loss.loss.backward()
        optimizer.step()
        average.update_parameters(model)
        step += 1
    print(f"epoch {epoch}: loss_u {loss.loss_u:.3f}, loss_v {loss.loss_v:.3f} (lower is better)")

noise, labels = torch.randn(100, 1, 8, 8), torch.arange(10).repeat_interleave(10)
draw_grid(imf.generate(average, noise, labels, omega=1.3, t_min=0.2, t_max=0.8), 10).save(arguments.out)

"""A training step on a GPU, its operations on their default backends, against the CPU's."""

import copy
import dataclasses

import pytest
import torch

from imf.model.config import IMFConfig
from imf.networks import build
from imf.objective.draws import Draws
from imf.objective.imf_loss import improved_mean_flow
from tests.helpers.backends import ON_GPU

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a GPU")]


def test_loss_and_gradients_are_those_of_the_cpu():
    torch.manual_seed(0)
    config = IMFConfig(4, 2, 3, 32, 3, 2, 1, 8 / 3, 5)
    model = build(config)
    with torch.no_grad():  # a fresh network's heads are zero
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    images, labels = torch.randn(6, 3, 4, 4), torch.randint(0, 5, (6,))
    draws = Draws.sample(images, seed=0, step=0)

    def step(device):
        network = copy.deepcopy(model).to(device)
        there = dataclasses.replace(draws, noise=draws.noise.to(device))  # the others stay, as in training
        loss = improved_mean_flow(network, images.to(device), labels.to(device), there).loss
        loss.backward()
        return {"loss": loss.detach(), **{n: p.grad for n, p in network.named_parameters()}}

    wanted, got = step("cpu"), step("cuda")
    for name, x in wanted.items():
        torch.testing.assert_close(
            got[name].cpu(), x, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )

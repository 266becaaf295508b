"""One training step of the digits' network: ours, the same objective in the official program's form, and the
official step written plainly with `torch.func.jvp`. Forward and backward, no optimizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import plain_imf
import pytest
import torch

from imf.config import DIGITS_NETWORK
from imf.convert import from_official
from imf.model import build
from imf.objective import Draws, improved_mean_flow, improved_mean_flow_plain

BATCH = 128


def steps(precision: str) -> dict[str, Callable[[], Any]]:
    """The step in each form, on the same weights and draws; a call returns the loss."""
    torch.manual_seed(0)
    oracle = plain_imf.PlainIMF(**dataclasses.asdict(DIGITS_NETWORK))
    with torch.no_grad():  # a fresh network's heads are zero, and so are its losses' differences
        for parameter in oracle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model = build(DIGITS_NETWORK)
    model.load_state_dict(from_official(oracle.state_dict()))
    model.compute_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    c = DIGITS_NETWORK
    x = torch.randn(BATCH, c.in_channels, c.input_size, c.input_size)
    y = torch.randint(0, c.num_classes, (BATCH,))
    draws = Draws.sample(x, seed=0, step=0)

    def step(form: Any, network: torch.nn.Module) -> Callable[[], Any]:
        def run() -> float:
            network.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16" and network is oracle):
                loss = form(network, x, y, draws).loss
            loss.backward()
            return float(loss.detach())

        return run

    return {
        "ours": step(improved_mean_flow, model),
        "ours, official form": step(improved_mean_flow_plain, model),
        "torch.func.jvp": step(plain_imf.official_step, oracle),
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("form", ["ours", "ours, official form", "torch.func.jvp"])
def test_step(benchmark, form, precision):
    benchmark.group = f"training step, digits, {precision}"
    runs = steps(precision)
    assert runs[form]() == pytest.approx(runs["torch.func.jvp"](), rel=1e-5 if precision == "fp32" else 1e-2)
    benchmark.pedantic(runs[form], rounds=7, warmup_rounds=2, iterations=1)

"""Weights as products take them: rounded once in a step, the MLP's padded, with the same result."""

import dataclasses

import pytest
import torch
import torch._dynamo.testing

import imf_kernels as ik
from imf.mean_flow.methods import METHODS
from imf.mean_flow.objective import objective
from imf.model.cast_weights import ALIGNMENT, cast_once, cast_weight
from imf.model.imf import Block
from imf.objective.draws import Draws, Guidance
from tests.helpers.tiny_run import NETWORK, perturbed

ODD = dataclasses.replace(NETWORK, hidden_size=32, mlp_ratio=1.35)  # 43 hidden channels


def step_of(method, dtype=torch.bfloat16):
    """Loss and gradients of a step of a network whose weights are not zero."""
    model = perturbed(method, ODD)
    model.compute_dtype = dtype
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8)
    loss = objective(method, Guidance())(model, x, y, Draws.sample(x, seed=0, step=0)).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_a_step_rounds_each_weight_once_with_the_same_gradients(method, monkeypatch):
    rounded, real = [], torch.Tensor.to

    def to(self, *args, **kwargs):
        if isinstance(self, torch.nn.Parameter) and self.dim() == 2 and args == (torch.bfloat16,):
            rounded.append(id(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    with cast_once():  # as an objective does on a GPU
        loss, gradients = step_of(method)
    assert 0 < len(rounded) == len(set(rounded))
    rounded.clear()
    again, others = step_of(method)
    assert len(rounded) > len(set(rounded))
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_padding_the_mlp_changes_nothing_but_its_width(dtype, monkeypatch):
    torch.manual_seed(0)
    block, x = Block(ODD), torch.randn(2, 5, 32)
    with torch.no_grad():
        block.attn_scale.fill_(1.0)
        block.mlp_scale.fill_(1.0)
    results, widths, real = [], [], torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, w, b=None: (widths.append(w.shape), real(x, w, b))[1]
    )
    for pads in (True, False):
        if not pads:
            monkeypatch.setattr("imf.model.cast_weights.ALIGNMENT", 1)
        block.zero_grad()
        angles = torch.zeros(5, 16)
        with ik.use_backend("reference"):
            y = block(x, angles.cos(), angles.sin(), dtype)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in block.parameters())])
    assert (2 * 48, 32) in widths and (32, 48) in widths and 48 % ALIGNMENT == 0
    assert (2 * 43, 32) in widths and (32, 43) in widths
    for padded, exact in zip(*results, strict=True):
        assert padded.shape == exact.shape
        error = (padded - exact).norm() / exact.norm()
        assert error < 2 * torch.finfo(dtype).eps  # sums of other lengths round otherwise
    assert [p.shape for p in (block.gate_up, block.down)] == [(86, 32), (32, 43)]


def test_a_weight_is_made_anew_outside_and_in_the_next_block():
    weight = torch.nn.Parameter(torch.ones(2, 3))
    with cast_once():
        with torch.no_grad():
            first = cast_weight(weight, torch.bfloat16)
        assert cast_weight(weight, torch.bfloat16) is first and first.requires_grad
        assert cast_weight(weight, torch.float16) is not first
    with torch.no_grad():
        weight.add_(1)
    with cast_once():
        assert cast_weight(weight, torch.bfloat16).tolist() == [[2.0] * 3] * 2
        assert cast_weight(weight, None) is weight is cast_weight(weight, torch.float32)
    assert cast_weight(weight, torch.bfloat16) is weight  # the product rounds it
    first.sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.tolist() == [[1.0] * 3] * 2


def test_blocks_of_a_network_share_a_graph_when_compiled():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    x, angles = torch.randn(2, 5, 32), torch.zeros(5, 16)
    with cast_once(), torch.no_grad():
        for _ in range(10):  # more than PyTorch compiles a function for
            block = Block(ODD)
            run = torch.compile(block.forward, fullgraph=True, backend=counter)
            with ik.use_backend("reference"):
                run(x, angles.cos(), angles.sin(), torch.bfloat16)
    assert counter.frame_count <= 2

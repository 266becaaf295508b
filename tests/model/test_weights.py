"""Weights as products take them: rounded once in a step, the MLP's padded, with the same result."""

import contextlib
import dataclasses

import pytest
import torch
import torch._dynamo.testing

import imf_kernels as ik
from imf.mean_flow.methods import METHODS, guidance_of
from imf.mean_flow.objective import objective
from imf.model.cast_weights import ALIGNMENT, DOWN, GATE_UP, cast_once, cast_weights
from imf.model.imf import Block
from imf.objective.draws import Draws, Guidance
from tests.helpers.tiny_run import NETWORK, perturbed

ODD = dataclasses.replace(NETWORK, hidden_size=32, mlp_ratio=1.35)  # 43 hidden channels


def step_of(method, dtype=torch.bfloat16):
    """Loss and gradients of a step of a network whose weights are not zero."""
    model = perturbed(method, ODD)
    model.compute_dtype = dtype
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8)
    loss = objective(method, guidance_of(model.config, Guidance()), teacher=model)(
        model, x, y, Draws.sample(x, seed=0, step=0)
    ).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_a_step_rounds_each_weight_once_with_the_same_gradients(method, monkeypatch):
    rounded, at_use, copy, to = [], [], torch._foreach_copy_, torch.Tensor.to

    def counted_copy(targets, sources):
        rounded.extend(x.data_ptr() for x in sources if x.dtype == torch.float32)
        copy(targets, sources)

    def counted_to(self, *args, **kwargs):
        if isinstance(self, torch.nn.Parameter) and self.dim() == 2 and args == (torch.bfloat16,):
            at_use.append(id(self))
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch, "_foreach_copy_", counted_copy)
    monkeypatch.setattr(torch.Tensor, "to", counted_to)
    with cast_once():  # as an objective does on a GPU
        loss, gradients = step_of(method)
    assert 0 < len(rounded) == len(set(rounded)) and len(at_use) == len(set(at_use))
    rounded.clear(), at_use.clear()
    again, others = step_of(method)
    assert not rounded and len(at_use) > len(set(at_use))
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        if METHODS[method].flow_map:  # the sum of gradients through u and ∂u/∂r is rounded too
            error = (gradient - others[name]).norm() / others[name].norm()
            assert error <= torch.finfo(torch.bfloat16).eps, name
        else:
            assert torch.equal(gradient, others[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_padding_the_mlp_changes_nothing_but_its_width(dtype, monkeypatch):
    torch.manual_seed(0)
    block, x = Block(ODD), torch.randn(2 * 5, 32)
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


@pytest.mark.parametrize("requires_grad", [True, False])
def test_rounded_at_once_and_at_each_use_pad_alike(requires_grad):
    weights = [torch.randn(*shape, requires_grad=requires_grad) for shape in ((86, 32), (32, 43), (8, 8))]
    gradients = [torch.randn(*shape).bfloat16() for shape in ((96, 32), (32, 48), (8, 8))]
    results = []
    for context in (cast_once(), contextlib.nullcontext()):
        with context:
            made = cast_weights(torch.bfloat16, *weights, padding=(GATE_UP, DOWN, None))
        made = [x.bfloat16() for x in made]
        if requires_grad:
            results.append([*made, *torch.autograd.grad(made, weights, gradients)])
        else:
            results.append(made)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_weight_is_made_anew_outside_and_in_the_next_block():
    weight = torch.nn.Parameter(torch.ones(2, 3))
    with cast_once():
        with torch.no_grad():
            (first,) = cast_weights(torch.bfloat16, weight)
        assert cast_weights(torch.bfloat16, weight)[0] is first and first.requires_grad
        assert cast_weights(torch.float16, weight)[0] is not first
    with torch.no_grad():
        weight.add_(1)
    with cast_once():
        assert cast_weights(torch.bfloat16, weight)[0].tolist() == [[2.0] * 3] * 2
        assert cast_weights(None, weight)[0] is weight is cast_weights(torch.float32, weight)[0]
    assert cast_weights(torch.bfloat16, weight)[0] is weight  # the product rounds it
    first.sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.tolist() == [[1.0] * 3] * 2


def test_blocks_of_a_network_share_a_graph_when_compiled():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    x, angles = torch.randn(2 * 5, 32), torch.zeros(5, 16)
    with cast_once(), torch.no_grad():
        for _ in range(10):  # more than PyTorch compiles a function for
            block = Block(ODD)
            run = torch.compile(block.forward, fullgraph=True, backend=counter)
            with ik.use_backend("reference"):
                run(x, angles.cos(), angles.sin(), torch.bfloat16)
    assert counter.frame_count <= 2

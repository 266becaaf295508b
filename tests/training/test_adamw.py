"""The trainer's AdamW is PyTorch's fused one, bit for bit."""

import pytest
import torch

from imf.training.adamw import AdamW


@pytest.mark.parametrize("dtypes", [[torch.float32] * 3, [torch.float32, torch.float64, torch.float32]])
def test_updates_and_state_are_pytorchs(dtypes):
    """Also of a weight without a gradient in some steps, and of a step that the gate stops."""
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    torch.manual_seed(0)
    weights = [
        torch.nn.Parameter(torch.randn(n, dtype=dtype))
        for n, dtype in zip((3, 17, 1000), dtypes, strict=True)
    ]
    others = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    found_inf = torch.zeros(())
    ours, theirs = AdamW(weights, found_inf, **options), torch.optim.AdamW(others, fused=True, **options)
    theirs.found_inf = found_inf
    for step in range(6):
        found_inf.fill_(step == 4)
        for number, (w, other) in enumerate(zip(weights, others, strict=True)):
            w.grad = None if (number, step) in ((1, 0), (2, 2)) else torch.randn_like(w)
            other.grad = w.grad
        for optimizer in (ours, theirs):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (1 + step)
            optimizer.step()
        for w, other in zip(weights, others, strict=True):
            assert torch.equal(w, other)
            assert ours.state[w].keys() == theirs.state[other].keys()
            assert all(torch.equal(x, theirs.state[other][name]) for name, x in ours.state[w].items())
    assert ours.state[weights[2]]["step"] == 4

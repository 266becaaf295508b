"""Parity with the official program, to the digit that fp32 allows."""

import pytest
import torch

from imf.objective.imf_loss import improved_mean_flow
from imf.official.names import from_flax
from tests.helpers import golden_imf


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_objective_equals_the_official_programs(backend):
    model = golden_imf.network(backend)
    x, y, draws = golden_imf.batch()
    result = improved_mean_flow(model, x, y, draws)
    result.loss.backward()

    for name in ("u", "v", "v_g"):
        assert relative(getattr(result, name), golden_imf.images(name)) < 1e-5, name
    # The less-work form leaves out the derivative on the FM rows, where it has no effect.
    rows = slice(draws.n_fm, None)
    assert relative(result.du_dt[rows], golden_imf.images("du_dt")[rows]) < 1e-5
    for name in ("loss", "loss_u", "loss_v"):
        assert float(getattr(result, name).detach()) == pytest.approx(
            float(golden_imf.arrays()[f"out.{name}"]), rel=1e-5
        )
    gradients = from_flax(golden_imf.weights("grad"))
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, gradients[name]) < 1e-5, name


def test_tangent_is_the_conditional_velocity():
    """The official program hands (v_c, 1, 0) to its JVP; on non-FM rows ours is the same."""
    model = golden_imf.network("cpu")
    seen = []
    forward = model.forward
    model.forward = lambda z, *args, **kwargs: seen.append(z) or forward(z, *args, **kwargs)
    x, y, draws = golden_imf.batch()
    improved_mean_flow(model, x, y, draws)
    (z,) = [z for z in seen if not isinstance(z, torch.Tensor)]
    assert relative(z.primal, golden_imf.images("z")) < 1e-6
    assert len(z.tangent_rows) == len(x) - draws.n_fm
    assert relative(z.tangent_rows, golden_imf.images("tangent_z")[draws.n_fm :]) < 1e-5

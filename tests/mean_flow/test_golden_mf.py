"""Parity with the official program of original Mean Flows, to the digit that fp32 allows."""

import pytest
import torch

from imf.mean_flow.objective import mean_flow
from imf.official.names import from_flax
from imf.program import UserError
from tests.helpers import golden_mf
from tests.objective.test_golden import relative


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_objective_equals_the_official_programs(backend):
    model = golden_mf.network(backend)
    x, y, draws = golden_mf.batch()
    result = mean_flow(model, x, y, draws, guidance=golden_mf.settings()[1])
    result.loss.backward()

    for name in ("u", "v_g"):
        assert relative(getattr(result, name), golden_mf.images(name)) < 1e-5, name
    # The less-work form leaves out the derivative on the FM rows, where it has no effect.
    rows = slice(draws.n_fm, None)
    assert relative(result.du_dt[rows], golden_mf.images("du_dt")[rows]) < 1e-5
    arrays = golden_mf.arrays()
    assert float(result.loss.detach()) == pytest.approx(float(arrays["out.loss"]), rel=1e-5)
    # The program watches Σ (u − v_t)² a row; here it is the mean over all elements.
    assert float(result.loss_v) == pytest.approx(float(arrays["out.v_loss"].mean()) / x[0].numel(), rel=1e-5)
    gradients = from_flax(golden_mf.weights("grad"))
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, gradients[name]) < 1e-5, name


def test_tangent_is_the_guided_velocity():
    """The official program hands (v_g, 1, 0) to its JVP; on non-FM rows ours is the same."""
    model, seen = golden_mf.network("cpu"), []
    forward = model.forward
    model.forward = lambda *args, **kwargs: seen.append(args) or forward(*args, **kwargs)
    x, y, draws = golden_mf.batch()
    mean_flow(model, x, y, draws, guidance=golden_mf.settings()[1])
    (z, t, h, *_, labels), *others = [args for args in seen if not isinstance(args[0], torch.Tensor)]
    assert not others
    assert relative(z.primal, golden_mf.images("z")) < 1e-6
    assert relative(z.tangent_rows, golden_mf.images("tangent_z")[draws.n_fm :]) < 1e-5
    assert torch.equal(t.primal, draws.t) and torch.equal(h.primal, draws.t - draws.r)
    assert t.tangent_rows.tolist() == h.tangent_rows.tolist() == [1.0] * (len(x) - draws.n_fm)
    assert labels.tolist() == golden_mf.arrays()["y_dropped"].tolist()


def test_wrong_names_are_refused():
    arrays = golden_mf.weights()
    with pytest.raises(UserError, match="'net/blocks/layers_0/attn/kv/kernel' is no weight of the"):
        from_flax(arrays | {"net/blocks/layers_0/attn/kv/kernel": arrays.popitem()[1]})
    with pytest.raises(ValueError, match="wanted the weights of an official iMF or MF network, got none"):
        from_flax({})

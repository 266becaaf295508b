"""Objectives of Mean Flows and of the steps to iMF: each equals a plain program, in every corner."""

import dataclasses

import pytest
import torch

from imf.mean_flow.methods import METHODS, network_of
from imf.mean_flow.objective import mean_flow, objective
from imf.networks import build
from imf.objective.draws import Draws, Guidance
from imf.objective.imf_loss import improved_mean_flow
from tests.helpers import plain_mf
from tests.mean_flow.test_dit import TINY, network
from tests.objective.test_objective import draws_for

GUIDANCE = [
    Guidance(1.0, 0.5, 0.0, 0.75),
    Guidance(0.2, 0.92),
    Guidance(2.0, 0.0),
    Guidance(0.5, 0.5, 0.3, 0.6),
]
CASES = [
    *((case, 5) for case in ("as drawn", "more dropped than FM", "all FM")),
    *(
        pytest.param(case, size, marks=pytest.mark.slow)
        for case in ("dropped ones scattered", "t = r by chance", "no FM", "as drawn")
        for size in (1, 5)
        if (case, size) != ("as drawn", 5)
    ),
]


def batch(size: int, case: str, method: str):
    torch.manual_seed(size)
    x, y = torch.randn(size, 3, 4, 4), torch.randint(0, TINY.num_classes, (size,))
    draws = draws_for(case, x)
    if not METHODS[method].interval_input:
        draws = dataclasses.replace(draws, t_min=torch.zeros(size), t_max=torch.ones(size))
    return x, y, draws


@pytest.mark.parametrize(("case", "size"), CASES)
@pytest.mark.parametrize("method", [n for n, m in METHODS.items() if m.block == "plain" and not m.flow_map])
def test_equals_the_plain_program(method, case, size):
    x, y, draws = batch(size, case, method)
    model, free = network(method, "cpu"), METHODS[method].omega_input
    for guidance in [None] if free else GUIDANCE:
        expected, u, v_g, du_dt = plain_mf.step(
            model, x, y, draws, guidance, "v_g" if method == "mf" else "v_c"
        )
        gradients = dict(
            zip(model.state_dict(), torch.autograd.grad(expected, model.parameters()), strict=True)
        )
        model.zero_grad()
        result = objective(method, guidance)(model, x, y, draws)
        result.loss.backward()
        torch.testing.assert_close(result.loss, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result.u, u, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result.v_g, v_g, rtol=1e-4, atol=1e-5)
        rows = slice(draws.n_fm, None)
        torch.testing.assert_close(result.du_dt[rows], du_dt[rows], rtol=1e-4, atol=2e-5)
        for name, parameter in model.named_parameters():
            error = (parameter.grad - gradients[name]).norm() / gradients[name].norm().clamp(min=1e-5)
            assert error < 1e-4, name


def rows_of_calls(objective, guidance: Guidance, drop: int) -> list[tuple[int, int | None]]:
    """Of each call of the network in the less-work form: its rows, and those with a tangent."""
    model, calls = build(network_of("mf", TINY)), []
    forward = model.forward

    def spy(z, *args, **kwargs):
        calls.append((z.shape[0], len(z.tangent_rows) if not isinstance(z, torch.Tensor) else None))
        return forward(z, *args, **kwargs)

    model.forward = spy
    x, y = torch.randn(8, 3, 4, 4), torch.randint(0, 5, (8,))
    draws = dataclasses.replace(
        Draws.sample(x, seed=3, step=7, fm_fraction=0.75, interval=False), drop=torch.arange(8) < drop
    )
    objective(model, x, y, draws, guidance=guidance)
    return calls


def test_less_work_means_fewer_rows():
    """v_c on the 2 rows behind the FM rows, v_u on those that are not dropped, a tangent on 2 of 8."""
    assert rows_of_calls(mean_flow, Guidance(1.0, 0.5), drop=1) == [(2 + 7, None), (8, 2)]
    assert rows_of_calls(mean_flow, Guidance(0.5, 0.5), drop=1) == [(2, None), (8, 2)]
    assert rows_of_calls(mean_flow, Guidance(2.0, 0.0), drop=1) == [(7, None), (8, 2)]
    assert rows_of_calls(mean_flow, Guidance(1.0, 0.0), drop=1) == [(8, 2)]
    assert rows_of_calls(improved_mean_flow, Guidance(1.0, 0.0), drop=1) == [(2, None), (8, 2)]


def test_what_does_not_fit_is_refused():
    model, (x, y, draws) = network("mf"), batch(4, "as drawn", "mf")
    with pytest.raises(ValueError, match="mean_flow: guidance is fixed: model must not have it as an input"):
        mean_flow(network("imf-omega"), x, y, draws, guidance=Guidance())
    with pytest.raises(ValueError, match=r"mean_flow: x must be \[4, 3, 4, 4\] .* got \[3, 3, 4, 4\]"):
        mean_flow(model, x[:3], y, draws, guidance=Guidance())
    for change, message in (
        ({"omega": 0.0}, "omega must be above 0 and finite, got 0.0"),
        ({"kappa": 1.0}, r"kappa must be in \[0, 1\), got 1.0"),
        ({"t_min": -0.1}, r"t_min must be in \[0, 1\], got -0.1"),
        ({"t_min": 0.5, "t_max": 0.4}, r"t_max must be in \[t_min, 1\] = \[0.5, 1\], got 0.4"),
    ):
        with pytest.raises(ValueError, match=f"Guidance: {message}"):
            Guidance(**change)

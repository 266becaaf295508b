"""The objective equals an independent plain program, in every corner."""

import dataclasses
import math

import pytest
import torch

import imf_kernels as ik
from benchmarks.baselines import plain_imf
from imf.mean_flow.methods import network_of
from imf.model.config import IMFConfig
from imf.networks import build
from imf.objective.draws import Draws, StepDraws, repeated
from imf.objective.imf_loss import improved_mean_flow, instantaneous_velocities
from imf.official.names import from_official

CONFIG = IMFConfig(
    input_size=4,
    patch_size=2,
    in_channels=3,
    hidden_size=32,
    depth=3,
    num_heads=2,
    aux_head_depth=1,
    num_classes=5,
)


def perturbed_oracle(seed: int = 0) -> plain_imf.PlainIMF:
    """A plain network whose zero-initialised weights are not zero."""
    torch.manual_seed(seed)
    oracle = plain_imf.plain(CONFIG)
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return oracle


def draws_for(case: str, x: torch.Tensor) -> Draws:
    draws = Draws.sample(x, seed=3, step=7)
    batch, rows = x.shape[0], torch.arange(x.shape[0])
    changes = {
        "as drawn": {},
        "no row dropped": {"drop": torch.zeros(batch, dtype=torch.bool)},
        "more dropped than FM": {"drop": rows < min(batch, draws.n_fm + 2)},
        "all dropped": {"drop": torch.ones(batch, dtype=torch.bool)},
        "dropped ones scattered": {"drop": rows % 2 == 1},
        "omega 1": {"omega": torch.ones(batch)},
        "t = r by chance": {"r": torch.where(rows % 2 == 0, draws.t, draws.r)},
        "t on the edge of the interval": {
            "t_min": torch.where(rows < draws.n_fm, 0.0, draws.t),
            "t_max": torch.where(rows < draws.n_fm, 1.0, draws.t),
        },
        "all FM": {"n_fm": batch, "r": draws.t, "t_min": torch.zeros(batch), "t_max": torch.ones(batch)},
        "no FM": {"n_fm": 0},
    }
    return dataclasses.replace(draws, **changes[case])


CASES = [
    "as drawn",
    "no row dropped",
    "more dropped than FM",
    "all dropped",
    "dropped ones scattered",
    "omega 1",
    "t = r by chance",
    "t on the edge of the interval",
    "all FM",
    "no FM",
]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("batch", [1, 2, 5, 8])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_program(case, batch, backend):
    oracle = perturbed_oracle()
    model = build(CONFIG)
    model.forward = ik.use_backend(backend)(model.forward)
    model.load_state_dict(from_official(oracle.state_dict()))
    x, y = torch.randn(batch, 3, 4, 4), torch.randint(0, CONFIG.num_classes, (batch,))
    draws = draws_for(case, x)

    expected = plain_imf.official_step(oracle, x, y, draws)
    expected.loss.backward()
    gradients = from_official({name: p.grad for name, p in oracle.named_parameters()})
    result = improved_mean_flow(model, x, y, draws)
    result.loss.backward()
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-5, atol=1e-6)
    for name in ("loss_u", "loss_v", "u", "v", "v_g"):
        torch.testing.assert_close(
            getattr(result, name), getattr(expected, name).detach(), rtol=1e-4, atol=1e-5, msg=name
        )
    rows = slice(draws.n_fm, None)
    torch.testing.assert_close(result.du_dt[rows], expected.du_dt[rows], rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        error = (parameter.grad - gradients[name]).norm() / gradients[name].norm().clamp(min=1e-6)
        assert error < 1e-5, name


def test_less_work_means_fewer_rows():
    """No tangent on FM rows, no v_u where it is not read, no head that is not read."""
    model, calls = build(CONFIG), []
    forward = model.forward

    def spy(z, *args, heads):
        calls.append((heads, len(z.shape) and z.shape[0], getattr(z, "tangent_rows", None)))
        return forward(z, *args, heads=heads)

    model.forward = spy
    x, y = torch.randn(8, 3, 4, 4), torch.randint(0, 5, (8,))
    draws = dataclasses.replace(
        draws_for("no row dropped", x), omega=torch.tensor([1.0, 2, 1, 2, 2, 2, 2, 2])
    )
    improved_mean_flow(model, x, y, draws)
    inside = (draws.t_min <= draws.t) & (draws.t <= draws.t_max)
    (guidance, rows, _), (network, batch, tangent) = calls
    assert (guidance, network) == ("v", "uv")
    assert rows == 4 + int((inside & (draws.omega != 1)).sum())
    assert (batch, len(tangent)) == (8, 4)


class Numbered(torch.nn.Module):
    """A network whose output is the number of the row in its batch."""

    config = CONFIG

    def forward(self, z, *conditions, heads):
        return torch.arange(len(z), dtype=z.dtype)[:, None, None, None].expand_as(z)


@pytest.mark.parametrize("repeats", [0, 1, 5])
def test_of_equal_rows_the_first_one_counts(repeats):
    """A GPU writes the copies of a row in any order, and its products may round equal rows differently."""
    x, y = torch.randn(16, 3, 4, 4), torch.zeros(16, dtype=torch.int64)
    step = StepDraws.of(draws_for("no FM", x), None, x.device)
    distinct = torch.tensor([2, 5, 9])
    step = dataclasses.replace(step, u_rows=repeated(distinct, 3 + repeats))
    _, v_u = instantaneous_velocities(Numbered(), x, y, step, step.c_rows, head="v")
    assert v_u[:, 0, 0, 0][distinct].tolist() == [16, 17, 18]
    assert v_u.count_nonzero() == 3 * x[0].numel()


def test_gradient_flows_through_the_primal_alone():
    """With u and v held, the derivative, v_c, v_u and v_g are constants of the loss."""
    model = build(CONFIG)
    x, y = torch.randn(4, 3, 4, 4), torch.randint(0, 5, (4,))
    result = improved_mean_flow(model, x, y, Draws.sample(x, seed=0, step=0))
    for name in ("loss_u", "loss_v", "u", "v", "du_dt", "v_g"):
        assert not getattr(result, name).requires_grad, name
    assert result.loss.requires_grad


def test_draws_are_a_function_of_seed_step_and_process():
    x = torch.zeros(16, 1, 8, 8)
    first = Draws.sample(x, seed=1, step=2, process=3)
    again = Draws.sample(x, seed=1, step=2, process=3)
    assert all(
        torch.equal(getattr(first, n), getattr(again, n)) for n in ("t", "r", "noise", "omega", "drop")
    )
    for other in ({"seed": 2}, {"step": 3}, {"process": 4}):
        changed = Draws.sample(x, **{"seed": 1, "step": 2, "process": 3, **other})
        assert not torch.equal(first.noise, changed.noise), other


def test_draws_have_the_published_distribution():
    x = torch.zeros(200_000, 1, 1, 1)
    draws = Draws.sample(x, seed=0, step=0)
    fm, rest = slice(0, draws.n_fm), slice(draws.n_fm, None)
    assert draws.n_fm == 100_000
    assert torch.equal(draws.t[fm], draws.r[fm]) and bool((draws.r[rest] < draws.t[rest]).any())
    assert torch.equal(draws.t_min[fm], torch.zeros(100_000)) and torch.equal(
        draws.t_max[fm], torch.ones(100_000)
    )
    assert (
        draws.t_min.min() >= 0
        and draws.t_min.max() <= 0.5 <= draws.t_max[rest].min()
        and draws.t_max.max() <= 1
    )
    assert float(draws.omega.log().mean()) == pytest.approx(math.log(8) / 2, rel=0.01)
    assert draws.omega.min() >= 1 and draws.omega.max() <= 8
    assert float(draws.drop.float().mean()) == pytest.approx(0.1, rel=0.05)
    assert draws.drop[: int(draws.drop.sum())].all()  # the dropped rows are the first ones
    # Over max and min of two normal draws together, mean and variance are those of the normal.
    pairs = torch.cat([draws.t[rest].logit(), draws.r[rest].logit()])
    assert float(pairs.mean()) == pytest.approx(-0.4, abs=0.02) and float(pairs.std()) == pytest.approx(
        1.0, rel=0.02
    )


def test_the_last_rows_go_all_the_way_to_data_and_nothing_else_changes():
    x = torch.zeros(10, 1, 2, 2)
    plain, draws = (Draws.sample(x, seed=0, step=0, r0_fraction=share) for share in (0.0, 0.25))
    assert torch.equal(draws.r, torch.cat([plain.r[:8], torch.zeros(2)])) and bool((plain.r[8:] > 0).all())
    for name in ("t", "noise", "omega", "t_min", "t_max", "drop"):
        assert torch.equal(getattr(draws, name), getattr(plain, name))
    everything = Draws.sample(x, seed=0, step=0, fm_fraction=0.7, r0_fraction=0.3)  # 1 up to rounding
    assert int((everything.r == 0).sum()) == 3 and everything.n_fm == 7


@pytest.mark.parametrize("exponent", [0.5, 2.0])
def test_omega_has_the_density_it_is_given(exponent):
    draws = Draws.sample(torch.zeros(200_000, 1, 1, 1), seed=0, step=0, omega_exponent=exponent)
    grid = torch.linspace(1, 8, 100_001, dtype=torch.float64)
    density = grid**-exponent
    expected = float((grid * density).sum() / density.sum())
    assert float(draws.omega.mean()) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t": torch.zeros(3)}, r"t must be \[4\] of torch.float32 on cpu, got \[3\] of"),
        ({"t": [0.0] * 4}, r"t must be \[4\] of torch.float32 on cpu, got a list"),
        ({"r": torch.zeros(4, dtype=torch.int64)}, r"r must be .* got \[4\] of torch.int64"),
        ({"drop": torch.zeros(4)}, r"drop must be \[4\] of torch.bool on cpu, got .*float32"),
        ({"drop": torch.zeros(4, dtype=torch.bool, device="meta")}, "drop must be .* on meta"),
        ({"noise": torch.zeros(())}, r"noise must be \[B, C, H, W\] of floating-point type, got \[\]"),
        ({"noise": torch.zeros(4, 2)}, r"noise must be \[B, C, H, W\]"),
        ({"noise": torch.zeros(4, 1, 2, 2, dtype=torch.int64)}, "noise must be .*int64"),
        ({"n_fm": 5}, "n_fm must be an int within 0 and the batch of 4, got 5"),
        ({"n_fm": True}, "n_fm must be an int within 0 and the batch of 4, got True"),
        ({"r": torch.zeros(4)}, "r must equal t on the first n_fm rows, not so in row 0"),
        ({"t": torch.full((4,), 5.0), "n_fm": 0}, "0 <= r <= t <= 1, not so in row 0"),
        ({"t": torch.full((4,), math.nan), "n_fm": 0}, "0 <= r <= t <= 1"),
        ({"r": torch.full((4,), -3.0), "n_fm": 0}, "0 <= r <= t <= 1"),
        (
            {"omega": torch.tensor([1.0, 1, math.nan, 1])},
            "omega must be positive and finite, not so in row 2",
        ),
        ({"omega": torch.tensor([1.0, 0, 1, 1])}, "omega must be positive and finite, not so in row 1"),
        ({"t_min": torch.full((4,), 2.0)}, "the guidance interval must lie in"),
        ({"t_min": torch.ones(4), "t_max": torch.zeros(4), "n_fm": 0}, "the guidance interval must lie in"),
        ({"t_max": torch.full((4,), 0.5)}, r"the guidance interval of the first n_fm rows must be \(0, 1\)"),
    ],
)
def test_draws_that_contradict_themselves_are_refused(change, message):
    draws = Draws.sample(torch.zeros(4, 1, 2, 2), seed=0, step=0)
    with pytest.raises((ValueError, TypeError), match=message):
        dataclasses.replace(draws, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"omega_max": 0.5}, "omega_max must be finite and at least 1, got 0.5"),
        ({"omega_max": 0}, "omega_max must be finite and at least 1, got 0"),
        ({"omega_exponent": -1000.0}, "omega_exponent must be such that .* e .* 80, got -1000.0"),
        ({"drop_probability": 2}, r"drop_probability must be in \[0, 1\], got 2"),
        ({"fm_fraction": 1.5}, r"fm_fraction must be in \[0, 1\], got 1.5"),
        ({"fm_fraction": math.nan}, r"fm_fraction must be in \[0, 1\], got nan"),
        ({"r0_fraction": 0.6}, "r0_fraction must be at least 0, and at most 1 with fm_fraction 0.5, got 0.6"),
        ({"r0_fraction": -0.1}, "r0_fraction must be at least 0, .* got -0.1"),
        ({"r0_fraction": math.nan}, "r0_fraction must be at least 0, .* got nan"),
        ({"std": -1}, "std must be at least 0, got -1"),
        ({"mean": math.nan}, "mean must be finite, got nan"),
        ({"step": -1}, "step must be an integer of at least 0, got -1"),
        ({"seed": 0.5}, "seed must be an integer of at least 0, got 0.5"),
        ({"x": torch.zeros(4)}, r"x must be \[B, C, H, W\], got \[4\]"),
    ],
)
def test_draws_from_arguments_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=rf"Draws\.sample: {message}"):
        Draws.sample(**{"x": torch.zeros(4, 1, 2, 2), "seed": 0, "step": 0, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 3, 4, 4)}, r"x must be \[4, 3, 4, 4\] .* like draws.noise, got \[3, 3, 4, 4\]"),
        ({"x": torch.zeros(4, 3, 4, 4, dtype=torch.int64)}, "x must be .* got .*torch.int64"),
        ({"x": torch.zeros(4, 3, 4, 4).numpy()}, "x must be .* got a ndarray"),
        ({"y": torch.zeros(3, dtype=torch.int64)}, r"y must be \[4\] of torch.int64 .* got \[3\]"),
        ({"y": torch.zeros(4, dtype=torch.uint8)}, r"y must be .* got \[4\] of torch.uint8"),
        ({"y": [0, 0, 0, 0]}, "y must be .* got a list"),
        ({"y": torch.full((4,), 5)}, "labels must be within 0 and 4 .* got 5 to 5"),
        ({"y": torch.full((4,), -1)}, "labels must be within 0 and 4 .* got -1 to -1"),
        ({"draws": None}, "draws must be a Draws, got a NoneType"),
        ({"guidance": 3}, "guidance must be a Guidance or None, got a int"),
    ],
)
def test_batches_that_do_not_fit_are_refused(change, message):
    x = torch.zeros(4, 3, 4, 4)
    batch = {"x": x, "y": torch.zeros(4, dtype=torch.int64), "draws": Draws.sample(x, seed=0, step=0)}
    with pytest.raises((ValueError, TypeError), match=f"improved_mean_flow: {message}"):
        improved_mean_flow(build(CONFIG), **(batch | change))


def test_a_batch_without_rows_and_guidance_that_the_network_cannot_see_are_refused():
    x, y = torch.zeros(0, 3, 4, 4), torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"x must have a row, got \[0, 3, 4, 4\]"):
        improved_mean_flow(build(CONFIG), x, y, Draws.sample(x, seed=0, step=0))
    x, y = torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)
    blind = build(network_of("imf-vhead", CONFIG))
    with pytest.raises(ValueError, match="guidance must be a Guidance for a network without ω as an input"):
        improved_mean_flow(blind, x, y, Draws.sample(x, seed=0, step=0))

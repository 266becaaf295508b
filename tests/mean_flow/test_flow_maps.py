"""Objectives of flow maps: each equals a plain program, is zero at the flow of a Gaussian, and trains."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

import imf
import imf_kernels as ik
from imf.mean_flow.flow_maps import lagrangian_self_distillation, terminal_velocity_matching
from imf.mean_flow.methods import METHODS, network_of
from imf.mean_flow.objective import objective
from imf.objective.draws import GAP_MEAN, GAP_STD, Draws, Guidance
from imf_kernels.testing import errors
from tests.helpers import plain_flow_maps
from tests.helpers.tiny_run import ALONE, NETWORK, config, one_step, perturbed, state_and_data
from tests.mean_flow.test_dit import TINY

FLOW_MAPS = [name for name, method in METHODS.items() if method.flow_map]
GUIDANCE = [Guidance(kappa=0.2), Guidance(1.5, 0.0), Guidance(1.0, 0.0), Guidance(0.7, 0.6)]


def curved(method, dtype=torch.float64):
    """A network whose derivative by r is large, and another one near it."""
    model = perturbed(method, TINY)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embedders.h" in name or "modulation" in name:
                parameter.mul_(3)
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.to(dtype), teacher.to(dtype)


def batch(method, size=6, dtype=torch.float64, **changes):
    torch.manual_seed(size)
    x, y = torch.randn(size, 3, 4, 4), torch.randint(0, TINY.num_classes, (size,))
    times = METHODS[method].times
    draws = Draws.sample(x, seed=3, step=7, interval=False, drop_probability=0.4, times=times)
    return in_dtype((x, y, dataclasses.replace(draws, **changes)), dtype)


def in_dtype(given, dtype):
    x, y, draws = given
    tensors = {n: a.to(dtype) for n, a in vars(draws).items() if n not in ("drop", "n_fm")}
    return x.to(dtype), y, dataclasses.replace(draws, **tensors)


def evaluate(method, model, teacher, given, guidance):
    """The result of an objective, and its gradients by name."""
    model.zero_grad()
    result = objective(method, guidance, teacher=teacher)(model, *given)
    result.loss.backward()
    assert not any(p.grad is not None for p in teacher.parameters())
    return result, {name: p.grad.clone() for name, p in model.named_parameters()}


def plain(method, model, teacher, given, guidance, fault=None):
    torch.set_default_dtype(given[0].dtype)  # of the constants too
    try:
        loss, du_dr, target = plain_flow_maps.step(method, model, teacher, *given, guidance, fault)
    finally:
        torch.set_default_dtype(torch.float32)
    gradients = torch.autograd.grad(loss, [*model.parameters()])
    names = [name for name, _ in model.named_parameters()]
    return loss, du_dr, target, dict(zip(names, gradients, strict=True))


def worst(gradients, expected):
    """The largest relative difference of a weight's gradient."""
    return max(float((gradients[n] - g).norm() / g.norm()) for n, g in expected.items())


DROPPED = torch.tensor([True, False] * 3)


@pytest.mark.parametrize(
    "drop", [None, DROPPED, torch.ones(6, dtype=torch.bool)], ids=["drawn", "every other", "all"]
)
@pytest.mark.parametrize("method", FLOW_MAPS)
def test_equals_the_plain_program_in_fp64(method, drop):
    model, teacher = curved(method)
    given = batch(method, **({} if drop is None else {"drop": drop}))
    for guidance in GUIDANCE if drop is None else GUIDANCE[:1]:
        with ik.use_backend("reference"):
            result, gradients = evaluate(method, model, teacher, given, guidance)
        loss, du_dr, target, expected = plain(method, model, teacher, given, guidance)
        torch.testing.assert_close(result.loss, loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(result.du_dt, du_dr, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(result.v_g, target, rtol=1e-10, atol=1e-12)
        assert worst(gradients, expected) < 1e-9
        assert du_dr.norm() > 0.5 and 0.1 < result.loss_u / result.loss_v < 10  # both are in the comparison


@pytest.mark.parametrize("fault", plain_flow_maps.FAULTS)
@pytest.mark.parametrize("method", FLOW_MAPS)
def test_gradients_stop_where_the_papers_stop_them(method, fault):
    """The comparison above would see a gradient that is left out, or one that is too many."""
    model, teacher = curved(method)
    given = batch(method)
    loss, _, _, expected = plain(method, model, teacher, given, GUIDANCE[0])
    if method == "tvm" and fault == "the teacher is trained":
        assert all(p.grad is None for p in teacher.parameters())  # its own weights, not the model's
        return
    same, _, _, faulty = plain(method, model, teacher, given, GUIDANCE[0], fault)
    torch.testing.assert_close(same, loss)
    assert worst(faulty, expected) > 1e-2


@pytest.mark.parametrize("method", FLOW_MAPS)
def test_in_fp32_by_the_error_rule(method):
    """On `cpu`, against the plain program in fp64, with its own errors in fp32 of three batches."""
    exact, got, yardsticks = [], [], []
    for size in (4, 6, 8):
        model, teacher = curved(method, torch.float32)
        given = batch(method, size, torch.float32)
        with ik.use_backend("cpu"):
            _, gradients = evaluate(method, model, teacher, given, GUIDANCE[0])
        fp32 = plain(method, model, teacher, given, GUIDANCE[0])[3]
        wide = in_dtype(given, torch.float64)
        fp64 = plain(method, model.double(), teacher.double(), wide, GUIDANCE[0])[3]
        exact.append(fp64), got.append(gradients)
        yardsticks.append({n: errors.Yardstick.of(fp32[n], fp64[n]) for n in fp64})
    for gradients, fp64 in zip(got, exact, strict=True):
        for name, g in gradients.items():
            errors.check(name, g, fp64[name], errors.Yardstick.largest([y[name] for y in yardsticks]))


class GaussianFlow(nn.Module):
    """The average velocity of the flow from N(0, 1) at time 1 to N(0, s²) at time 0, whatever the label.

    z at time t is N(0, σ(t)²), σ(t)² = (1 − t)² s² + t², and X(z, t, r) = z σ(r) / σ(t).
    """

    def __init__(self, s: float) -> None:
        super().__init__()
        self.config = network_of("mf", TINY)
        self.s = nn.Parameter(torch.tensor(s))

    def variance(self, t):
        return self.s**2 * (1 - t) * (1 - t) + t * t

    def forward(self, z, t, h, *conditions):
        r = t - h
        sum_of_times = (t + r) * (self.s**2 + 1) - 2 * self.s**2  # (σ(t)² − σ(r)²) / (t − r)
        sigma_t, sigma_r = self.variance(t) ** 0.5, self.variance(r) ** 0.5
        factor = sum_of_times / (sigma_t * (sigma_t + sigma_r))
        if isinstance(factor, ik.Dual):
            return factor.reshape(-1, 1, 1, 1) * z
        return factor[:, None, None, None] * z


@pytest.mark.parametrize("method", FLOW_MAPS)
def test_the_flow_of_a_gaussian_is_a_solution(method):
    """The exact flow map arrives with its own velocity, another one does not; it is sampled in any steps."""
    flow = GaussianFlow(0.3).double()
    x, y, draws = batch(method)
    result = objective(method, Guidance(kappa=0), teacher=flow)(flow, x, y, draws)
    assert float(result.loss_u) < 1e-24 and float(result.loss_v) > 0.1

    constant = copy.deepcopy(flow)  # goes straight on with the velocity at t
    forward = constant.forward
    constant.forward = lambda z, t, h, *conditions: forward(z, t, h * 0, *conditions)
    assert float(objective(method, Guidance(kappa=0), teacher=flow)(constant, x, y, draws).loss_u) > 1e-3

    flow.float()
    for steps in (1, 2, 4):
        noise = torch.randn(5, 3, 4, 4)
        images = imf.generate(flow, noise, torch.zeros(5, dtype=torch.int64), steps=steps)
        torch.testing.assert_close(images, 0.3 * noise, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(
        imf.generate(constant.float(), noise, torch.zeros(5, dtype=torch.int64)), images
    )


@pytest.mark.parametrize("method", FLOW_MAPS)
def test_twenty_steps_lower_the_loss(method):
    network = network_of(method, NETWORK)
    state, batches, c = state_and_data(method=method, network=network, steps=20, batch_size=32, lr=1e-2)
    x, y = next(batches)
    draws = Draws.sample(x, seed=5, step=0, **c.draws)

    def loss():
        with torch.no_grad():
            return float(state.objective(state.model, x, y, draws).loss)

    before = loss()
    for _ in range(20):
        one_step(state, batches, c, ALONE)
    assert loss() < 0.9 * before
    images = imf.generate(state.ema, torch.randn(4, 1, 8, 8), torch.arange(4), steps=2)
    assert images.isfinite().all()


def distance(x, cdf):
    """Kolmogorov's distance between values and a distribution, times √n: above 1.95 in 0.1 % of samples."""
    x, n = x.double().sort().values, len(x)
    ranks = torch.arange(n, dtype=torch.float64)
    p = cdf(x)
    return math.sqrt(n) * float(torch.maximum((p - ranks / n).abs(), (p - (ranks + 1) / n).abs()).max())


def drawn(times, **options):
    x = torch.empty(20_000, 1, 1, 1)
    draws = Draws.sample(x, seed=1, step=2, times=times, fm_fraction=0.5, mean=-0.4, std=1.6, **options)
    t, r, n = draws.t.double(), draws.r.double(), draws.n_fm
    assert torch.equal(t[:n], r[:n]) and bool((r <= t).all())
    return t[:n], t[n:], r[n:]


def uniform(x):
    return x.clamp(0, 1)


def test_uniform_times():
    """t is uniform in FM rows, (r, t) in the triangle r < t: t² is uniform, and r / t whatever t."""
    fm, t, r = drawn("uniform")
    for values in (fm, t**2, r / t, (r / t)[t < 0.5], (r / t)[t > 0.9]):
        assert distance(values, uniform) < 1.95
    assert distance(t, uniform) > 10  # the measure can tell


def test_times_of_a_gap():
    """t − r is logit-normal; r is so up to 1 − gap; t of FM rows is, without a bound."""
    fm, t, r = drawn("gap")
    gap = t - r

    def cdf(x, mean, std):
        return torch.special.ndtr((torch.logit(x) - mean) / std)

    assert distance(gap, lambda x: cdf(x, GAP_MEAN, GAP_STD)) < 1.95
    assert distance(fm, lambda x: cdf(x, -0.4, 1.6)) < 1.95
    share = cdf(r, -0.4, 1.6) / cdf(1 - gap, -0.4, 1.6)
    for values in (share, share[gap < 0.2], share[gap > 0.6]):
        assert distance(values, uniform) < 1.95
    assert distance(r, lambda x: cdf(x, -0.4, 1.6)) > 10
    rows = Draws.sample(torch.empty(8, 1, 1, 1), seed=0, step=0, times="gap", r0_fraction=0.25).r
    assert rows[6:].tolist() == [0, 0] and rows[4:6].min() > 0


def test_what_a_method_does_not_have_is_refused():
    model, teacher = curved("tvm")
    x, y, draws = batch("tvm")
    tvm, options = terminal_velocity_matching, {"teacher": teacher, "guidance": Guidance()}
    with pytest.raises(ValueError, match=r"objective: teacher must be the averaged network .* tvm, got None"):
        objective("tvm", Guidance())
    everything = dataclasses.replace(draws, n_fm=6, r=draws.t)
    for given, n_fm in ((everything, 6), (dataclasses.replace(draws, n_fm=0), 0)):
        with pytest.raises(
            ValueError, match=f"draws must have FM rows and others, got n_fm {n_fm} of 6 rows"
        ):
            tvm(model, x, y, given, **options)
        assert lagrangian_self_distillation(model, x, y, given, guidance=Guidance()).loss.isfinite()
    for call in (tvm, lagrangian_self_distillation):
        options = {"guidance": Guidance(t_max=0.5)} | ({"teacher": teacher} if call is tvm else {})
        with pytest.raises(ValueError, match=r"guidance must be in the interval \[0, 1\], got \[0, 0.5\]"):
            call(model, x, y, draws, **options)
        with pytest.raises(ValueError, match="guidance is fixed: model must not have it as an input"):
            call(perturbed("imf-omega", TINY), x, y, draws, **options | {"guidance": Guidance()})
    with pytest.raises(ValueError, match="times must be one of logit-normal, uniform, gap, got 'cosine'"):
        Draws.sample(x, seed=0, step=0, times="cosine")
    with pytest.raises(ValueError, match="std must be above 0 with times 'gap', got 0"):
        Draws.sample(x, seed=0, step=0, times="gap", std=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"norm_p": 1.0},
            r"norm_p \(--norm-p\) must be 0, as its loss has no adaptive weight, for the method tvm, got 1.0",
        ),
        (
            {"fixed_t_min": 0.1},
            r"fixed_t_min \(--fixed-t-min\) must be 0, as its guidance has no interval, .* got 0.1",
        ),
        (
            {"fixed_t_max": 0.5},
            r"fixed_t_max \(--fixed-t-max\) must be 1, as its guidance has no interval, .* got 0.5",
        ),
        (
            {"fm_fraction": 0.0},
            r"fm_fraction \(--fm-fraction\) must be such that the 8 images .* have rows with r = t",
        ),
        (
            {"fm_fraction": 1.0, "r0_fraction": 0.0},
            r"fm_fraction \(--fm-fraction\) must be such that .* and others .* got 1.0",
        ),
        (
            {"fm_fraction": 0.4, "accumulate": 4},
            r"fm_fraction \(--fm-fraction\) must be such that the 2 images of a micro-batch",
        ),
        ({"time_std": 0.0}, r"time_std \(--time-std\) must be above 0 for the method tvm, got 0.0"),
    ],
)
def test_a_configuration_that_a_method_does_not_have_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config(method="tvm", network=network_of("tvm", NETWORK), **change)

"""Networks of other people under the objectives: equal to those that carry `Dual`s; wrong ones are named."""

import dataclasses
import importlib.util
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import imf
from imf import data
from imf.mean_flow.methods import METHODS, guidance_of
from imf.mean_flow.objective import mean_flow, objective
from imf.model.config import config_of
from imf.model.sampler import sample_labels
from imf.objective.draws import Draws, Guidance
from imf.objective.imf_loss import improved_mean_flow
from tests.helpers.tiny_run import perturbed

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "own_network.py"))
SHAPE = (1, 8, 8)


class Small(nn.Module):
    """A network of (z, t, r, labels, *guidance) as small as one can be."""

    def __init__(self, rows=11, inputs=2, outputs=1):
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 2, stride=2)
        self.scalars, self.labels = nn.Linear(inputs, 8), nn.Embedding(rows, 8)
        self.norm = nn.GroupNorm(2, 8)
        self.out = nn.ConvTranspose2d(8, outputs, 2, stride=2)

    def forward(self, z, t, r, labels, *guidance):
        c = self.scalars(torch.stack([t, r, *guidance], dim=-1)) + self.labels(labels)
        y = self.out(nn.functional.silu(self.norm(self.patches(z) + c[:, :, None, None])))
        return y if y.shape[1] == 1 else y.chunk(2, dim=1)


def adapted(network=None, **options):
    return imf.adapt(network or Small(), **{"num_classes": 10, "shape": SHAPE, **options})


def batch(size=8, **options):
    torch.manual_seed(3)
    x = torch.randn(size, *SHAPE)
    return x, torch.arange(size) % 10, Draws.sample(x, seed=0, step=0, **options)


def ours(method):
    """A network of this package, and the same weights as somebody's own."""
    model = perturbed(method)
    form, heads = METHODS[method], "uv" if METHODS[method].v_head else "u"
    one, zero = torch.ones(1), torch.zeros(1)

    def call(network, z, t, r, labels, *guidance):
        inputs = guidance + (one, zero, one)[len(guidance) :]
        return network(z, t, t - r, *(x.expand(len(z)) for x in inputs), labels, heads=heads)

    guidance = "interval" if form.interval_input else "omega" if form.omega_input else "fixed"
    return model, imf.adapt(model, num_classes=10, call=call, v_head=form.v_head, guidance=guidance)


@pytest.mark.parametrize("case", ["as drawn", "all FM", "no FM"])
@pytest.mark.parametrize("method", ["mf", "imf-boundary", "imf-vhead", "imf-omega", "imf-interval", "imf"])
def test_equals_the_network_that_carries_duals(method, case):
    """Loss, u, v, du/dt and every gradient: `jvp` of plain calls against the network's own duals."""
    fraction = {"as drawn": 0.5, "all FM": 1.0, "no FM": 0.0}[case]
    x, y, draws = batch(fm_fraction=fraction, interval=METHODS[method].interval_input)
    results = []
    for network in ours(method):
        network.zero_grad()
        out = objective(method, guidance_of(network.config, Guidance(kappa=0.3)))(network, x, y, draws)
        out.loss.backward()
        gradients = {name.removeprefix("network."): p.grad for name, p in network.named_parameters()}
        velocities = {name: getattr(out, name) for name in ("loss_u", "loss_v", "u", "du_dt", "v_g")}
        results.append(gradients | velocities | ({} if out.v is None else {"v": out.v}))
    expected, got = results
    assert expected.keys() == got.keys()
    assert case == "all FM" or expected["du_dt"].abs().max() > 0.1
    for name, x in expected.items():
        assert (got[name] - x).norm() <= 1e-4 * x.norm() + 1e-6, name


def test_a_guidance_scale_without_a_v_head():
    """Neither original nor improved Mean Flows have it: v = u(z, t, t) of a network that takes ω."""
    x, y, draws = batch(size=6)
    network = adapted(Small(inputs=5), guidance="interval").double()
    draws = Draws(
        **{
            name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in vars(draws).items()
        }
    )
    x = x.double()
    out = improved_mean_flow(network, x, y, draws)
    null = y.masked_fill(draws.drop, 10)
    t, r, expand = draws.t, draws.r, (slice(None), None, None, None)
    inside = (draws.t_min <= t) & (t <= draws.t_max)
    omega = torch.where(inside, draws.omega, 1.0)
    zero, one = torch.zeros_like(t), torch.ones_like(t)

    def u_of(z, t, r, omega=draws.omega, t_min=draws.t_min, t_max=draws.t_max, labels=null):
        return network.network(z, t, r, labels, omega, t_min, t_max)

    z = (1 - t[expand]) * x + t[expand] * draws.noise
    v_c, v_u = (
        u_of(z, t, t, omega, zero, one, y),
        u_of(z, t, t, one, zero, one, torch.full_like(y, 10)),
    )
    kappa = torch.where(draws.drop, 0.0, 1 - 1 / omega)
    v_g = draws.noise - x + kappa[expand] * (v_c - v_u)
    step = 1e-5  # a central difference along (v_c, 1, 0)
    ahead, behind = u_of(z + step * v_c, t + step, r), u_of(z - step * v_c, t - step, r)
    du_dt = (ahead - behind) / (2 * step)
    compound = u_of(z, t, r) + (t - r)[expand] * du_dt
    moved = slice(draws.n_fm, None)
    torch.testing.assert_close(out.v_g[moved], v_g[moved], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.du_dt[moved], du_dt[moved], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.loss_u, (compound - v_g).square().mean(), rtol=1e-6, atol=0)


def test_autocast_rounds_products_and_no_times():
    x, y, draws = batch(size=16)
    network, guidance = adapted(), Guidance(kappa=0.2)
    exact = improved_mean_flow(network, x, y, draws, guidance=guidance)
    network.compute_dtype = torch.bfloat16
    rounded = improved_mean_flow(network, x, y, draws, guidance=guidance)
    network.compute_dtype = None
    with torch.autocast("cpu", torch.bfloat16):  # of the code around it
        outside = improved_mean_flow(network, x, y, draws, guidance=guidance)
    outside.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in network.parameters())
    for out in rounded, outside:
        assert out.u.dtype == out.du_dt.dtype == torch.float32
        assert 0 < (out.u - exact.u).norm() / exact.u.norm() < 2e-2
        assert 0 < (out.du_dt - exact.du_dt).norm() / exact.du_dt.norm() < 5e-2


@pytest.mark.parametrize("name", ["u_vit", "u_net", "dit"])
def test_a_network_of_the_example_learns_the_digits_in_20_steps(name):
    if name != "u_vit" and importlib.util.find_spec("diffusers") is None:
        pytest.skip("networks of other people: pip install diffusers")
    torch.manual_seed(0)
    network = EXAMPLE[name](16 if name == "u_net" else 32)
    assert network.unused == ()
    optimizer, losses = torch.optim.AdamW(network.parameters(), lr=3e-3), []
    with data.Batches(data.load("digits"), batch_size=32, seed=0) as batches:
        for step in range(20):
            x, y = next(batches)
            draws = Draws.sample(x, seed=0, step=step, interval=False, omega_max=1.0)
            loss = improved_mean_flow(network, x, y, draws, guidance=Guidance(kappa=0.2))
            optimizer.zero_grad()
            loss.loss.backward()
            optimizer.step()
            losses.append(float(loss.loss_u))
    assert sum(losses[-5:]) / 5 < 0.75 * losses[0], losses  # 0.5 to 0.6 where this was written
    samples = imf.generate(network.eval(), torch.randn(3, *SHAPE), torch.tensor([1, 2, 3]))
    assert samples.shape == (3, *SHAPE) and samples.isfinite().all()


def test_the_first_batch_decides_the_shape_and_is_checked():
    network = imf.adapt(Small(rows=10), num_classes=10)
    assert (network.config.in_channels, network.config.input_size) == (0, 0)
    x, y, draws = batch()
    with pytest.raises(ValueError, match="the embedding labels has 10 rows, got index 10"):
        improved_mean_flow(network, x, y, draws, guidance=Guidance())
    network = imf.adapt(Small(), num_classes=10)
    state = torch.get_rng_state()
    improved_mean_flow(network, x, y, draws, guidance=Guidance())
    assert (network.config.in_channels, network.config.input_size) == (1, 8)
    assert torch.equal(torch.get_rng_state(), state)  # the check draws nothing of the user's
    assert {name.partition(".")[0] for name in network.state_dict()} == {"network"}


def test_a_zero_output_is_no_missing_dependence():
    network = Small()
    nn.init.zeros_(network.out.weight)
    nn.init.zeros_(network.out.bias)
    assert adapted(network).unused == ()
    network.extra = nn.Linear(2, 2)
    assert adapted(network).unused == ("network.extra.weight", "network.extra.bias")


def calling(function, **options):
    return lambda: adapted(call=function, **options)


class Output:
    sample = None


class Normed(Small):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8)


WRONG = {
    "no module": (lambda: adapted(len), TypeError, "network must be a torch.nn.Module, got builtin"),
    "adapted twice": (lambda: adapted(adapted()), TypeError, "must be your own module, got one that is"),
    "guidance": (lambda: adapted(guidance="scale"), ValueError, "must be one of fixed, omega, interval"),
    "num_classes": (lambda: adapted(num_classes=0), ValueError, "data without labels have one class"),
    "call": (lambda: adapted(call="forward"), TypeError, "call must be a function of .network, z, t, r"),
    "shape": (
        lambda: adapted(shape=(1, 8, 6)),
        ValueError,
        r"shape must be \(C, H, W\) with H = W, got \(1, 8",
    ),
    "batch norm": (
        lambda: adapted(Normed()),
        ValueError,
        "norm must compute rows independently, got a BatchN",
    ),
    "bf16": (lambda: adapted(Small().bfloat16()), TypeError, "float32, got patches.weight of torch.bfloat16"),
    "null label": (lambda: adapted(Small(rows=10)), ValueError, "the null label: make it of 11 rows"),
    "ignores t": (
        calling(lambda n, z, t, r, y: n(z, r, r, y)),
        ValueError,
        "u must depend on t; it is the average velocity over",
    ),
    "ignores r": (
        calling(lambda n, z, t, r, y: n(z, t, t, y)),
        ValueError,
        "u must depend on r; .* or t and t − r, or t − r alone",
    ),
    "rounds t": (
        calling(lambda n, z, t, r, y: n(z, (1000 * t).long().float(), r, y)),
        ValueError,
        "u must depend on t; .* neither rounded to integers nor detached",
    ),
    "ignores omega": (
        calling(lambda n, z, t, r, y, omega: n(z, t, r, y), guidance="omega"),
        ValueError,
        "u must depend on omega; call must pass it to the network, or leave it out of `guidance`",
    ),
    "no gradients": (
        calling(lambda n, z, t, r, y: n(z, t, r, y).detach()),
        ValueError,
        "u must have a graph; is call under torch.no_grad, or detached",
    ),
    "an output": (
        calling(lambda *_: Output()),
        TypeError,
        "u must be a tensor, got Output; return its .sample",
    ),
    "another shape": (
        calling(lambda n, z, t, r, y: n(z, t, r, y).flatten(1)),
        ValueError,
        r"u must be \[2, 1, 8, 8\] of floating-point type like z, got \[2, 64\]",
    ),
    "a variance": (
        calling(lambda n, z, t, r, y: torch.cat([n(z, t, r, y)] * 2, 1)),
        ValueError,
        "twice the channels: a network that also predicts a variance",
    ),
    "no v": (lambda: adapted(v_head=True), TypeError, "the pair .u, v., with v_head=True, got one Tensor"),
    "a v": (lambda: adapted(Small(outputs=2)), TypeError, "the tensor u, without v_head=True, got 2 of them"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_when_a_network_is_adapted(case):
    make, kind, message = WRONG[case]
    with pytest.raises(kind, match=message):
        make()


def test_wrong_uses_of_a_network():
    x, y, draws = batch()
    raw, network = Small(), adapted()
    for objective_of in (improved_mean_flow, mean_flow):
        with pytest.raises(
            TypeError, match=r"got Small; wrap one of your own: imf.adapt\(network, num_classes="
        ):
            objective_of(raw, x, y, draws, guidance=Guidance())
        with pytest.raises(ValueError, match=r"pass guidance=imf.Guidance\(kappa=0.2\) for a scale of 1.25"):
            objective_of(network, x, y, draws, guidance=None)
    with pytest.raises(ValueError, match=r"heads must be 'u' \(adapted without v_head=True\), got 'uv'"):
        network(x, draws.t, draws.t, draws.t, draws.t, draws.t, y, heads="uv")
    with pytest.raises(ValueError, match=r"z must be \[B, 1, 8, 8\], got \[8, 3, 8, 8\]"):
        network(x.expand(-1, 3, -1, -1), draws.t, draws.t, draws.t, draws.t, draws.t, y)
    with pytest.raises(ValueError, match=r"labels must be within 0 and 10 \(the null label\), got 4 to 11"):
        network(x, draws.t, draws.t, draws.t, draws.t, draws.t, y + 4)
    with pytest.raises(TypeError, match=r"model must be a network of imf.build or imf.adapt, got Small"):
        imf.generate(raw, x, y)
    with pytest.raises(ValueError, match=r"pass shape=\(C, H, H\) to imf.adapt"):
        sample_labels(imf.adapt(raw, num_classes=10), y)
    with pytest.raises(ValueError, match="omega must be 1, it is no input of this network, got 2"):
        imf.generate(network, x, y, omega=2.0)
    with pytest.raises(ValueError, match="interval_input without omega_input"):
        dataclasses.replace(network.config, interval_input=True)
    assert config_of(nn.DataParallel(network)) is network.config

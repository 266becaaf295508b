"""Methods and presets: each trains and samples on the digits, and presets are the published settings."""

import dataclasses
import itertools
import json

import pytest
import torch

import imf
from imf import sample, train
from imf.mean_flow.methods import METHODS, network_of
from imf.objective.draws import Draws
from imf.training import config as configuration
from imf.training.recipes import PRESETS, preset_of
from tests.helpers.tiny_run import ALONE, FAST, NETWORK, config, one_step, state_and_data


def settings(method: str) -> dict:
    return {"method": method, "network": network_of(method, NETWORK)}


def with_heads(method: str, aux_head_depth: int):
    return dataclasses.replace(network_of(method, NETWORK), aux_head_depth=aux_head_depth)


def test_the_methods_are_the_rows_of_the_paper_in_their_order():
    rows = {name: method for name, method in METHODS.items() if not method.flow_map}
    assert [*rows] == [
        "mf", "imf-boundary", "imf-vhead", "imf-omega", "imf-interval", "imf-tokens", "imf"
    ]  # fmt: skip
    forms = [(m.v_head, m.omega_input, m.interval_input, m.conditioning, m.block) for m in rows.values()]
    changed = [sum(a != b for a, b in zip(*two, strict=True)) for two in itertools.pairwise(forms)]
    assert changed == [0, 1, 1, 1, 1, 1]  # the first step changes the objective alone


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_samples_on_the_digits(method):
    flow_map = METHODS[method].flow_map
    state, given, c = state_and_data(**settings(method), warmup_steps=0, norm_p=0.0 if flow_map else 1.0)
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    for _ in range(5):
        terms = one_step(state, given, c, ALONE)
    expected = 2 if METHODS[method].v_head else 1
    assert terms.isfinite().all() and (flow_map or float(terms[0]) == pytest.approx(expected, 0.01))
    # What begins at zero has moved by now, so a gradient has reached every weight.
    assert not [name for name, p in state.model.named_parameters() if torch.equal(p, before[name])]
    noise, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    omega, t_min, t_max = c.sampling.values()
    guidance = {"omega": omega, "t_min": t_min, "t_max": t_max}
    assert imf.generate(state.ema, noise, labels, steps=2, **guidance).isfinite().all()


def test_methods_of_one_seed_share_times_noise_and_dropped_labels():
    x, draws = torch.zeros(16, 1, 8, 8), {}
    for method in METHODS:
        draws[method] = Draws.sample(x, seed=0, step=1, **config(**settings(method)).draws)
    for method, drawn in draws.items():
        own = METHODS[method].flow_map  # has times of its own
        for name in ("noise",) if own else ("t", "r", "noise", "drop"):
            assert torch.equal(getattr(drawn, name), getattr(draws["imf"], name)), (method, name)
        assert METHODS[method].omega_input == bool((drawn.omega > 1).any())
        assert METHODS[method].interval_input == bool((drawn.t_min > 0).any())


def test_a_run_of_mean_flows_from_the_command_line(tmp_path, capsys):
    """--method keeps the sizes; guidance that is no input of the network is refused by name."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in FAST.items() if name != "tensorboard"]
    sizes = ["--hidden-size=16", "--depth=2", "--num-heads=1", "--patch-size=4", "--no-tensorboard"]
    run = tmp_path / "mine"
    arguments = [*flags, *sizes, "--method=mf", f"--runs={tmp_path}", "--name=mine", "--fixed-kappa=0.25"]
    assert train.main([*arguments, "--steps=2"]) == 0
    saved = json.loads((run / "config.json").read_text())["config"]
    assert (saved["method"], saved["fixed_kappa"], saved["fixed_omega"]) == ("mf", 0.25, 1.0)
    wanted = {"hidden_size": 16, "depth": 2, "aux_head_depth": 0, "mlp_ratio": 4.0, "conditioning": "adaln"}
    assert wanted.items() <= saved["network"].items()
    assert dataclasses.asdict(configuration.from_dict(saved)) == saved
    results = json.loads((run / "results.json").read_text())
    assert (results["omega"], results["t_min"], results["t_max"]) == (1.0, 0.0, 1.0)

    out = ["--checkpoint", str(run), "--out", str(tmp_path / "grid.png"), "--columns", "1"]
    assert sample.main(out) == 0
    capsys.readouterr()
    assert sample.main([*out, "--omega", "2"]) == 1
    assert "omega must be 1, it is no input of this network, got 2" in capsys.readouterr().err
    assert sample.main([*out, "--interval", "0.2", "0.8"]) == 1
    assert "t_min and t_max must be 0 and 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(["--resume", str(run), "--preset", "digits"])
    assert "--preset is for new runs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "mf"}, r"conditioning .* must be 'adaln' for the method mf, got 'tokens'"),
        ({"network": network_of("mf", NETWORK)}, r"conditioning .* must be 'tokens' for the method imf, got"),
        ({"method": "imf-vhead", "network": with_heads("imf-vhead", 0)},
         r"aux_head_depth \(--aux-head-depth\) must be at least 1 for the method imf-vhead, got 0"),
        ({"method": "mf", "network": with_heads("mf", 1)},
         "aux_head_depth .* must be 0 for the method mf, got 1"),
        ({"fixed_kappa": 1.0}, r"fixed_kappa \(--fixed-kappa\) must be in \[0, 1\), got 1.0"),
        ({"method": "imf-everything"}, "must be one of mf, imf-boundary"),
    ],
)  # fmt: skip
def test_methods_and_networks_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config(**change)


def test_presets_are_the_published_settings():
    rows = {name: PRESETS[name] for name in PRESETS if name not in ("digits", "small")}
    for name, p in rows.items():
        assert p.method == ("mf" if name.startswith("MF") else "imf")
        assert (p.lr, p.beta1, p.beta2, p.eps, p.weight_decay) == (1e-4, 0.9, 0.95, 1e-8, 0)
        assert (p.norm_p, p.norm_eps, p.r0_fraction, p.network.residual_scale) == (1.0, 0.01, 0.0, 0.0)
        assert [*p.network.condition_tokens.values()] == [8, 4, 2, 2, 4]
        assert (p.ema_decay, configuration.ema_decay(p, 0)) == (0.9999, 0.9999)
        assert (p.time_mean, p.time_std, p.drop_probability, p.omega_exponent) == (-0.4, 1.0, 0.1, 1.0)
        assert configuration.learning_rate(p, p.steps - 1) == p.lr
    for name, guidance in {
        "iMF-B/2": (8.0, 0.4, 0.65),
        "iMF-M/2": (10.5, 0.4, 0.6),
        "iMF-L/2": (10.5, 0.4, 0.6),
        "iMF-XL/2": (8.0, 0.42, 0.62),
    }.items():
        p = rows.pop(name)
        assert tuple(p.sampling.values()) == guidance
        assert (p.batch_size, p.steps, p.warmup_steps, p.fm_fraction) == (1024, 640 * 1251, 10 * 1251, 0.5)
        assert configuration.learning_rate(p, 0) == 0
    for name, guidance in {
        "MF-B/2": (1.0, 0.5, 0.0, 1.0),
        "MF-M/2": (1.0, 0.5, 0.0, 1.0),
        "MF-L/2": (0.2, 0.92, 0.0, 0.8),
        "MF-XL/2": (0.2, 0.92, 0.0, 0.75),
    }.items():
        p = rows.pop(name)
        assert dataclasses.astuple(p.fixed_guidance) == guidance
        assert tuple(p.sampling.values()) == (1.0, 0.0, 1.0)
        assert (p.batch_size, p.fm_fraction) == (256, 0.75)
    assert not rows


def test_presets_are_defaults_that_every_argument_overrides(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--preset", "MF-XL/2", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for shown in ("--method", "(default: mf)", "(default: 1200960)", "(default: 1152)", "(default: 0.92)"):
        assert shown in text, shown
    assert preset_of(["--steps", "3"]) == preset_of(["--preset"]) == PRESETS["digits"]
    assert preset_of(["--data", "digits"]) == PRESETS["digits"]
    assert preset_of(["--data=somewhere"]) == preset_of(["--preset", "small"]) == PRESETS["small"]
    assert preset_of(["--depth=1", "--preset=iMF-M/2"]) == PRESETS["iMF-M/2"]
    with pytest.raises(SystemExit):
        train.main(["--preset", "iMF-S/2"])
    assert "argument --preset: invalid choice: 'iMF-S/2'" in capsys.readouterr().err

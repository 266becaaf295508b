"""Configuration: every field is an argument shown by --help, wrong values are named, runs get folders."""

import dataclasses
import json
import sys
import time

import pytest

from imf import data, train
from imf.program import UserError
from imf.training import checkpoint
from imf.training import config as configuration
from imf.training import setup as start
from imf.training.config import TrainConfig
from imf.training.log import truncate_metrics
from imf.training.setup import create_folder
from tests.helpers.tiny_run import arguments, config, resumed


def test_help_shows_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in dataclasses.fields(TrainConfig):
        if option.name != "network":
            assert f"--{option.name.replace('_', '-')}" in text and option.metadata["help"] in text
    assert "(default: 128)" in text and "(default: 1e-08)" in text and "--hidden-size" in text


def test_a_configuration_survives_json():
    c = config(lr=1e-3, seed=5)
    assert configuration.from_dict(json.loads(json.dumps(dataclasses.asdict(c)))) == c


@pytest.mark.parametrize(("place", "name"), [("", "sped"), ("network", "with")])
def test_names_of_another_version_are_listed(place, name):
    values = dataclasses.asdict(config())
    (values[place] if place else values)[name] = 1
    with pytest.raises(ValueError, match=f"missing nothing; unknown {place and place + '.'}{name}"):
        configuration.from_dict(values)
    del values["seed"]
    with pytest.raises(ValueError, match=r"missing seed; unknown"):
        configuration.from_dict(values)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", "0", "steps (--steps) must be at least 1, got 0"),
        ("--steps", "many", "argument --steps: invalid int value: 'many'"),
        ("--accumulate", "3", "accumulate (--accumulate) must be a divisor of the batch size 8, got 3"),
        ("--lr", "-1", "lr (--lr) must be above 0, got -1.0"),
        ("--lr", "nan", "lr (--lr) must be finite in fp32, got nan"),
        ("--lr", "1e39", "lr (--lr) must be finite in fp32, got 1e+39"),
        ("--omega", "1e39", "omega (--omega) must be finite in fp32, got 1e+39"),
        ("--time-mean", "-1e308", "time_mean (--time-mean) must be finite in fp32, got -1e+308"),
        ("--ema-decay", "1", "ema_decay (--ema-decay) must be in [0, 1), got 1.0"),
        ("--decay-fraction", "0", "decay_fraction (--decay-fraction) must be in (0, 1], got 0.0"),
        ("--t-max", "1.5", "t_max (--t-max) must be in [t_min, 1] = [0.2, 1], got 1.5"),
        ("--omega", "0", "omega (--omega) must be at least 1, got 0.0"),
        ("--precision", "fp16", "argument --precision: invalid choice: 'fp16'"),
        ("--seed", "-1", "seed (--seed) must be at least 0, got -1"),
        ("--seed", "9" * 23, f"seed (--seed) must be below 2 ** 63, got {'9' * 23}"),
        ("--omega-exponent", "-1000", "omega_exponent (--omega-exponent) must be such that omega_max ** "),
        ("--r0-fraction", "0.6", "r0_fraction (--r0-fraction) must be at most 1 with fm_fraction, got 0.6"),
        ("--norm-p", "-1", "norm_p (--norm-p) must be at least 0, got -1.0"),
        ("--norm-eps", "0", "norm_eps (--norm-eps) must be above 0, got 0.0"),
        ("--residual-scale", "nan", "residual_scale must be a finite number, got nan"),
        ("--mlp-ratio", "inf", "mlp_ratio must be a number of at least 1 / hidden_size, got inf"),
        ("--mlp-ratio", "nan", "mlp_ratio must be a number of at least 1 / hidden_size, got nan"),
        ("--name", "a/b", "name (--name) must be a plain folder name, got 'a/b'"),
        ("--batch-size", f"{10**11}", "batch_size (--batch-size) must be at most 1048576, got 100000000000"),
        ("--steps", f"{10**30}", "steps (--steps) must be at most 1099511627776, got 1000000"),
        ("--depth", f"{10**8}", "depth must be at most 4096, got 100000000"),
        ("--hidden-size", f"{2 * 10**12}", "hidden_size must be at most 1048576, got 2000000000000"),
        ("--mlp-ratio", "1e300", "mlp_ratio must be at most 4194304 / hidden_size, got 1e+300"),
        ("--mlp-ratio", "1e308", "mlp_ratio must be at most 4194304 / hidden_size, got 1e+308"),
    ],
)
def test_wrong_values_are_named(option, value, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main([*arguments(runs=tmp_path), f"{option}={value}"])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_networks_that_no_machine_holds_are_not_made(tmp_path, capsys):
    began = time.monotonic()
    assert train.main(arguments(runs=tmp_path, hidden_size=2**19, num_heads=2**12, depth=9)) == 1
    wanted = "hidden_size 524288, depth 9, mlp_ratio 2, num_classes 10 must make at most 17,179,869,184 "
    assert wanted in capsys.readouterr().err
    assert time.monotonic() - began < 20 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": "4"}, r"steps \(--steps\) must be of type int, got '4'"),
        ({"steps": True}, "must be of type int, got True"),
        ({"lr": "1"}, "must be of type float, got '1'"),
        ({"weight_decay": 10**400}, r"weight_decay \(--weight-decay\) must be finite in fp32, got 10000"),
        ({"tensorboard": 1}, "must be of type bool, got 1"),
        ({"network": None}, "must be of type IMFConfig, got None"),
    ],
)
def test_wrong_types_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        config(**change)


@pytest.mark.parametrize(("device", "message"), [("tpu", "--device must be"), ("meta", "got 'meta'")])
def test_wrong_devices_are_named(device, message, tmp_path, capsys):
    assert train.main(arguments(runs=tmp_path, device=device)) == 1
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_run_is_resumed_with_data_of_its_shape_alone(tmp_path, monkeypatch):
    other = dataclasses.replace(config().network, in_channels=4, num_classes=3)
    run = start.begin(config(runs=str(tmp_path), network=other))
    assert run.config.network == config().network  # the data decide
    checkpoint.save_run(run)
    digits = data.load("digits")
    few = data.LabelledImages(digits.images, digits.labels.clamp(max=4), list("abcde"))
    monkeypatch.setattr(data, "load", lambda name: few)
    with pytest.raises(UserError, match=r"the data in digits must be \[1, 8, 8\] of 10 classes .* of 5"):
        resumed(run.folder)
    other = data.LabelledImages(digits.images, digits.labels, list("0213456789"))
    monkeypatch.setattr(data, "load", lambda name: other)
    with pytest.raises(
        UserError, match=r"class 1 in digits must be '1' as .* was trained on, got '2': start"
    ):
        resumed(run.folder)


def test_runs_get_folders_of_their_own(tmp_path):
    names = [create_folder(config(runs=str(tmp_path / "runs"))).name for _ in range(3)]
    assert names == ["digits", "digits-2", "digits-3"]
    assert create_folder(config(runs=str(tmp_path), data="/data/latents/")) == tmp_path / "latents"
    mine = create_folder(config(runs=str(tmp_path / "runs"), name="mine"))
    (mine / "metrics.jsonl").write_text("kept")
    with pytest.raises(UserError, match="mine exists already; delete it, or choose another --name"):
        create_folder(config(runs=str(tmp_path / "runs"), name="mine"))
    checkpoint.path_of(mine, 1).touch()
    with pytest.raises(UserError, match=f"--resume {mine}, or choose another --name"):
        create_folder(config(runs=str(tmp_path / "runs"), name="mine"))
    assert (mine / "metrics.jsonl").read_text() == "kept"


def test_runs_must_be_a_folder(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    for runs in (file, file / "below"):
        assert train.main(arguments(runs=runs)) == 1
        assert (
            f"--runs must be a folder or a path where one can be made, got {runs}" in capsys.readouterr().err
        )


@pytest.mark.skipif(sys.platform != "linux", reason="/proc, in which nobody can make a folder")
def test_folders_that_cannot_be_made(tmp_path, capsys):
    for runs, name, message in (
        ("/proc/x", "run", "--runs must be a folder or a path where one can be made, got /proc/x (No such"),
        ("/proc", "run", "/proc/run could not be made (No such file or directory); choose another --runs"),
        (tmp_path, "x" * 300, "could not be made (File name too long); choose another --runs or --name"),
    ):
        assert train.main(arguments(runs=runs, name=name)) == 1
        assert message in capsys.readouterr().err


def test_truncating_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    truncate_metrics(path, 3)
    assert not path.exists()
    path.write_text('{"step": 2}\n{"step": 3}\n{"step": 4}\n{"st')
    truncate_metrics(path, 4)
    assert path.read_text() == '{"step": 2}\n{"step": 3}\n{"step": 4}\n'
    truncate_metrics(path, 3)
    assert path.read_text() == '{"step": 2}\n{"step": 3}\n'

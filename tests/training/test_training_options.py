"""What a run may be asked for: weights to begin with, compiled blocks, checkpointing, Weights & Biases."""

import dataclasses
import functools
import itertools
import json
import os
import sys
import types

import pytest
import torch
from safetensors.torch import load_file

from imf import train
from imf.data.packed import PackedData
from imf.mean_flow.methods import network_of
from imf.model.imf import Block
from imf.program import UserError
from imf.training import artifacts, checkpoint, loop
from imf.training import setup as start
from tests.helpers.tiny_run import (
    ALONE,
    NETWORK,
    arguments,
    config,
    differing,
    one_step,
    state_and_data,
    tensors,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a few steps."""
    run = start.begin(config(runs=str(tmp_path_factory.mktemp("trained"))))
    loop.fit(run)
    return run


@pytest.mark.parametrize("form", ["a run", "a checkpoint", "weights without a run", "latest weights alone"])
def test_a_run_begins_with_the_averaged_weights_of_another(form, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "finish", lambda run: None)
    path = {"a run": trained.folder, "a checkpoint": checkpoint.path_of(trained.folder, 4)}.get(form)
    wanted = load_file(checkpoint.path_of(trained.folder, 4 if form == "a checkpoint" else 6))
    wanted = {name.removeprefix("ema."): x for name, x in wanted.items() if name.startswith("ema.")}
    if path is None:
        path = tmp_path / "weights.safetensors"
        about = checkpoint.read_metadata(checkpoint.path_of(trained.folder, 6))
        kinds = {"model" if form.startswith("latest") else "ema": wanted}
        checkpoint.save_network(path, kinds, about)
    run = start.begin(config(runs=str(tmp_path), init_from=str(path), seed=1, steps=1))
    for network in (run.state.model, run.state.ema):
        assert all(torch.equal(x, wanted[name]) for name, x in network.state_dict().items())
    assert not run.state.optimizer.state and run.state.step == 0
    assert json.loads((run.folder / "config.json").read_text())["config"]["init_from"] == str(path)
    loop.fit(run)
    assert train.main(["--resume", str(run.folder), "--steps", "2"]) == 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none", "no such file or folder"),
        ("FIFO", "must be a checkpoint or the folder of a run, got a device or a FIFO"),
        ("other", "a checkpoint of another network"),
        ("sampling", "has none"),
    ],
)
def test_weights_that_do_not_fit_are_refused(source, message, trained, tmp_path, capsys):
    path = tmp_path / source
    if source == "FIFO":
        os.mkfifo(path)
    if source == "sampling":
        weights = {n: x for n, x in trained.state.ema.state_dict().items() if not n.startswith("v_blocks")}
        about = checkpoint.read_metadata(checkpoint.path_of(trained.folder, 6))
        checkpoint.save_network(path, {"ema": weights}, about)
    size = 24 if source == "other" else NETWORK.hidden_size
    options = arguments(runs=tmp_path / "runs", init_from=trained.folder if source == "other" else path)
    assert train.main([*options, "--hidden-size", str(size)]) == 1
    error = capsys.readouterr().err
    assert "--init-from: " in error and message in error and not (tmp_path / "runs").exists()


def test_a_resumed_run_takes_no_other_weights(trained, capsys):
    with pytest.raises(SystemExit):
        train.main(["--resume", str(trained.folder), "--init-from", "x"])
    assert "--init-from is for new runs" in capsys.readouterr().err


def test_the_data_decide_the_sizes_of_the_network(packed, tmp_path, capsys):
    assert train.main(arguments(runs=tmp_path, data=packed, sample_every=3)) == 0
    config = json.loads((tmp_path / "data" / "config.json").read_text())["config"]
    network = config["network"]
    assert [network[name] for name in ("in_channels", "input_size", "num_classes")] == [3, 8, 2]
    assert (tmp_path / "data" / "samples" / "step-00000003.png").exists()
    assert "1,800 samples of the averaged network" in capsys.readouterr().out


def test_the_data_decide_the_patches_where_their_number_is_given(packed, tmp_path, capsys):
    given = [
        "--runs",
        str(tmp_path),
        "--data",
        str(packed),
        "--steps",
        "1",
        "--batch-size",
        "2",
        "--figures",
        "0",
    ]
    small = ["--depth", "1", "--aux-head-depth", "1", "--hidden-size", "8", "--sample-every", "0"]
    for name, more in (("four", ["--max-patches", "4"]), ("small", []), ("two", ["--patch-size", "2"])):
        assert train.main([*given, *small, *more, "--name", name]) == 0
    found = [
        json.loads((tmp_path / n / "config.json").read_text())["config"] for n in ("four", "small", "two")
    ]
    assert [c["network"]["patch_size"] for c in found] == [4, 1, 2]
    assert [c["max_patches"] for c in found] == [4, 64, 0]
    capsys.readouterr()
    assert train.main([*given, *small, "--patch-size", "3"]) == 1
    assert "--patch-size must divide the 8 pixels of an image in" in (error := capsys.readouterr().err)
    assert "one of 1, 2, 4, 8, got 3" in error


def test_data_that_cannot_be_had_are_named(tmp_path, capsys):
    assert train.main(arguments(runs=tmp_path / "runs", data=tmp_path / "none")) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"imf.train: loading {tmp_path / 'none'}\n")  # before what takes long
    assert f"--data: {tmp_path / 'none'}" in error and not (tmp_path / "runs").exists()


def test_data_that_go_away_end_a_run_with_a_message(packed, tmp_path, monkeypatch, capsys):
    def fetch(self, rows, generator):
        if len(made) == 5:
            raise UserError("shard 3: gone")
        made.append(rows)
        return real(self, rows, generator)

    made, real = [], PackedData.fetch
    monkeypatch.setattr(PackedData, "fetch", fetch)
    assert train.main(arguments(runs=tmp_path, data=packed)) == 1
    error = capsys.readouterr().err
    assert "imf.train: shard 3: gone" in error and f"--resume {tmp_path / 'data'}" in error


def steps_of(count=3, method="imf", **changes):
    network = network_of(method, dataclasses.replace(NETWORK, depth=3))
    state, batches, c = state_and_data(method=method, network=network, **changes)
    terms = [one_step(state, batches, c, ALONE).detach() for _ in range(count)]
    return torch.stack(terms), tensors(state)


@pytest.mark.parametrize("method", ["imf", "tvm"])
def test_checkpointing_trains_alike(method):
    (terms, state), (again, other) = (steps_of(method=method, checkpointing=c) for c in (False, True))
    torch.testing.assert_close(terms, again, rtol=1e-5, atol=1e-6)
    assert differing(state, other) == [] or max((state[n] - other[n]).abs().max() for n in state) < 1e-5


def test_checkpointing_runs_blocks_again(monkeypatch):
    runs, real = [], Block.forward
    monkeypatch.setattr(Block, "forward", lambda *args: (runs.append(args[0]), real(*args))[1])
    state, batches, c = state_and_data(checkpointing=True)
    one_step(state, batches, c, ALONE)
    block = state.model.shared_blocks[0]
    assert sum(run is block for run in runs) == 3  # the evaluation without gradient, forward, and backward


@pytest.mark.slow
@pytest.mark.parametrize("method", ["imf", "lsd"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_train_alike(checkpointing, method, monkeypatch):
    graphs, real = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", functools.partial(real, backend=backend))
    torch._dynamo.reset()
    options = {"compile": True, "checkpointing": checkpointing}
    (terms, state), (again, other) = steps_of(4, method), steps_of(4, method, **options)
    torch.testing.assert_close(terms, again, rtol=1e-5, atol=1e-6)
    assert max((state[name] - other[name]).abs().max() for name in state) < 1e-5
    assert 3 <= len(graphs) <= 6  # one for each kind of call, whatever the number of blocks


def stub_of_wandb(calls):
    def init(**options):
        calls.append(("init", options))
        return types.SimpleNamespace(
            log=lambda values, step: calls.append((step, values)),
            finish=lambda: calls.append(("finish", None)),
        )

    names = (f"id{number}" for number in itertools.count())
    return types.SimpleNamespace(init=init, util=types.SimpleNamespace(generate_id=lambda: next(names)))


def test_weights_and_biases(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(artifacts, "finish", lambda run: None)
    monkeypatch.setitem(sys.modules, "wandb", stub_of_wandb(calls))
    options = arguments(runs=tmp_path, wandb="project", log_every=3, steps=3)
    assert train.main(options) == 0
    (_, first), (step, values), (last, _) = calls
    assert first["project"] == "project" and first["name"] == "digits" and first["resume"] == "allow"
    assert first["config"]["network"]["hidden_size"] == 16 and step == 3 and last == "finish"
    line = json.loads((tmp_path / "digits" / "metrics.jsonl").read_text())
    assert values == {name: value for name, value in line.items() if name != "step"}
    assert train.main(["--resume", str(tmp_path / "digits"), "--steps", "4"]) == 0
    assert calls[3][1]["id"] == first["id"] and calls[4][0] == 4  # the same run goes on


def test_weights_and_biases_is_asked_for_before_a_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it fails
    with pytest.raises(UserError, match=r"--wandb needs the package wandb .*pip install -e '.\[wandb\]'"):
        start.begin(config(runs=str(tmp_path), wandb="project"))
    assert not list(tmp_path.iterdir())


def test_a_backend_that_cannot_run_on_the_device_is_refused_before_a_folder_is_made(tmp_path, capsys):
    assert train.main(arguments(runs=tmp_path, backend="cuda", device="cpu")) == 1
    assert "--backend cuda cannot run on --device cpu" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

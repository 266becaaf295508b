"""Resuming: a run that was stopped or killed ends bit for bit as one that was not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from imf import train
from imf.program import StopSignals, UserError
from imf.training import artifacts, checkpoint, loop
from imf.training import setup as start
from tests.helpers import tiny_run
from tests.helpers.tiny_run import FAST, arguments, config, cut_short, differing, objective_that

TIMES = ("images_per_second", "elapsed")


def final(folder, step=FAST["steps"]):
    return load_file(checkpoint.path_of(folder, step))


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def resumed(path, *options):
    """The run of `path` with command-line options, trained to its end."""
    run = tiny_run.resumed(path, *options)
    loop.fit(run)
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nobody stopped."""
    run = start.begin(config(runs=str(tmp_path_factory.mktemp("whole")), accumulate=2))
    loop.fit(run)
    return run.folder


@pytest.fixture
def cut(whole, tmp_path):
    """That run as if killed after step 5: its last checkpoint is of step 4, a line is half written."""
    folder = cut_short(whole, tmp_path / "cut", lines=5)
    (folder / "checkpoints" / ".step-00000006.safetensors.tmp").write_bytes(b"half")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write((whole / "metrics.jsonl").read_text().splitlines()[5][:20])
    return folder


@pytest.mark.parametrize("form", ["folder", "file", "name alone"])
def test_a_resumed_run_ends_with_the_same_bits(whole, cut, form, monkeypatch):
    path = checkpoint.path_of(cut, 4)
    if form == "name alone":
        monkeypatch.chdir(path.parent)
    run = resumed({"folder": cut, "file": path, "name alone": Path(path.name)}[form])
    assert run.folder == cut and run.state.step == 6
    assert differing(final(cut), final(whole)) == []
    assert metrics(cut) == metrics(whole)  # no step twice, none missing, the same losses
    assert not list((cut / "checkpoints").glob(".*"))


def test_a_test_of_equal_bits_can_fail(whole, tmp_path):
    run = start.begin(config(runs=str(tmp_path), accumulate=2, seed=1))
    loop.fit(run)
    assert len(differing(final(run.folder), final(whole))) > 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_saves_and_says_how_to_go_on(number, whole, tmp_path, monkeypatch, capsys):
    def stop(call, out):
        if call == 5:  # the first micro-batch of the third step
            os.kill(os.getpid(), number)
        return out

    with objective_that(monkeypatch, stop):
        assert train.main(arguments(runs=tmp_path, accumulate=2)) == 128 + number
    folder, error = tmp_path / "digits", capsys.readouterr().err
    assert checkpoint.list_all(folder)[-1] == checkpoint.path_of(folder, 3)  # the step was finished
    assert "stopped after step 3 of 6" in error
    assert f"python -m imf.train --resume {folder}" in error
    assert resumed(folder).state.step == 6
    assert differing(final(folder), final(whole)) == []
    assert metrics(folder) == metrics(whole)


def test_a_signal_while_a_grid_is_drawn_loses_nothing(tmp_path, monkeypatch):
    real = artifacts.draw

    def draw(run, path, steps=1):
        if run.state.step == 3:
            signal.raise_signal(signal.SIGINT)
        real(run, path, steps)

    monkeypatch.setattr(artifacts, "draw", draw)
    options = arguments(runs=tmp_path, checkpoint_every=0, sample_every=1, log_every=2)
    assert train.main(options) == 128 + signal.SIGINT
    assert checkpoint.list_all(tmp_path / "digits") == [checkpoint.path_of(tmp_path / "digits", 3)]
    assert resumed(tmp_path / "digits").state.step == 6


def test_a_second_signal_acts_as_ever():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # processes beside a terminal may ignore it
    with pytest.raises(KeyboardInterrupt), StopSignals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.pending == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_killed_by_the_system(tmp_path):
    def command(*options):
        return [sys.executable, "-m", "imf.train", *options]

    steps = 120
    killed, left = tmp_path / "killed", tmp_path / "left"

    def options(name):
        often = {"checkpoint_every": 5, "keep_checkpoints": 1000}
        return arguments(runs=tmp_path, name=name, steps=steps, threads=1, **often)

    process = subprocess.Popen(command(*options("killed")), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(checkpoint.list_all(killed)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    first, *_, newest = checkpoint.list_all(killed)
    assert first.name < newest.name < checkpoint.path_of(killed, steps).name
    for rest in (("--resume", str(killed)), options("left")):
        subprocess.run(command(*rest), check=True, stdout=subprocess.DEVNULL)
    assert differing(final(killed, steps), final(left, steps)) == []
    assert [line["step"] for line in metrics(killed)] == list(range(1, steps + 1))


def test_more_steps(cut):
    run = resumed(cut, "--steps", "8")
    assert run.state.step == 8 and [line["step"] for line in metrics(cut)] == list(range(1, 9))
    assert json.loads((cut / "config.json").read_text())["config"]["steps"] == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "16"], "batch_size is 8 in .*got 16"),
        (["--hidden-size", "32"], "network.hidden_size is 16 in .*got 32"),
        (["--precision", "bf16"], "precision is 'fp32' in .*got 'bf16'"),
        (["--steps", "3"], "at step 4 already, got --steps 3"),
        (["--t-min", "2"], r"t_min .* must be in \[0, 1\], got 2.0"),
    ],
)
def test_what_may_not_change_is_named(cut, options, message):
    kept = (cut / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=message):
        resumed(cut, *options)
    assert (cut / "metrics.jsonl").read_text() == kept


def test_what_changes_the_bits_is_warned_of(cut, monkeypatch, capsys):
    real, threads = checkpoint.environment, torch.get_num_threads()
    monkeypatch.setattr(checkpoint, "environment", lambda *args: real(*args) | {"torch": "9.9"})
    try:
        resumed(cut, "--threads", str(threads + 1))
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    error = capsys.readouterr().err
    assert f"torch was {torch.__version__}, now it is 9.9" in error
    assert f"threads was {threads}, now it is {threads + 1}" in error


def test_the_thread_count_of_the_run_is_restored(cut, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        resumed(cut)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(threads)
    assert "warning" not in capsys.readouterr().err


def test_an_older_checkpoint_is_refused_beside_newer_ones(cut):
    with pytest.raises(UserError, match=r"must be the newest checkpoint of its run.* move the newer ones"):
        resumed(checkpoint.path_of(cut, 2))


def test_a_truncated_checkpoint_loses_nothing(cut, capsys):
    path = checkpoint.path_of(cut, 4)
    path.write_bytes(path.read_bytes()[:-8])
    kept = (cut / "metrics.jsonl").read_text()
    assert train.main(["--resume", str(cut)]) == 1
    error = capsys.readouterr().err
    assert f"{path}: not a complete safetensors file" in error and "Delete it to go on from" in error
    assert (cut / "metrics.jsonl").read_text() == kept
    path.unlink()
    assert resumed(cut).state.step == 6


def test_resume_without_a_path_takes_the_newest_run(whole, tmp_path, monkeypatch):
    for number, name in enumerate(["new", "old"]):
        shutil.copytree(whole, tmp_path / name)
        for path in checkpoint.list_all(tmp_path / name):
            os.utime(path, (1e9 - number, 1e9 - number))
    seen = []
    monkeypatch.setattr(artifacts, "finish", lambda run: seen.append(run.folder))
    assert train.main(["--resume", "--runs", str(tmp_path)]) == 0
    assert seen == [tmp_path / "new"]
    assert train.main(["--resume", "--runs", str(tmp_path / "none")]) == 1

"""A run's folder: who may write to it, links in it, foreign lines, and what a signal leaves there."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from imf import train
from imf.io import FolderInUse, locked
from imf.program import UserError
from imf.training import artifacts, checkpoint, loop
from imf.training import setup as start
from tests.helpers.tiny_run import arguments, config, cut_short, differing, objective_that
from tests.training.test_resume import final, metrics, resumed


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nobody stopped, with a picture after every second step."""
    run = start.begin(config(runs=str(tmp_path_factory.mktemp("whole")), sample_every=2))
    loop.fit(run)
    return run.folder


@pytest.fixture
def cut(whole, tmp_path):
    """That run as if killed after step 4, before its picture was drawn."""
    folder = cut_short(whole, tmp_path / "cut", lines=4)
    (folder / "samples" / "step-00000004.png").unlink()
    return folder


def pictures(folder):
    return {path.name: path.read_bytes() for path in (folder / "samples").glob("step-*")}


def test_one_process_at_a_time(cut, capsys):
    """The second is refused by name before it touches anything, and goes on once the first has ended."""
    half = cut / "checkpoints" / ".step-00000005.safetensors.tmp"
    half.write_bytes(b"what the first is writing")
    with locked(cut):
        before = {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()}
        for path in (cut, checkpoint.path_of(cut, 4)):
            assert train.main(["--resume", str(path)]) == 1
            error = capsys.readouterr().err
            assert f"imf.train: {cut}: process {os.getpid()} on " in error and "is writing to this" in error
        assert {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()} == before
    assert train.main(["--resume", str(cut)]) == 0 and not half.exists()
    with locked(cut):  # main has let go of it
        pass


def test_a_new_run_is_locked_too(tmp_path, monkeypatch):
    folder, seen = tmp_path / "digits", []

    def look(call, out):
        with (
            pytest.raises(FolderInUse, match=f"process {os.getpid()} on") as error,
            locked(folder),
        ):
            pass
        seen.append(str(error.value))
        return out

    with objective_that(monkeypatch, look):
        assert train.main(arguments(runs=tmp_path, steps=2)) == 0
    assert len(seen) == 2 and all(text.startswith(f"{folder}: ") for text in seen)


def test_a_killed_process_holds_nothing(cut, capsys):
    code = "import sys, time, imf.io, pathlib\nwith imf.io.locked(pathlib.Path(sys.argv[1])):\n"
    code += "    print('locked', flush=True)\n    time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, cut], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"locked\n"
        assert train.main(["--resume", str(cut)]) == 1
        assert f"{cut}: process {holder.pid} on" in capsys.readouterr().err
    finally:
        holder.kill()
        holder.communicate()
    assert train.main(["--resume", str(cut)]) == 0


def test_a_file_system_without_locks_is_warned_of(cut, monkeypatch, capsys):
    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert train.main(["--resume", str(cut)]) == 0
    assert f"{cut} cannot be locked (" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["a file elsewhere", "a folder elsewhere", "a name for it", "a chain"])
def test_links_to_checkpoints_are_followed(form, cut, whole, tmp_path):
    """A run's own checkpoint may be a link, its folder too, and a link outside may name one."""
    path, elsewhere = checkpoint.path_of(cut, 4), tmp_path / "disk"
    elsewhere.mkdir()
    given = path
    if form == "a file elsewhere":
        shutil.move(path, elsewhere / "big.safetensors")
        path.symlink_to(elsewhere / "big.safetensors")
    elif form == "a folder elsewhere":
        shutil.move(cut / "checkpoints", elsewhere / "saved")
        (cut / "checkpoints").symlink_to(os.path.relpath(elsewhere / "saved", cut))
    else:
        given = elsewhere / "latest.safetensors"
        given.symlink_to(os.path.relpath(path, elsewhere))
    if form == "a chain":
        (tmp_path / "newest").symlink_to(given)
        given = tmp_path / "newest"
    run = resumed(given)
    assert run.folder.samefile(cut) and differing(final(cut), final(whole)) == []


def test_a_checkpoint_outside_of_a_run_is_no_run(cut, tmp_path):
    path = shutil.copy(checkpoint.path_of(cut, 4), tmp_path / "copy.safetensors")
    with pytest.raises(UserError, match=r"copy\.safetensors must be a checkpoint in a run's folder"):
        resumed(path)
    with pytest.raises(UserError, match=r"must be the newest checkpoint of its run.* move the newer"):
        resumed(checkpoint.path_of(cut, 2))


def test_foreign_files_among_the_checkpoints_stay(cut):
    folder = cut / "checkpoints"
    (folder / ".notes").write_text("mine")
    (folder / ".cache").mkdir()
    (folder / "step-00000009.safetensors").mkdir()
    (folder / ".tmpA1b2C3").write_bytes(b"half")
    assert resumed(cut).state.step == 6
    assert (folder / ".notes").exists() and (folder / ".cache").exists()
    assert not (folder / ".tmpA1b2C3").exists()


FOREIGN = {
    "a list": b"[3, 4]",
    "null": b"null",
    "a number": b"3",
    "no step": b'{"loss": 1.0}',
    "a step of text": b'{"step": "2"}',
    "a step that is true": b'{"step": true}',
    "bytes": b"\xff\xfe\x00",
    "nested": b"[" * 100_000,
    "empty": b"",
}


@pytest.mark.parametrize("end", [b"", b'{"step": 5, "lo'])
@pytest.mark.parametrize("case", FOREIGN)
def test_lines_that_are_no_metrics_are_dropped(case, end, cut, whole, capsys):
    path = cut / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], FOREIGN[case] + b"\n", *lines[2:]]) + end)
    resumed(cut)
    assert metrics(cut) == metrics(whole)
    assert "metrics.jsonl: 1 line(s) that are no metrics are dropped" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "samples", "tensorboard"])
def test_a_folder_where_a_file_belongs_or_the_reverse(name, cut, capsys):
    path = cut / name
    if path.suffix:
        path.unlink()
        path.mkdir()
    else:
        shutil.rmtree(path, ignore_errors=True)
        path.touch()
    options = ["--tensorboard"] if name == "tensorboard" else []
    assert train.main(["--resume", str(cut), *options]) == 1
    error = capsys.readouterr().err
    assert str(path) in error and "Traceback" not in error
    assert checkpoint.list_all(cut)[-1] == checkpoint.path_of(cut, 4)


def test_a_picture_that_a_killed_run_left_out_is_drawn(cut, whole):
    resumed(cut)
    assert pictures(cut) == pictures(whole) and len(pictures(whole)) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("call", [2, 4, 6])
def test_a_stop_at_a_step_with_a_picture(number, call, tmp_path, monkeypatch, whole, capsys):
    """Step 2 has a checkpoint too, 4 has none, and at 6, the last one, only the end is left."""

    def stop(count, out):
        if count == call:
            os.kill(os.getpid(), number)
        return out

    options = arguments(runs=tmp_path, sample_every=2, checkpoint_every=0 if call == 4 else 2)
    with objective_that(monkeypatch, stop):
        assert train.main(options) == 128 + number
    folder = tmp_path / "digits"
    assert f"stopped after step {call} of 6" in capsys.readouterr().err
    assert pictures(folder) == {n: b for n, b in pictures(whole).items() if n <= f"step-{call:08d}.png"}
    assert train.main(["--resume", str(folder)]) == 0
    assert pictures(folder) == pictures(whole) and differing(final(folder), final(whole)) == []
    assert json.loads((folder / "results.json").read_text())["training_steps"] == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_after_the_last_step_and_a_second_one(number, tmp_path, monkeypatch, capsys):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # processes beside a terminal may ignore it

    def scores(*args, **kwargs):
        signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(artifacts.scores, "judge_of", scores)
        assert train.main(arguments(runs=tmp_path)) == 128 + number
    folder, error = tmp_path / "digits", capsys.readouterr().err
    assert f"--resume {folder}" in error and not (folder / "results.json").exists()

    def stop_twice(count, out):
        for _ in range(2 if count == 3 else 0):
            signal.raise_signal(number)
        return out

    with objective_that(monkeypatch, stop_twice):
        assert train.main(arguments(runs=tmp_path, name="twice")) == 128 + number
    assert checkpoint.list_all(tmp_path / "twice") == [checkpoint.path_of(tmp_path / "twice", 2)]
    assert f"--resume {tmp_path / 'twice'}" in capsys.readouterr().err
    assert train.main(["--resume", str(folder)]) == 0 and (folder / "results.json").exists()

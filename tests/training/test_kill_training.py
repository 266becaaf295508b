"""SIGKILL to either process of a run of two, at any moment: the other ends, a resumed run loses nothing."""

import random
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from imf.training import checkpoint
from imf.training.session import how_to_resume
from tests.helpers.tiny_run import arguments, differing
from tests.training.test_distributed_training import start_two

KILLS = 20


def train(*options, wait=True):
    command = [sys.executable, "-m", "imf.train", *map(str, options)]
    runs = start_two(*command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if wait:
        errors = [run.communicate(timeout=300)[1] for run in runs]
        assert [run.returncode for run in runs] == [0, 0], errors
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_killed_at_random_points(sharding, tmp_path):
    draw = random.Random(7)
    killed, left = tmp_path / "killed", tmp_path / "left"
    endless = {"steps": 10**6, "decay": "constant", "checkpoint_every": 2, "keep_checkpoints": 10**6}
    settings = {"runs": tmp_path, "threads": 1, "sharding": sharding}
    options = arguments(name="killed", **settings, **endless)
    reached = 0
    for _ in range(KILLS if sharding == "ddp" else 3):
        runs = train(*options, wait=False)
        deadline = time.monotonic() + 120
        while last_step(killed) < reached + 2 and time.monotonic() < deadline:
            assert all(run.poll() is None for run in runs), [run.communicate()[1] for run in runs]
            time.sleep(0.002)
        time.sleep(draw.random() * 0.3)  # a few steps and checkpoints long
        draw.choice(runs).send_signal(signal.SIGKILL)
        errors = [run.communicate(timeout=120)[1] for run in runs]  # the other one does not wait for ever
        assert sorted(run.returncode == -signal.SIGKILL for run in runs) == [False, True], errors
        assert all(run.returncode != 0 for run in runs)
        assert last_step(killed) >= reached + 2
        checkpoint.read_metadata(checkpoint.find(killed))  # whole, whatever was being written
        reached = last_step(killed)
        options = ["--resume", killed]
    train("--resume", killed, "--steps", reached + 3)
    train(*arguments(name="left", **settings, **endless | {"steps": reached + 3}))
    final = [load_file(checkpoint.path_of(folder, reached + 3)) for folder in (killed, left)]
    assert differing(*final) == [] and len(final[0]) > 100
    assert not list((killed / "checkpoints").glob(".*"))
    assert f"--resume {killed}" in how_to_resume(killed, 2)


def last_step(folder):
    found = checkpoint.list_all(folder)
    return int(found[-1].stem.partition("-")[2]) if found else 0

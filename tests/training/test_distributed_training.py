"""Training on two processes: gradients and states are those of one, and all stop at the same place."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from imf import distributed as processes
from imf import train
from imf.distributed import DistributedContext, choose_device
from imf.program import UserError
from imf.training import checkpoint
from imf.training.graphs import WARMUP_OF_DDP
from tests.helpers.distributed_training import FORMS
from tests.helpers.tiny_run import arguments

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch is built without distributed"
)


def start_two(*command, **options):
    """Two processes of a command as torchrun would start them, which know of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    shared["PYTHONFAULTHANDLER"] = "1"  # one that aborts says where
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | shared | {"PYTHONPATH": path}
    return [
        subprocess.Popen(command, env=environment | {"RANK": rank, "LOCAL_RANK": rank}, text=True, **options)
        for rank in "01"
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def results(folder):
    """What both processes found, one after the other."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    runs = start_two(sys.executable, "-m", "tests.helpers.distributed_training", str(folder), **pipes)
    outputs = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs[0][1][-12000:] + outputs[1][1][-12000:]
    found = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    assert [one["place"] for one in found] == [[0, 2], [1, 2]]
    return found


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_two_processes_are_those_of_one(form, results):
    for found in results:
        assert found[form] < 2e-6, form  # relative, of the norm of the worst weight's, in fp32
        assert found["other draws"] > 1e-2  # the measure can tell


def test_ddp_and_fsdp_train_alike(results, folder):
    ddp, fsdp = (load_file(checkpoint.path_of(folder / name, 6)) for name in ("ddp", "fsdp"))
    assert ddp.keys() == fsdp.keys()
    for name, x in ddp.items():
        assert torch.linalg.vector_norm(x - fsdp[name]) <= 1e-4 * torch.linalg.vector_norm(x) + 1e-6, name


def test_a_sharded_run_comes_back_as_it_was(results):
    for found in results:
        assert found["fsdp resumed as it was"] == 0 and found["ddp resumed as fsdp"] == 0
        assert found["different runs"] > 10


def test_a_run_of_two_processes_goes_on_in_one(results, folder, capsys):
    status = train.main(["--resume", str(folder / "fsdp"), "--sharding", "ddp", "--steps", "8"])
    assert status == 0 and checkpoint.read_metadata(checkpoint.path_of(folder / "fsdp", 8)).step == 8
    error = capsys.readouterr().err
    assert "processes was 2, now it is 1" in error and "sharding was fsdp, now it is ddp" in error
    lines = [json.loads(line) for line in (folder / "fsdp" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_what_is_not_finite_in_one_process_reaches_no_weight_of_any(sharding, results):
    for text, gate, agreed, checkpoints in (found[f"not finite {sharding}"] for found in results):
        assert text.startswith("stopped at step 3: loss_u is nan") and gate and agreed and checkpoints == 1


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_a_signal_to_one_process_stops_all_at_the_same_step(sharding, results):
    for found in results:
        assert found[f"stopped {sharding}"] == [15, 3, ["step-00000003.safetensors"]]


def test_errors_of_one_process_end_all(results, folder):
    for found in results:
        text, agreed = found["full disk"]
        assert (
            "could not write the checkpoint of step 4: " in text
            and "Last good checkpoint: " in text
            and agreed
        )
        assert "must be a multiple of the 2 processes, got 9 / 1 = 9" in found["batch"]
    assert checkpoint.list_all(folder / "full")[-1] == checkpoint.path_of(folder / "full", 2)


@pytest.mark.parametrize(("form", "accumulate"), [("replayed", 1), ("replayed, accumulated", 2)])
def test_replayed_steps_train_as_eager_ones(form, accumulate, results):
    first, second = (found[form] for found in results)
    replays = first["replays"]
    assert replays == second["replays"] and len(replays) > accumulate
    assert sum(replays.values()) == accumulate * (24 - WARMUP_OF_DDP)
    for found in first, second:
        assert found["terms"] < 1e-5 and found["state"] < 1e-5


WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"WORLD_SIZE": None, "MASTER_PORT": None}, "but not WORLD_SIZE, MASTER_PORT: start with torchrun"),
        ({"RANK": "2"}, "RANK below WORLD_SIZE; got RANK=2, WORLD_SIZE=2"),
        ({"LOCAL_RANK": "a"}, "must have numbers as RANK"),
    ],
)
def test_what_torchrun_did_not_set_is_named(change, message, monkeypatch, tmp_path, capsys):
    for name, value in (WHOLE | change).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert train.main(arguments(runs=tmp_path)) == 1
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_addresses_alone_ask_for_nothing(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, WHOLE[name])
    with processes.initialized("cpu") as who:
        assert who == DistributedContext(device=torch.device("cpu")) and who.first and not who.grouped


@pytest.mark.parametrize(
    ("device", "local_rank", "message"),
    [
        ("cuda", 2, "process 2 of this machine has no GPU of its own: PyTorch sees 2"),
        ("cuda:1", 0, "got cuda:1"),
    ],
)
def test_a_gpu_for_each_process(device, local_rank, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=message):
        processes._own_gpu(choose_device(device), local_rank, 4)


def test_sharding_needs_processes(tmp_path, capsys):
    assert train.main(arguments(runs=tmp_path, sharding="fsdp")) == 1
    assert "--sharding fsdp needs processes: start with torchrun" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

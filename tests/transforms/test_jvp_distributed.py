"""`imf_kernels.jvp` through DDP and FSDP2: two processes' gradients equal one's."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch is built without distributed")
def test_gradients_of_two_processes_equal_those_of_one(kind, tmp_path):
    command = [sys.executable, "-m", "tests.helpers.distributed_jvp", kind]
    pipes = {"cwd": Path(__file__).parents[2], "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    runs = [
        subprocess.Popen([*command, str(rank), "2", tmp_path / "store"], text=True, **pipes)
        for rank in range(2)
    ]
    outputs = [run.communicate(timeout=300) for run in runs]
    assert [out for out, _ in outputs] == ["equal\n"] * 2, outputs[0][1][-3000:] + outputs[1][1][-3000:]

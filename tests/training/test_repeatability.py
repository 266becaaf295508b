"""Two runs of one seed in two processes on one machine are equal to the bit."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from imf.training import checkpoint
from tests.helpers.tiny_run import arguments, differing

# Wide enough for the products of linear layers to lie on both sides of the border that gemm.py draws.
NETWORK = {"hidden_size": 96, "num_heads": 2, "batch_size": 64, "patch_size": 2}
PROGRAM = """
import sys, torch
torch.use_deterministic_algorithms(sys.argv[1] == "deterministic")
from imf import train
sys.exit(train.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("algorithms", ["any", "deterministic"])
def test_two_processes_train_alike(algorithms, tmp_path):
    """Side by side, so that neither has the processor for itself: no measured time may decide anything."""
    running = []
    waiting = os.environ | {"OMP_WAIT_POLICY": "passive"}  # waiting threads leave the cores alone
    for name in ("one", "other"):
        options = arguments(runs=tmp_path, name=name, threads=2, steps=3, precision="auto", **NETWORK)
        command = [sys.executable, "-c", PROGRAM, algorithms, *options]
        running.append(
            subprocess.Popen(
                command, env=waiting, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        )
    errors = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    states = [load_file(checkpoint.path_of(tmp_path / name, 3)) for name in ("one", "other")]
    assert len(states[0]) > 100 and differing(*states) == []
    assert all(torch.isfinite(x).all() for x in states[0].values())

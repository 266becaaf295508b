"""What training steps ask of a GPU, on one that is not there: tests/cuda_runtime, whose kernels do nothing.

It needs a build of PyTorch for CUDA. That numbers are right is tested elsewhere.
"""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "tests" / "cuda_runtime"
PACKAGES = Path(torch.__file__).parents[1]
# PyTorch's wheels bring the headers of their CUDA, but for crt/, which Triton has.
HEADERS = PACKAGES / "nvidia" / "cu13" / "include", PACKAGES / "triton" / "backends" / "nvidia" / "include"


def missing():
    """Why it cannot run here; `None` where it can."""
    if not (torch.version.cuda or "").startswith("13."):
        return f"needs PyTorch for CUDA 13, this one is for {torch.version.cuda or 'CPUs'}"
    if torch.cuda.is_available():
        return "this machine has a GPU"
    if without := [str(folder) for folder in HEADERS if not folder.is_dir()]:
        return f"no headers in {', '.join(without)}"
    return None if shutil.which("g++") else "no g++"


pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The runtime, compiled, under the name with which Triton links."""
    path = tmp_path_factory.mktemp("cuda_runtime") / "libcuda.so.1"
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command += [f"-Wl,-soname,{path.name}", f"-I{HEADERS[0]}", "-idirafter", HEADERS[1]]
    subprocess.run([*command, "-o", path, *SOURCES.glob("*.cpp")], check=True)
    return path


def environment_with(library):
    """The environment of a process with the runtime."""
    others = ("TRITON_INTERPRET", "CUBLAS_WORKSPACE_CONFIG")  # of tests/conftest.py
    environment = {name: value for name, value in os.environ.items() if name not in others}
    environment |= {"LD_PRELOAD": str(library), "TRITON_LIBCUDA_PATH": str(library.parent)}
    return environment | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def records(library, *jobs, grouped=False):
    """Runs jobs of tests/helpers/steps_without_gpu.py in a process; their records."""
    environment = environment_with(library)
    if grouped:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environment["MASTER_PORT"] = str(free.getsockname()[1])
        environment |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    out = library.parent / "records.json"
    command = [sys.executable, "-m", "tests.helpers.steps_without_gpu", json.dumps(jobs), out]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=1000)
    return json.loads(out.read_text())


def faults(record, mode, launches, captured, silus):
    """What a run did, after its first steps, that it must not, as pairs of a kind and details.

    Steps that capture may wait, as `torch.cuda.graph` does before it begins, and take their time.
    launches, captured, silus: at most, of a step outside of captures and in one, and its host time.
    """
    found = [("error", message) for message in record["errors"]]
    if record["reserved"] > 1.3 * record["allocated"]:
        found.append(("memory", f"reserved {record['reserved']:,}, allocated {record['allocated']:,}"))
    plain = []
    for step in record["steps"][mode.warmup :]:
        captures = any(kind == "capture" for kind, _ in step["rest"])
        for kind, details in step["rest"]:
            if kind == "launch":
                found.append(("outside", details))
            elif kind == "refused" or (kind == "wait" and not captures) or "from the device" in details:
                found.append((kind, details))
        if step["captured"] > captured:
            found.append(("launches", f"{step['captured']} captured, at most {captured}"))
        if not captures:
            plain.append(step)
            if step["launches"] > launches:
                found.append(("launches", f"{step['launches']}, at most {launches}"))
    if plain:  # the least of each: on a busy machine others take longer
        host = min(step["seconds"] for step in plain) / min(step["silu"] for step in plain)
        if host > silus:
            found.append(("host", f"the time of {host:,.0f} launches of silu, at most {silus:,}"))
    return found


class Mode(NamedTuple):
    """A way to train."""

    options: dict  # of TrainConfig
    warmup: int  # first steps: they compile kernels, meet the sizes of graphs, and DDP times them
    grouped: bool = False  # under DDP


MODES = {
    "eager": Mode({}, warmup=1),
    "checkpointing": Mode({"checkpointing": True}, warmup=1),
    "graphs": Mode({"cuda_graphs": True}, warmup=4),
    "graphs, DDP": Mode({"cuda_graphs": True}, warmup=11, grouped=True),
    "graphs, accumulation": Mode({"cuda_graphs": True, "accumulate": 2}, warmup=2),
    "graphs, checkpointing": Mode({"cuda_graphs": True, "checkpointing": True}, warmup=4),
    "graphs, both, DDP": Mode(
        {"cuda_graphs": True, "accumulate": 2, "checkpointing": True}, warmup=11, grouped=True
    ),
    "compiled": Mode({"compile": True}, warmup=2),
}
BATCHES = {"digits": 128, "iMF-B/2": 128, "iMF-XL/2": 32}
# With PyTorch 2.11 and Triton 3.6: launches of a step, or of a replay, those that the graph holds, and the
# host's time relative to a launch of `silu`; of replays 600 to 2,000 were measured. A step of two micro-steps
# replays twice.
STEPS = {
    ("digits", "eager"): (734, 0, 11_000),
    ("digits", "checkpointing"): (893, 0, 16_000),
    ("digits", "graphs"): (20, 731, 1_500),
    ("digits", "graphs, DDP"): (20, 855, 1_500),
    ("digits", "graphs, accumulation"): (40, 1_600, 3_000),
    ("digits", "graphs, checkpointing"): (20, 842, 1_500),
    ("digits", "compiled"): (812, 0, 13_000),
    ("iMF-B/2", "eager"): (1_309, 0, 24_000),
    ("iMF-B/2", "checkpointing"): (1_665, 0, 32_000),
    ("iMF-B/2", "graphs"): (20, 1_306, 1_500),
    ("iMF-B/2", "graphs, DDP"): (20, 1_559, 1_500),
    ("iMF-B/2", "graphs, accumulation"): (40, 2_864, 3_000),
    ("iMF-B/2", "graphs, both, DDP"): (40, 3_789, 3_000),
    ("iMF-XL/2", "eager"): (3_654, 0, 70_000),
    ("iMF-XL/2", "checkpointing"): (4_966, 0, 105_000),
    ("iMF-XL/2", "graphs"): (20, 3_651, 1_500),
    ("iMF-XL/2", "graphs, DDP"): (20, 4_330, 1_500),
    ("iMF-XL/2", "graphs, both, DDP"): (40, 11_064, 3_000),
}


def limits(network, mode):
    """Of the launches 1.05 times what was measured, of the host's time twice that."""
    launches, captured, silus = STEPS[network, mode]
    return math.floor(1.05 * launches), math.floor(1.05 * captured), 2 * silus


@pytest.mark.parametrize(("network", "mode"), STEPS)
def test_a_step_never_waits_and_asks_little_of_the_host(library, network, mode):
    steps = MODES[mode].warmup + 6
    job = {"network": network, "batch": BATCHES[network], "steps": steps, "options": MODES[mode].options}
    (record,) = records(library, job, grouped=MODES[mode].grouped)
    assert faults(record, MODES[mode], *limits(network, mode)) == []
    captured = [step["captured"] > 0 for step in record["steps"]]
    assert len(captured) == steps and any(captured) == ("graphs" in mode)
    assert record["steps"][captured.index(False, MODES[mode].warmup)]["launches"] > 0


# The mode, one of FAULTS in tests/helpers/steps_without_gpu.py, what is to be found. After a capture that
# failed the process is of no use.
PLANTED = {
    "eager": [
        ("eager", "item", {"copy", "wait"}),
        ("eager", "synchronize", {"wait"}),
        ("eager", "launches", {"launches"}),
        ("eager", "host", {"host"}),
        ("eager", "memory", {"memory"}),
    ],
    "graphs": [("graphs", "launches", {"launches"}), ("graphs", "outside", {"outside"})],
    "not joined": [("graphs", "not joined", {"refused", "error"})],
    "item": [("graphs", "item", {"copy", "refused", "error"})],
    "synchronize": [("graphs", "synchronize", {"refused", "error"})],
}


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_what_a_step_must_not_do_is_found(library, planted):
    job = {"network": "digits", "batch": BATCHES["digits"]}
    jobs = [
        job | {"steps": MODES[mode].warmup + 4, "options": MODES[mode].options, "fault": fault}
        for mode, fault, _ in planted
    ]
    for (mode, fault, kinds), record in zip(planted, records(library, *jobs), strict=True):
        found = faults(record, MODES[mode], *limits("digits", mode))
        assert {kind for kind, _ in found} == kinds, (fault, found)


def test_the_driver_is_given_what_launchers_are(library):
    """Grids, addresses and numbers of launches without Triton, also of replayed ones and on other tensors."""
    command = [sys.executable, "-m", "tests.helpers.launches_without_gpu"]
    subprocess.run(command, check=True, cwd=ROOT, env=environment_with(library), timeout=1000)

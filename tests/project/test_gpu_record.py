"""The record of a GPU comes back whole: with a Python in PYTHON's place that stands for the machine."""

import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_record.sh"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="takes GNU's env, timeout and tar")

# A CUDA compiler that fails, a GPU, two tests of which one never ends, benchmarks that end well.
PYTHON = """#!{python}
import os, sys
arguments = sys.argv[1:]
if arguments[:2] == ["-m", "pip"]:
    sys.exit("no kernel image" if os.environ.get("IMF_CUDA") == "ON" else 0)
if arguments[:2] == ["-m", "pytest"] and "--collect-only" not in arguments:
    assert arguments[arguments.index("-m", 1) :][:2] == ["-m", "gpu"] and "-n" in arguments
    xml = arguments[arguments.index("--junitxml") + 1]
    os.environ["PYTEST_ADDOPTS"] = ""
    options = ["-n", "2", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", "{folder}"]
    os.execv(sys.executable, [sys.executable, "-m", "pytest", "{folder}", *options, "--junitxml", xml])
"""
TESTS = """
import pathlib, time

def test_that_fails():
    pathlib.Path("{folder}/failing").touch()
    assert "a wrong gradient" == ""

def test_that_never_ends():
    while not pathlib.Path("{folder}/failing").exists():
        time.sleep(0.1)
    time.sleep(1)  # until the other one has been heard of
    pathlib.Path("{folder}/began").touch()
    time.sleep(600)
"""


@pytest.fixture
def machine(tmp_path):
    """Starts the script there; its record is tmp_path / "a-gpu.tgz"."""
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_gpu.py").write_text(TESTS.format(folder=tmp_path))
    python, nvcc = tmp_path / "python", tmp_path / "nvcc"
    python.write_text(PYTHON.format(python=sys.executable, folder=folder))
    nvcc.write_text("#!/bin/sh\n")
    for program in (python, nvcc):
        program.chmod(0o755)

    def start(*stages, **environment):
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", SCRIPT, tmp_path / "a-gpu.tgz", *stages],
            env={**os.environ, "PATH": path, "PYTHON": str(python), "PROCESSES": "2"} | environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    return start


def read(record, name):
    with tarfile.open(record) as archive:
        return archive.extractfile(f"a-gpu/{name}").read().decode()


def stages(record):
    rows = [line.split("\t") for line in read(record, "stages.tsv").splitlines()]
    assert rows[0] == ["stage", "exit code", "seconds"]
    return {name: code for name, code, _ in rows[1:]}


def test_what_is_cut_short_is_in_the_record(machine, tmp_path):
    """A build without CUDA where that with it fails; on a signal the tests still say which of them failed."""
    running = machine("tests", "benchmarks")
    while not (tmp_path / "began").exists():
        assert running.poll() is None, running.stdout.read()
        time.sleep(0.1)
    record = tmp_path / "a-gpu.tgz"
    assert stages(record) == {"build": "1", "build_without_cuda": "0", "info": "0"}
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 1, running.stdout.read()
    codes = stages(record)
    assert codes.pop("tests") not in ("0", "137") and codes.pop("benchmarks") == "no time left"
    assert "no kernel image" in read(record, "build.log")
    assert "a wrong gradient" in read(record, "tests.log")
    assert ElementTree.fromstring(read(record, "tests.xml")).find(".//failure") is not None
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a-gpu.tgz", "tests", "python", "nvcc", "failing", "began"}


def test_the_time_limit_ends_a_stage_and_those_after_it(machine, tmp_path):
    running = machine("tests", TIME_LIMIT="0")
    assert running.wait(60) == 1
    codes = stages(tmp_path / "a-gpu.tgz")
    assert codes == dict.fromkeys(("build", "build_without_cuda", "info", "tests"), "no time left")

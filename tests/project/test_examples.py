"""Every program in examples/ runs as a user runs it, at small sizes, and is as short as the documents say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {
    "quickstart.py": "--tokens 16 --width 48 --depth 1",
    "own_loop.py": "--epochs 1",
    "own_network.py": "u_vit --steps 3 --batch 8 --width 16",
}
MOST_LINES = {"quickstart.py": 79, "own_loop.py": 40, "own_network.py": 150}


def run(name, folder):
    """The output of an example, run in an empty folder."""
    command = [sys.executable, str(EXAMPLES / name), *SMALL[name].split()]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=600, cwd=folder, env=environment, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_every_example_is_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SMALL)


@pytest.mark.parametrize("name", MOST_LINES)
def test_length(name):
    assert len((EXAMPLES / name).read_text().splitlines()) <= MOST_LINES[name]


def test_quickstart(tmp_path):
    lines = run("quickstart.py", tmp_path).splitlines()
    assert [line.split()[0] for line in lines] == ["u", "torch.func.jvp", "imf_kernels.jvp"]
    for line in lines[1:]:
        errors = [float(x) for x in re.findall(r"\d\.\de-\d\d", line)]
        assert len(errors) == 3 and max(errors) < 1e-5, line


def test_own_loop(tmp_path):
    assert re.search(r"epoch 0: loss_u \d+\.\d+, loss_v \d+\.\d+", run("own_loop.py", tmp_path))
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_own_network(tmp_path):
    run("own_network.py", tmp_path)
    assert (tmp_path / "runs" / "u_vit" / "checkpoints" / "step-00000003.safetensors").is_file()
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")

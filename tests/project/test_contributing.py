"""CONTRIBUTING.md's page on adding an operation names the files that it takes, and no more."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPERATION = "gated_residual"
NAME = rf"{OPERATION}(?!_rms_norm)"  # another operation
PRINTED = "imf_kernels/_C.pyi"


def naming(folder):
    """Files of a folder that name the operation."""
    for path in (ROOT / folder).rglob("*"):
        if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh", ".txt"} and re.search(NAME, path.read_text()):
            yield str(path.relative_to(ROOT))


def test_the_files_of_an_operation():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`((?:csrc|imf_kernels|tests)/[\w/.]+)`", page)) - {"csrc/tensor.h", PRINTED}
    named |= {"imf_kernels/testing/plain.py"} if "and `plain.py`" in page else set()
    needed = {*naming("csrc"), *naming("imf_kernels"), "tests/ops/test_bad_calls.py"}
    needed -= {"imf_kernels/nn/blocks.py"}  # which calls operations
    assert needed == named
    assert len(needed) <= 8
    assert OPERATION not in (ROOT / "CMakeLists.txt").read_text()

"""Writes imf_kernels/backends/verified.py from the records of GPUs: `python -m benchmarks.tools.verified`.

A record is a folder of benchmarks/results, unpacked from the archive of benchmarks/gpu_record.sh. Its GPU is
verified where the build and the GPU's tests ended well and tests of the `cuda` backend were among them.
"""

from __future__ import annotations

import csv
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS, TARGET = ROOT / "benchmarks" / "results", ROOT / "imf_kernels" / "backends" / "verified.py"

TEXT = '''"""GPUs on which a committed record shows passing tests; benchmarks/tools/verified.py writes it."""

# Architectures on which the compiled CUDA kernels are the default.
CUDA: frozenset[str] = frozenset({names})
'''


def architecture(record: Path) -> str | None:
    """ "sm_90", …, of a record that verifies it; `None` of another."""
    stages, tests, machine = record / "stages.tsv", record / "tests.xml", record / "machine.txt"
    if not (stages.exists() and tests.exists() and machine.exists()):
        return None
    with stages.open(newline="") as file:
        codes = {row["stage"]: row["exit code"] for row in csv.DictReader(file, delimiter="\t")}
    if codes.get("build") != "0" or codes.get("tests") != "0":
        return None
    cases = [case for case in ElementTree.parse(tests).iter("testcase") if "[cuda-" in case.get("name", "")]
    if not any(len(case) == 0 for case in cases):  # one that was skipped or failed says so inside
        return None
    # name, driver_version, memory.total, compute_cap, clocks: the order in which the record asks for them
    found = re.search(r"^[^,\n]+, [^,\n]+, [^,\n]+, (\d+)\.(\d+), ", machine.read_text(), re.MULTILINE)
    return f"sm_{found[1]}{found[2]}" if found else None


def text(results: Path) -> str:
    """What the records say, as the module."""
    names = sorted(
        {name for record in results.iterdir() if record.is_dir() if (name := architecture(record))}
    )
    listed = ", ".join(f'"{name}"' for name in names)
    return TEXT.format(names=f"{{{listed}}}" if names else "")


if __name__ == "__main__":
    TARGET.write_text(text(RESULTS))

"""Writes imf_kernels/backends/records.json from the records of GPUs: `python -m benchmarks.tools.verified`.

A record is a folder of benchmarks/results, unpacked from the archive of benchmarks/gpu_record.sh. Its
architecture is verified where all tests of the operations passed, those of the `triton` backend among them.
`cuda` is the default of attention there if its tests passed too and, in the benchmarks, it is no slower than
Triton's kernels.
"""

from __future__ import annotations

import csv
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS, TARGET = ROOT / "benchmarks" / "results", ROOT / "imf_kernels" / "backends" / "records.json"
ATTENTION = "scaled_dot_product_attention"


def architecture(record: Path) -> str | None:
    """Returns "sm_90", …, of a record that verifies it; `None` for another."""
    stages, tests, machine = record / "stages.tsv", record / "tests.xml", record / "machine.txt"
    if not (stages.exists() and tests.exists() and machine.exists()):
        return None
    with stages.open(newline="") as file:
        codes = {row["stage"]: row["exit code"] for row in csv.DictReader(file, delimiter="\t")}
    if codes.get("tests") not in ("0", "1") or not passed(record, "triton"):  # 1: to the end, with failures
        return None
    # name, driver_version, memory.total, compute_cap, clocks: the order in which the record asks for them
    found = re.search(r"^[^,\n]+, [^,\n]+, [^,\n]+, (\d+)\.(\d+), ", machine.read_text(), re.MULTILINE)
    return f"sm_{found[1]}{found[2]}" if found else None


def passed(record: Path, backend: str, operation: str = "") -> bool:
    """Returns whether there were tests of the operations on a backend, and none of them failed."""
    cases = ElementTree.parse(record / "tests.xml").iter("testcase")
    asked = [
        case
        for case in cases
        if case.get("classname", "").startswith("tests.ops.")
        and re.search(rf"[\[-]{backend}[\]-]", case.get("name", ""))
        and operation in case.get("name", "")
    ]
    outcomes = [{child.tag for child in case} for case in asked]
    return set() in outcomes and not any({"failure", "error"} & tags for tags in outcomes)


def is_faster(record: Path) -> bool:
    """Returns whether attention by `cuda` takes no longer than Triton's, with tangents and without."""
    file = record / "benchmarks.json"
    if not file.exists():
        return False
    figures = [f for f in json.loads(file.read_text())["figures"] if f["operation"] == ATTENTION]
    seconds = {(f["case"], f["dtype"], f["form"]): f.get("device seconds", f["seconds"]) for f in figures}
    pairs = [
        (seconds[case, dtype, form.replace("cuda", "triton")], time)
        for (case, dtype, form), time in seconds.items()
        if form in ("dual, cuda", "primal, cuda")
    ]
    return bool(pairs) and sum(time for _, time in pairs) <= sum(time for time, _ in pairs)


def text(results: Path) -> str:
    """Returns what the records say: the operations whose default is `cuda`, by verified architecture."""
    found: dict[str, list[str]] = {}
    for record in sorted(path for path in results.iterdir() if path.is_dir()):
        if name := architecture(record):
            found[name] = [ATTENTION] if passed(record, "cuda", ATTENTION) and is_faster(record) else []
    return json.dumps(found, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text(RESULTS))

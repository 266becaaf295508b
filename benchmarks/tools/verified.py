"""Writes imf_kernels/backends/records.json from the records of GPUs: `python -m benchmarks.tools.verified`.

A record is a folder of benchmarks/results, unpacked from the archive of benchmarks/gpu_record.sh. It
verifies its architecture, for the kernels whose digests are in its sources.json, where all tests of the
operations on the `triton` backend passed. What it says of `cuda` counts if the tests of that passed too:
`cuda` is the default of attention where it is faster than Triton's kernels in the benchmarks.
"""

from __future__ import annotations

import csv
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from imf_kernels.backends.verified import ON_GPU, Record

ROOT = Path(__file__).resolve().parents[2]
RESULTS, TARGET = ROOT / "benchmarks" / "results", ROOT / "imf_kernels" / "backends" / "records.json"
ATTENTION = "scaled_dot_product_attention"
# Name, driver_version, memory.total, compute_cap, clocks: the order in which the record asks for them.
_DEVICE = re.compile(r"^([^,\n]+), [^,\n]+, [^,\n]+, (\d+)\.(\d+), ", re.MULTILINE)


def architecture(record: Path) -> str | None:
    """Returns "sm_90", …, of a record that verifies it; `None` for another."""
    stages, tests, machine = record / "stages.tsv", record / "tests.xml", record / "machine.txt"
    if not (stages.exists() and tests.exists() and machine.exists()):
        return None
    with stages.open(newline="") as file:
        codes = {row["stage"]: row["exit code"] for row in csv.DictReader(file, delimiter="\t")}
    if codes.get("tests") not in ("0", "1") or not passed(record, "triton"):  # 1: to the end, with failures
        return None
    found = _DEVICE.search(machine.read_text())
    return f"sm_{found[2]}{found[3]}" if found else None


def tests(record: Path, backend: str) -> dict[str, set[str]]:
    """Returns the outcomes of the tests of the operations on a backend, by name: none where one passed."""
    return {
        case.get("name", ""): {child.tag for child in case}
        for case in ElementTree.parse(record / "tests.xml").iter("testcase")
        if case.get("classname", "").startswith("tests.ops.")
        and re.search(rf"[\[-]{backend}[\]-]", case.get("name", ""))
    }


def passed(record: Path, backend: str) -> bool:
    """Returns whether there were tests of the operations on a backend, and none of them failed."""
    outcomes = tests(record, backend).values()
    return set() in outcomes and not any({"failure", "error"} & tags for tags in outcomes)


def results(record: Path, backend: str) -> dict[str, dict[str, None]]:
    """Returns by operation the dtypes in which the error rule held."""
    found: dict[str, dict[str, None]] = {}
    for name, outcome in sorted(tests(record, backend).items()):
        case = re.match(rf"test_error_rule\[(\w+) .*\b(float32|bfloat16|float16)-{backend}\]", name)
        if case and not outcome:
            found.setdefault(case[1], {})[case[2]] = None
    return found


def ratio(record: Path) -> float | None:
    """Returns the time of attention by `cuda`, with tangents and without, relative to Triton's, if known."""
    file = record / "benchmarks.json"
    if not file.exists():
        return None
    figures = [f for f in json.loads(file.read_text())["figures"] if f["operation"] == ATTENTION]
    seconds = {(f["case"], f["dtype"], f["form"]): f.get("device seconds", f["seconds"]) for f in figures}
    pairs = [
        (time, seconds[case, dtype, form.replace("cuda", "triton")])
        for (case, dtype, form), time in seconds.items()
        if form in ("dual, cuda", "primal, cuda")
    ]
    return round(sum(t for t, _ in pairs) / sum(t for _, t in pairs), 3) if pairs else None


def record_of(folder: Path, name: str) -> Record:
    """Returns the record of a folder that verifies an architecture."""
    machine = (folder / "machine.txt").read_text()
    device, commit = _DEVICE.search(machine), re.search(r"^commit (\w+)", machine, re.MULTILINE)
    assert device and commit
    made = json.loads((folder / "sources.json").read_text())
    by_backend = {backend: results(folder, backend) for backend in ON_GPU if passed(folder, backend)}
    by_operation: dict[str, dict[str, dict[str, None]]] = {}
    for backend, operations in by_backend.items():
        for operation, dtypes in operations.items():
            by_operation.setdefault(operation, {})[backend] = dtypes
    found = ratio(folder) if "cuda" in by_backend else None
    return Record(
        {"device": f"{device[1]}, {name}", "imf_kernels": made["imf_kernels"], "commit": commit[1][:7]},
        by_operation,
        {} if found is None else {ATTENTION: found},
        {o: {b: made["sources"][o][b] for b in backends} for o, backends in by_operation.items()},
    )


def text(results: Path) -> str:
    """Returns the records by verified architecture, as imf_kernels/backends/verified.py reads them."""
    named = {architecture(path) or "": path for path in sorted(results.iterdir()) if path.is_dir()}
    found = {name: vars(record_of(path, name)) for name, path in sorted(named.items()) if name}
    return json.dumps(found, indent=1) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text(RESULTS))

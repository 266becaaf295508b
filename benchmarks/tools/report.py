"""From what `pytest benchmarks --benchmark-json FILE` wrote to tables in Markdown, a plot, a record to keep.

    python -m benchmarks.tools.report FILE…                     the tables
    python -m benchmarks.tools.report FILE… --record OUT.json  and every figure, with versions, commit
    python -m benchmarks.tools.report FILE… --plot OUT.png      and the plot of the sweeps (needs matplotlib)

A FILE may also be such a record; several are of one machine and commit.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FORWARD = ("primal", "dual reference", "torch.func.jvp", "compiled", "finite differences")
BACKWARD = ("torch.func.jvp and backward", "compiled and backward")
Record = dict[str, Any]


def load(path: Path) -> Record:
    """What a run measured: `benchmarks`, each with its extra information, every round's seconds and, as
    `seconds`, their median; processor, versions and commit. The machine's and its user's names stay out."""
    values = json.loads(path.read_text())
    if "machine_info" not in values:
        return values
    machine, commit = values["machine_info"], values["commit_info"]
    return {
        "processor": machine["cpu"].get("brand_raw", machine["processor"]),
        "processors": machine["cpu"].get("count"),
        "python": machine["python_version"],
        "date": values["datetime"],
        "commit": commit["id"] + (" and changes" if commit["dirty"] else ""),
        "benchmarks": [
            {**b["extra_info"], "seconds": b["stats"]["median"], "rounds": b["stats"]["data"]}
            for b in values["benchmarks"]
        ],
    }


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def operations(records: Sequence[Record]) -> str:
    """A row an operation, case and dtype: our time with the tangent, which share of its bound it reaches
    (FLOPs at the rate of matrix products, or a copy of as many bytes), and the times of other forms over
    ours; then the same with the backward of the primal after it."""
    groups: dict[tuple[str, str, str], dict[str, Record]] = defaultdict(dict)
    for record in records:
        if "operation" in record:
            groups[record["operation"], record["case"], record["dtype"]][record["form"]] = record
    rows = []
    for (operation, case, dtype), forms in groups.items():
        if "dual" not in forms:
            continue
        row = [f"{operation} {case}", dtype]
        for ours, others in (("dual", FORWARD), ("dual and backward", BACKWARD)):
            seconds = forms[ours]["seconds"]
            row += [milliseconds(seconds), f"{bound(forms, ours) / seconds:.0%}"]
            row += [f"{forms[f]['seconds'] / seconds:.2f}×" if f in forms else "" for f in others]
        rows.append(row)
    header = ["operation", "dtype", "dual, ours", "of its bound", *FORWARD]
    return table([*header, "dual and backward, ours", "of its bound", *BACKWARD], rows)


def bound(forms: dict[str, Record], form: str) -> float:
    """Seconds that a form takes at least."""
    if "bound" in forms[form]:
        return forms[form]["bound"]
    copy = forms["copy"]
    return copy["seconds"] * forms[form]["bytes"] / copy["bytes"]


def steps(records: Sequence[Record]) -> str:
    """A row a form of the training step: time, ratio to ours, memory, and where the time goes."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        if "size" in record:
            groups[record["size"], record["dtype"]].append(record)
    rows = []
    for (size, dtype), forms in groups.items():
        for r in forms:
            shares = ", ".join(f"{kind} {share:.0%}" for kind, share in r.get("share of time", {}).items())
            memory = [mebibytes(r.get(f"peak {kind} bytes")) for kind in ("tensor", "resident")]
            times = [milliseconds(r["seconds"]), f"{to_ours(r):.2f}×"]
            rows.append([f"{size}, {dtype}", r["form"], *times, *memory, shares])
    memory = ["peak tensor memory", "peak resident memory"]
    return table(["step", "form", "time", "to ours", *memory, "share of time"], rows)


def networks(records: Sequence[Record]) -> str:
    """A row a network: time and peak memory of ours, and of the other forms over ours."""
    groups: dict[tuple[str, str], dict[str, Record]] = defaultdict(dict)
    for record in records:
        if "network" in record:
            groups[record["network"], record["dtype"]][record["form"]] = record
    others = [form for form in dict.fromkeys(f for forms in groups.values() for f in forms) if form != "ours"]
    rows = []
    for (network, dtype), forms in groups.items():
        if (ours := forms.get("ours")) is None:
            continue
        row = [f"{network}, {dtype}", milliseconds(ours["seconds"]), mebibytes(ours["peak tensor bytes"])]
        for form in others:
            r = forms.get(form)
            if r is None or "fails" in r:
                row.append("" if r is None else "fails")
            else:
                memory = r["peak tensor bytes"] / ours["peak tensor bytes"]
                row.append(f"{to_ours(r):.2f}×, {memory:.2f}×")
        rows.append(row)
    return table(
        ["network", "ours", "peak tensor memory", *(f"{form}: time, memory" for form in others)], rows
    )


def host(records: Sequence[Record]) -> str:
    """A row an operation: microseconds of a call."""
    groups: dict[str, dict[str, Record]] = defaultdict(dict)
    for record in records:
        if "host" in record:
            groups[record["host"]][record["form"]] = record
    names = list(dict.fromkeys(form for forms in groups.values() for form in forms))
    rows = [
        [operation, *(f"{forms[name]['seconds'] * 1e6:.1f} µs" if name in forms else "" for name in names)]
        for operation, forms in groups.items()
    ]
    return table(["operation", *names], rows)


def to_ours(record: Record) -> float:
    """Time over that of ours, round by round."""
    beside = record.get("ours beside", record["rounds"])
    return statistics.median(a / b for a, b in zip(record["rounds"], beside, strict=True))


def mebibytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.0f} MiB"


def plot(records: Sequence[Record], path: Path) -> None:
    """Time and peak tensor memory of a step over the sequence's length and over depth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    for column, (word, label) in enumerate((("tokens", "tokens"), ("depth", "depth"))):
        swept: dict[str, list[tuple[int, Record]]] = defaultdict(list)
        for r in records:
            if word in (point := r.get("point", "").split()):
                number = next(int(part) for part in point if part.isdigit())
                swept[r["form"]].append((number, r))
        for form, points in swept.items():
            points.sort(key=lambda point: point[0])
            x = [number for number, _ in points]
            axes[0][column].plot(x, [r["seconds"] for _, r in points], marker="o", label=form)
            memory = [r["peak tensor bytes"] / 2**30 for _, r in points]
            axes[1][column].plot(x, memory, marker="o", label=form)
        for row, name in enumerate(("seconds a step", "peak tensor memory, GiB")):
            axes[row][column].set(xlabel=label, ylabel=name, ylim=(0, None))
    axes[0][0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--record", type=Path, metavar="OUT.json", dest="out")
    parser.add_argument("--plot", type=Path, metavar="OUT.png")
    arguments = parser.parse_args()
    runs = [load(file) for file in arguments.files]
    records = [record for run in runs for record in run["benchmarks"]]
    run = {**runs[0], "benchmarks": records}
    if arguments.out:
        arguments.out.write_text(json.dumps(run, indent=1) + "\n")
    print(operations(records), steps(records), networks(records), host(records), sep="\n\n")
    if arguments.plot:
        plot(records, arguments.plot)


if __name__ == "__main__":
    main()

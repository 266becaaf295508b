"""The ablations of "Improved Mean Flows" on the digits: every method, at equal steps, from equal batches.

    python -m benchmarks.training.ablations

Runs that the record holds already are not repeated: it can be stopped and continued, and more seeds added.
About an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from imf import data
from imf.distributed import DistributedContext
from imf.evaluation.scores import SAMPLES, Judge, judge_of, sample
from imf.mean_flow.methods import METHODS, network_of
from imf.training import checkpoint, loop
from imf.training.config import TrainConfig
from imf.training.state import Run, initial_state

DEFAULT = TrainConfig()
NETWORK = DEFAULT.network
# One guidance scale for all, ω / (1 − κ) where it is fixed.
SCALE, INTERVAL = 1.25, (0.2, 0.8)
RECIPE: dict[str, Any] = {
    "batch_size": DEFAULT.batch_size,
    "lr": DEFAULT.lr,
    "warmup_steps": DEFAULT.warmup_steps,
    "precision": "bf16",
    "fixed_omega": 1.0,
    "fixed_kappa": 1 - 1 / SCALE,
    "omega": SCALE,
    "t_min": INTERVAL[0],
    "t_max": INTERVAL[1],
}
# Rows of the table: name, method, what differs from the recipe.
ROWS: list[tuple[str, str, dict[str, Any]]] = [
    (METHODS["mf"].text, "mf", {}),
    ("the same with its own 75 % of FM rows", "mf", {"fm_fraction": 0.75}),
    *((method.text, name, {}) for name, method in METHODS.items() if name != "mf" and not method.flow_map),
]
STEPS = 1, 2, 4  # of sampling
BY_HAND = "## The recipe of the default run"  # where the part of the page begins that this does not write
# Columns: title, digits, and how far a value is from what the data have.
FIGURES: dict[str, tuple[str, int, Callable[[float], float]]] = {
    "frechet_distance": ("Fréchet distance (lower is better)", 2, lambda x: x),
    "variance_ratio": ("variance within classes (1 is right)", 2, lambda x: abs(x - 1)),
    "precision": ("precision (higher is better)", 3, lambda x: -x),
    "recall": ("recall (higher is better)", 3, lambda x: -x),
    "accuracy": ("SVC accuracy (higher is better)", 3, lambda x: -x),
}


def configuration(method: str, changes: dict[str, Any], steps: int, seed: int) -> TrainConfig:
    base = replace(DEFAULT, steps=steps, seed=seed, **RECIPE)
    return replace(base, method=method, network=network_of(method, NETWORK), **changes)


def measure(config: TrainConfig, judge: Judge, progress: str) -> dict[str, Any]:
    """Trains, and scores samples in 1, 2 and 4 steps, with guidance and, where that is an input, without."""
    state = initial_state(config, config.precision, DistributedContext())
    run = Run(Path("no files"), config, config.precision, data.load("digits"), state)
    began = time.perf_counter()
    with run.batches() as batches:
        for _ in tqdm(range(config.steps), progress, leave=False, mininterval=10):
            terms = next(loop.steps(run, batches))  # and does not log it
    seconds, labels = time.perf_counter() - began, judge.labels_like(SAMPLES)
    omega, t_min, t_max = config.sampling.values()
    scales = {"guided": omega} | ({"unguided": 1.0} if METHODS[config.method].omega_input else {})
    scores: dict[str, list[dict[str, Any]]] = {}
    for name, scale in scales.items():
        options = {"omega": scale, "t_min": t_min, "t_max": t_max, "seed": config.seed}
        scores[name] = [
            asdict(judge.score(sample(state.ema, labels, steps=n, **options), labels, n)) for n in STEPS
        ]
    return {
        "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in state.model.parameters()),
        "loss_u": float(terms[1]),
        "scores": scores,
    }


def table(record: dict[str, Any]) -> str:
    """The record as a page of Markdown."""
    seeds = sorted({r["seed"] for r in record["runs"]})
    network = record["network"]
    sizes = [
        f"| `{method}` | {name} | {_runs(record, method, changes)[0]['parameters']:,} |"
        for name, method, changes in _present(record)
    ]
    return f"""# Ablations on the digits

Every method (`--method`) after {record["steps"]} steps of {RECIPE["batch_size"]} images, in the order of the
paper's table, each with one thing more than the one before it. Mean ± standard deviation over
{len(seeds)} seeds of [the figures](evaluation.md#while-training) of {SAMPLES:,} samples, by pixels and an
SVC. All else is as in the default run and the same for all: batches and draws of times, noise and dropped
labels of a seed, learning rate and schedule, {RECIPE["precision"]}; width {network["hidden_size"]},
depth {network["depth"]}, of which {network["aux_head_depth"]} in a head.

| `--method` | setting | parameters |
| --- | --- | --- |
{chr(10).join(sizes)}

{chr(10).join(_steps_table(record, n) for n in STEPS)}
{_verdict(record)}

Read it with care: {record["steps"]} steps of a network of a million weights. An accuracy near 1 beside a
variance far below 1 is no success: a network that draws the average of each class gets it.

Guidance of scale {SCALE}: fixed in training in the first rows, in the interval [0, 1]; where the interval is
an input, in [{INTERVAL[0]}, {INTERVAL[1]}]. Without guidance: ω = 1, where ω is an input.

`python -m benchmarks.training.ablations --steps {record["steps"]}` makes the record and this page.
"""


def _runs(record: dict[str, Any], method: str, changes: dict[str, Any]) -> list[dict[str, Any]]:
    return [r for r in record["runs"] if r["method"] == method and r["changes"] == changes]


def _present(record: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """The rows of the table that have been run."""
    return [(name, m, changes) for name, m, changes in ROWS if _runs(record, m, changes)]


def _figures(runs: list[dict[str, Any]], guidance: str, steps: int, figure: str) -> list[float]:
    """The values of a figure in these runs; none where the guidance is no input."""
    scores = (score for run in runs for score in run["scores"].get(guidance, []))
    return [score[figure] for score in scores if score["steps"] == steps]


def _steps_table(record: dict[str, Any], steps: int) -> str:
    """A table of the figures of samples in so many steps."""
    calls = f"{steps} step{'s' if steps > 1 else ''}"
    titles = [title for title, _, _ in FIGURES.values()]
    titles.insert(1, "without guidance")
    lines = [f"## In {calls}\n", f"| setting | {' | '.join(titles)} |", "| --- " * (len(titles) + 1) + "|"]
    for name, method, changes in _present(record):
        runs = _runs(record, method, changes)
        cells = [_spread(_figures(runs, "guided", steps, key), n) for key, (_, n, _) in FIGURES.items()]
        cells.insert(1, _spread(_figures(runs, "unguided", steps, "frechet_distance"), 2))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _verdict(record: dict[str, Any]) -> str:
    """Which of iMF and MF is nearer to the data in one step, figure by figure."""
    imf, mf = (_runs(record, method, {}) for method in ("imf", "mf"))
    if not imf or not mf:
        return ""
    better, worse = [], []
    for key, (title, digits, miss) in FIGURES.items():
        a, b = (statistics.mean(_figures(runs, "guided", 1, key)) for runs in (imf, mf))
        if f"{a:.{digits}f}" == f"{b:.{digits}f}":
            continue
        text = f"{title.partition(' (')[0]} ({a:.{digits}f} against {b:.{digits}f})"
        (better if miss(a) < miss(b) else worse).append(text)
    parts = [
        f"{verb} in {', '.join(found)}" for verb, found in (("better", better), ("worse", worse)) if found
    ]
    return f"In one step iMF is here, compared with MF, {'; '.join(parts)}."


def _spread(values: list[float], digits: int) -> str:
    if not values:
        return ""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Train every method on the digits and compare.")
    parser.add_argument("--steps", type=int, default=DEFAULT.steps, help="of training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--record", type=Path, default=Path("benchmarks/results/ablations.json"))
    parser.add_argument("--table", type=Path, default=Path("docs/ablations.md"))
    arguments = parser.parse_args()
    network = {
        name: getattr(NETWORK, name) for name in ("hidden_size", "depth", "num_heads", "aux_head_depth")
    }
    record: dict[str, Any] = {
        "steps": arguments.steps,
        "recipe": RECIPE,
        "network": network,
        "environment": checkpoint.environment(torch.device("cpu")),
        "runs": [],
    }
    if arguments.record.exists():
        old = json.loads(arguments.record.read_text())
        if any(old[key] != record[key] for key in ("steps", "recipe", "network")):
            parser.error(f"{arguments.record} is of other settings: move it away, or choose another --record")
        if any("scores" not in run for run in old["runs"]):
            parser.error(f"{arguments.record} has no variance, precision and recall: choose another --record")
        record["runs"] = old["runs"]
    done = [(run["method"], run["changes"], run["seed"]) for run in record["runs"]]
    judge = judge_of(data.load("digits"), digits=True)
    for seed in arguments.seeds:
        for name, method, changes in ROWS:
            if (method, changes, seed) not in done:
                config = configuration(method, changes, arguments.steps, seed)
                run = {"method": method, "changes": changes, "seed": seed}
                record["runs"].append(run | measure(config, judge, f"seed {seed}: {name}"))
                arguments.record.write_text(json.dumps(record, indent=1) + "\n")
    text = arguments.table.read_text() if arguments.table.exists() else ""
    kept = text.find(BY_HAND)
    arguments.table.write_text(table(record) + (f"\n{text[kept:]}" if kept >= 0 else ""))
    print(table(record))


if __name__ == "__main__":
    main()

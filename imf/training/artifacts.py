"""Files that a run writes in addition to its log: checkpoints, pictures, final scores."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imf.data.digits import Digits
from imf.evaluation.digits import evaluate, table
from imf.io import naming, replacing, write_json
from imf.sampling import class_grid
from imf.training import checkpoint
from imf.training.checkpoint import Metadata
from imf.training.config import TrainConfig

if TYPE_CHECKING:  # for the annotations
    from imf.training.setup import Run


def save(run: Run) -> None:
    """Writes a checkpoint of the run as it is, then deletes the oldest ones; all processes call it."""
    context, state = run.context, run.state
    metadata = Metadata(
        step=state.step,
        elapsed=run.elapsed,
        config=run.config,
        precision=run.precision,
        environment=checkpoint.environment(context.device, context.count),
        autoencoder=run.dataset.autoencoder,
        class_names=run.dataset.class_names,
    )
    path = checkpoint.path_of(run.folder, state.step)
    networks = {"model": state.model, "ema": state.ema}
    with context.together(run.signals):
        checkpoint.save(path, **networks, optimizer=state.optimizer, metadata=metadata, writes=context.first)
        if context.first:
            checkpoint.prune(run.folder, run.config.keep_checkpoints)


def draw(run: Run, path: Path, steps: int = 1) -> None:
    """Writes a grid of samples of the averaged network, one row per class, always from the same noise.

    Every process draws, since a sharded network needs all of them; the first one writes.
    """
    config = run.config
    names = run.dataset.class_names
    picture = class_grid(run.state.ema, class_names=names, steps=steps, seed=config.seed, **_guidance(config))
    with run.context.together(run.signals), naming(path):
        if run.context.first:
            with replacing(path) as temporary:
                picture.save(temporary, format="PNG")


def draw_due(run: Run, again: bool = True) -> None:
    """Draws the picture that the step just done asks for; after the last step `finish` draws.

    again: also if the file exists; False draws it only where a process was killed after its checkpoint.
    """
    step, config = run.state.step, run.config
    path = run.folder / "samples" / f"step-{step:08d}.png"
    due = 0 < step < config.steps and config.is_due(config.sample_every, step)
    if due and (again or run.context.broadcast(not path.exists())):
        draw(run, path)


def finish(run: Run) -> None:
    """Scores the averaged network in 1, 2 and 4 steps, draws samples, writes results.json, prints the table.

    Only for the digits; `python -m imf.evaluate` scores others.
    """
    config, context = run.config, run.context
    if not isinstance(run.dataset, Digits):
        if context.first:
            print(f"\nThe run is in {run.folder}; python -m imf.evaluate scores it")
        return
    count = 180 * run.dataset.num_classes
    guidance = _guidance(config)
    scores = evaluate(run.state.ema, run.dataset, steps=(1, 2, 4), count=count, seed=config.seed, **guidance)
    pictures = [run.folder / "samples" / f"final-{score.steps}-step.png" for score in scores]
    for score, path in zip(scores, pictures, strict=True):
        draw(run, path, score.steps)
    results = {
        "data": config.data,
        "training_steps": run.state.step,
        "samples": count,
        "seed": config.seed,
        **guidance,
        "scores": [asdict(score) for score in scores],
        "pictures": [str(path.relative_to(run.folder)) for path in pictures],
    }
    with context.together():
        if context.first:
            write_json(run.folder / "results.json", results)
    if context.first:
        print(
            f"\n{table(scores)}\n\n"
            f"{count:,} class-balanced samples of the averaged network (seed {config.seed}) against "
            f"{len(run.dataset):,} images, pixels in [-1, 1];\nomega {guidance['omega']:g}, interval "
            f"[{guidance['t_min']:g}, {guidance['t_max']:g}]. The run is in {run.folder}\n"
            f"Pictures: {', '.join(map(str, pictures))}"
        )


def _guidance(config: TrainConfig) -> dict[str, Any]:
    return dict(zip(("omega", "t_min", "t_max"), config.sampling, strict=True))

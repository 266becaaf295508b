"""Files that a run writes in addition to its log and checkpoints: pictures, scores."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from imf.data.digits import Digits
from imf.evaluation import convnet, quality, scores
from imf.evaluation.scores import Judge, Score
from imf.io import naming, replacing, write_json
from imf.program import UserError
from imf.sampling import class_grid
from imf.training.log import Boards, Log

if TYPE_CHECKING:  # for the annotations
    from imf.training.state import Run

FINAL_STEPS = 1, 2, 4
ROWS = 10  # of a picture, at most


def draw(run: Run, path: Path, steps: int = 1) -> None:
    """Writes a grid of samples of the averaged network, always from the same noise: 10 in a row.

    A row per class, of evenly spaced ones where there are more than `ROWS`; of a single class `ROWS` rows.
    Every process draws, since a sharded network needs all of them; the first one writes.
    """
    config, known = run.config, run.dataset.num_classes
    classes = [0] * ROWS if known == 1 else quality.spaced(torch.arange(known), ROWS).tolist()
    options: dict[str, Any] = {"steps": steps, "seed": config.seed, **config.sampling}
    names = run.dataset.class_names
    picture = class_grid(run.state.ema, classes=classes, class_names=names, **options)
    with run.context.together(run.signals), naming(path):
        if run.context.first:
            with replacing(path) as temporary:
                picture.save(temporary, format="PNG")


def draw_due(run: Run, log: Log | None, again: bool = True) -> None:
    """Draws the picture that the step just done asks for; after the last step `finish` draws.

    again: also if the file exists; False draws it only where a process was killed after its checkpoint.
    """
    step, config = run.state.step, run.config
    path = run.folder / "samples" / f"step-{step:08d}.png"
    due = 0 < step < config.steps and config.is_due(config.sample_every, step)
    if due and (again or run.context.broadcast(not path.exists())):
        draw(run, path)
        with run.context.together(run.signals):
            if log is not None:
                log.boards.picture("samples/1-step", path, step)


def score_due(run: Run, log: Log | None, again: bool = True) -> None:
    """Scores one-step samples of the averaged network after a checkpoint that is due; not of latents.

    again: also if that step has its figures; False measures only where a process was killed before.
    """
    step, config, context = run.state.step, run.config, run.context
    due = step > 0 and config.checkpoint_due(step) and not run.signals.agreed
    if not due or not config.figures or not _are_images(run):
        return
    if not again and context.broadcast(log is not None and log.has_figures(step)):
        return
    score = score_samples(run, 1, config.figures)
    with context.together(run.signals):
        if log is not None:
            text = (
                f"step {step}: {scores.line(score)}"
                if score
                else (f"imf.train: warning: step {step}: the samples are not finite, so they have no figures")
            )
            log.add_figures(step, config.figures, score.figures if score else {}, text)


def score_samples(run: Run, steps: int, count: int) -> Score | None:
    """Scores `count` samples of the averaged network; None if they are not finite, and on other processes.

    Every process samples its part, the first one scores. Seed and guidance are those of the run.
    """
    context, config = run.context, run.config
    with context.together():
        if context.first and run.judge is None:
            run.judge = scores.judge_of(
                run.dataset,
                config.extractor,
                digits=isinstance(run.dataset, Digits),
                path=run.folder / convnet.FILE,
                device=context.device,
            )
    labels = context.broadcast(run.judge.labels_like(count) if run.judge else None)
    samples = scores.sample(
        run.state.ema,
        labels,
        seed=config.seed,
        batch_size=max(1, config.micro_batch_size // context.count),
        processes=context,
        title=f"{count:,} samples in {steps} step{'s' if steps > 1 else ''}",
        steps=steps,
        **config.sampling,
    )
    score = None
    with context.together():
        if run.judge and samples.isfinite().all():
            score = run.judge.score(samples, labels, steps, context.device)
    return score


def finish(run: Run) -> None:
    """Scores the averaged network in 1, 2 and 4 steps, draws samples, writes results.json, prints the table.

    Latents have neither pictures nor scores here: an autoencoder has to decode them.
    """
    context = run.context
    if not _are_images(run):
        if context.first:
            decoding = f"--checkpoint {run.folder} --vae FOLDER"
            print(
                f"\nThe run is in {run.folder}; of latents, which the autoencoder's folder decodes:\n"
                f"python -m imf.sample {decoding} draws\n"
                f"python -m imf.evaluate {decoding} --extractor FILE --reference STATISTICS scores"
            )
        return
    found = [score_samples(run, steps, scores.SAMPLES) for steps in FINAL_STEPS]
    rows = [score for score in found if score is not None]
    with context.together():
        if context.first and len(rows) < len(found):
            raise UserError("the samples must be finite to be scored, got inf or NaN: a lower --lr may help")
    pictures = {n: run.folder / "samples" / f"final-{n}-step.png" for n in FINAL_STEPS}
    for n, path in pictures.items():
        draw(run, path, n)
    with context.together():
        if run.judge is not None:
            _write_results(run, run.judge, rows, pictures)


def _write_results(run: Run, judge: Judge, rows: list[Score], pictures: dict[int, Path]) -> None:
    """Writes results.json, and figures and pictures to TensorBoard and W&B; prints the table."""
    config, step, guidance = run.config, run.state.step, run.config.sampling
    results = {
        "data": config.data,
        "training_steps": step,
        "samples": scores.SAMPLES,
        "seed": config.seed,
        **guidance,
        "features": judge.of,
        "classifier": judge.classified_by,
        "held_out_accuracy": judge.held_out,
        "scores": [asdict(score) for score in rows],
        "pictures": [str(path.relative_to(run.folder)) for path in pictures.values()],
    }
    write_json(run.folder / "results.json", results)
    boards = Boards(run.folder, config)
    try:
        for score in rows:
            named = {f"final/{score.steps}-step/{name}": x for name, x in score.figures.items()}
            boards.scalars(named, step)
        for n, path in pictures.items():
            boards.picture(f"samples/{n}-step", path, step)
    finally:
        boards.close()
    accuracy = ""
    if judge.held_out is not None:
        accuracy = f"accuracy: of {judge.classified_by}, {judge.held_out:.3f} on images held out from it\n"
    print(
        f"\n{scores.table(rows)}\n\n"
        f"{scores.SAMPLES:,} samples of the averaged network (seed {config.seed}), omega "
        f"{guidance['omega']:g}, interval [{guidance['t_min']:g}, {guidance['t_max']:g}],\n"
        f"against {len(judge.labels):,} images, classes in the data's proportions.\n"
        f"Fréchet distance (lower is better), precision, recall (higher is better): of {judge.of}\n"
        f"variance: of pixels within classes, over the data's (1 is right; less: samples of a class are "
        f"alike)\n{accuracy}"
        f"The run is in {run.folder}\n"
        f"Pictures: {', '.join(map(str, pictures.values()))}"
    )


def _are_images(run: Run) -> bool:
    return run.dataset.shape[0] in (1, 3)

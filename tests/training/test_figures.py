"""Figures and pictures of a run: at checkpoints, at its end, in TensorBoard and W&B, and after a resume."""

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from imf import data, evaluate, train
from imf.evaluation import convnet, scores
from imf.program import UserError
from imf.training import artifacts, checkpoint
from imf.training import setup as start
from tests.helpers.tiny_run import arguments, config, differing

NAMES = {"frechet_distance", "variance_ratio", "precision", "recall", "accuracy"}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(convnet, "LEAST", 3)
    monkeypatch.setattr(scores, "SAMPLES", 120)


def figures(folder):
    return [json.loads(line) for line in (folder / "figures.jsonl").read_text().splitlines()]


def figures_of(path, count):
    """The figures of a checkpoint of the digits, by one process."""
    network = checkpoint.load(path)
    judge = scores.judge_of(data.load("digits"), digits=True)
    labels = judge.labels_like(count)
    omega, t_min, t_max = (getattr(network.sampling, name) for name in ("omega", "t_min", "t_max"))
    samples = scores.sample(network, labels, batch_size=8, omega=omega, t_min=t_min, t_max=t_max)
    return judge.score(samples, labels, 1).figures


def test_figures_at_each_checkpoint(tmp_path, capsys):
    options = {"sample_every": 2, "checkpoint_every": 4, "tensorboard": True}
    assert train.main(arguments(runs=tmp_path, figures=50, **options)) == 0
    folder = tmp_path / "digits"
    found = figures(folder)
    assert [line["step"] for line in found] == [4, 6]  # the last checkpoint too
    assert all(line.keys() == {"step", "samples", *NAMES} and line["samples"] == 50 for line in found)
    wanted = figures_of(checkpoint.path_of(folder, 4), 50)
    assert {name: found[0][name] for name in NAMES} == pytest.approx(wanted, rel=1e-6)
    assert f"step 4: Fréchet distance {wanted['frechet_distance']:.3f}, " in capsys.readouterr().err

    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    for name in NAMES:
        shown = [(event.step, event.value) for event in board.Scalars(f"figures/{name}")]
        assert shown == [(line["step"], pytest.approx(line[name])) for line in found]
    assert [event.step for event in board.Images("samples/1-step")] == [2, 4, 6]
    assert [event.step for event in board.Images("samples/4-step")] == [6]
    row = json.loads((folder / "results.json").read_text())["scores"][1]
    assert board.Scalars("final/2-step/recall")[0].value == pytest.approx(row["recall"])

    assert train.main(arguments(runs=tmp_path, name="without", **options | {"tensorboard": False})) == 0
    other = checkpoint.load(tmp_path / "without").state_dict()
    assert differing(checkpoint.load(folder).state_dict(), other) == []
    assert not (tmp_path / "without" / "figures.jsonl").exists()


def test_a_resumed_run_measures_what_is_missing(tmp_path):
    assert train.main(arguments(runs=tmp_path, figures=40)) == 0
    folder = tmp_path / "digits"
    whole = figures(folder)
    assert [line["step"] for line in whole] == [2, 4, 6]
    for left, last in ((whole[:1], 4), (whole, 2), ([], 2)):
        again = tmp_path / "again"
        shutil.copytree(folder, again)
        for step in range(last + 2, 8, 2):
            checkpoint.path_of(again, step).unlink()
        text = "".join(json.dumps(line) + "\n" for line in left) + '{"step": 2, "samp'  # and half a line
        (again / "figures.jsonl").write_text(text)
        assert train.main(["--resume", str(again)]) == 0
        kept = [line for line in left if line["step"] <= last]
        wanted = [line for line in whole if line in kept or line["step"] >= last]
        assert figures(again) == wanted
        shutil.rmtree(again)


def test_pixels_get_figures_and_pictures_too(packed, tmp_path, capsys):
    assert train.main(arguments(runs=tmp_path, data=packed, name="run", figures=20)) == 0
    folder, printed = tmp_path / "run", capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    assert "small network" in results["features"] and 0 <= results["held_out_accuracy"] <= 1
    assert [score["steps"] for score in results["scores"]] == [1, 2, 4]
    assert results["scores"][0].keys() == {"steps", *NAMES}
    for score in results["scores"]:
        assert f"{score['frechet_distance']:.3f}  {score['variance_ratio']:8.3f}" in printed
    for name in results["pictures"]:
        with Image.open(folder / name) as picture:
            assert picture.mode == "RGB" and picture.size[0] > 10 * 8

    # imf.evaluate agrees: the same noise, labels, features and images.
    judging = [
        "--checkpoint",
        folder,
        "--extractor",
        folder,
        "--reference",
        packed,
        "--out",
        tmp_path / "out",
    ]
    more = ["--count", 120, "--batch-size", 7, "--steps", 1, 4, "--device", "cpu"]
    assert evaluate.main([str(x) for x in (*judging, *more)]) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    for row, score in zip(rows, (results["scores"][0], results["scores"][2]), strict=True):
        assert row["fid"] == pytest.approx(score["frechet_distance"], rel=1e-3)
        assert row["variance_ratio"] == pytest.approx(score["variance_ratio"], rel=1e-2)
        for name in ("precision", "recall", "accuracy"):
            assert row[name] == pytest.approx(score[name], abs=0.02)
    shown = capsys.readouterr().out.splitlines()[1].split()
    assert shown[-2:] == [f"{rows[0]['variance_ratio']:.3f}", f"{rows[0]['accuracy']:.3f}"]

    # A resumed run keeps the network that judged it, and refuses a damaged one.
    before = (folder / convnet.FILE).read_bytes()
    assert train.main(["--resume", str(folder), "--steps", "8"]) == 0
    assert (folder / convnet.FILE).read_bytes() == before and len(figures(folder)) == 4
    (folder / convnet.FILE).write_bytes(before[:-1])
    assert train.main(["--resume", str(folder), "--steps", "9"]) == 1
    assert "no extractor of a run can be read from it" in capsys.readouterr().err


@pytest.mark.parametrize(("classes", "rows"), [(1, 10), (2, 2), (37, 10)])
def test_a_single_class_and_many_are_drawn(classes, rows, tmp_path, monkeypatch):
    run, seen = start.begin(config(runs=str(tmp_path))), []

    def grid(model, *, classes, **_):
        seen.extend(classes)
        return Image.new("L", (1, 1))

    monkeypatch.setattr(artifacts, "class_grid", grid)
    images, names = torch.zeros(40, 1, 8, 8), [str(label) for label in range(classes)]
    run.dataset = data.LabelledImages(images, torch.arange(40) % classes, names)
    artifacts.draw(run, tmp_path / "grid.png")
    assert len(seen) == rows and seen == sorted(seen) and max(seen) < classes
    assert (tmp_path / "grid.png").exists() and len(set(seen)) == min(classes, rows)


def test_samples_that_are_not_finite_do_not_end_a_run(tmp_path, monkeypatch, capsys):
    real = scores.sample
    monkeypatch.setattr(artifacts.scores, "sample", lambda *a, **k: real(*a, **k) * torch.inf)
    assert train.main(arguments(runs=tmp_path, figures=20)) == 1  # at its end, where they are wanted
    error = capsys.readouterr().err
    assert "warning: step 2: the samples are not finite" in error and "to be scored" in error
    assert figures(tmp_path / "digits") == [{"step": step, "samples": 20} for step in (2, 4, 6)]
    assert checkpoint.path_of(tmp_path / "digits", 6).exists()


def test_latents_say_how_they_are_decoded(tmp_path, capsys, monkeypatch):
    latents = data.LabelledImages(torch.randn(40, 4, 8, 8), torch.arange(40) % 10, list("0123456789"))
    monkeypatch.setattr(data, "load", lambda name: latents)
    assert train.main(arguments(runs=tmp_path, figures=20)) == 0
    printed = capsys.readouterr().out
    for command in ("sample", "evaluate"):
        assert f"python -m imf.{command} --checkpoint {tmp_path / 'digits'} --vae FOLDER" in printed
    assert not (tmp_path / "digits" / "figures.jsonl").exists()


def test_an_extractor_is_checked_before_a_folder_is_made(tmp_path):
    for name, message in (
        ("inception", "--extractor: extractor must be"),
        ("a.pth", r"--extractor: a\.pth: no such file"),
    ):
        with pytest.raises(UserError, match=message):
            start.begin(config(runs=str(tmp_path), extractor=name))
    assert not list(tmp_path.iterdir())


def test_weights_and_biases_gets_figures_and_pictures(tmp_path, monkeypatch):
    logged = []
    module = types.SimpleNamespace(
        init=lambda **_: types.SimpleNamespace(
            log=lambda values, step: logged.append((step, values)), finish=lambda: None
        ),
        Image=lambda picture: picture.size,
        util=types.SimpleNamespace(generate_id=lambda: "id"),
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    options = {"wandb": "project", "figures": 30, "sample_every": 2, "steps": 4}
    assert train.main(arguments(runs=tmp_path, **options)) == 0
    names = {name: step for step, values in logged for name in values}
    assert {f"figures/{name}" for name in NAMES} <= names.keys()
    assert names["samples/1-step"] == names["samples/4-step"] == names["final/4-step/recall"] == 4


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch is built without distributed")
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_find_the_figures_of_one(sharding, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "imf.train"]
    options = arguments(runs=tmp_path, figures=51, checkpoint_every=3, sharding=sharding)
    command = [sys.executable, *launch, *options]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], timeout=300)
    found = figures(tmp_path / "digits")
    assert [line["step"] for line in found] == [3, 6]
    for line in found:
        wanted = figures_of(checkpoint.path_of(tmp_path / "digits", line["step"]), 51)
        assert {name: line[name] for name in NAMES} == pytest.approx(wanted, rel=1e-4)
    assert len(json.loads((tmp_path / "digits" / "results.json").read_text())["scores"]) == 3

"""The command `python -m imf.evaluate`: figures, grids, going on, processes, and what it refuses."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from imf import evaluate, sample, train
from imf.data.prepare import __main__ as prepare
from imf.evaluation import fid
from imf.evaluation import run as evaluation
from imf.evaluation import samples as generate
from imf.io import locked
from imf.model.config import IMFConfig
from tests.helpers import children, tiny_data, tiny_run
from tests.helpers.tiny_evaluation import LATENTS, Means, autoencoder, network_file, script

IMAGES = IMFConfig(
    input_size=4, patch_size=2, in_channels=3, hidden_size=16, depth=2, num_heads=1, aux_head_depth=1,
    num_classes=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A network of images, an extractor, a reference."""
    folder = tmp_path_factory.mktemp("files")
    network_file(folder / "network.safetensors", IMAGES)
    script(Means(), folder / "means.pt")
    x = torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
    fid.of_rows(x).save(folder / "reference.npz")
    return folder


def run(files, tmp_path, *more, reference=True, checkpoint=True):
    arguments = ["--extractor", files / "means.pt", "--out", tmp_path / "out", "--device", "cpu"]
    arguments += ["--batch-size", 6]
    arguments += ["--count", 20, "--checkpoint", files / "network.safetensors"] if checkpoint else []
    arguments += ["--reference", files / "reference.npz"] if reference else []
    status = evaluate.main([str(a) for a in (*arguments, *more)])
    path = tmp_path / "out" / "results.json"
    return status, json.loads(path.read_text()) if path.exists() else None


def test_figures_are_those_of_the_images_on_disk(files, tmp_path, capsys):
    status, results = run(files, tmp_path, "--samples-dir", tmp_path / "samples")
    assert status == 0
    (row,) = results["rows"]
    folder = tmp_path / "samples" / "steps-1_omega-2_interval-0.1-0.9"  # the file's own guidance
    images = torch.cat(list(generate.read_images(generate.image_files(folder))))
    assert images.shape == (20, 3, 4, 4)
    means = images.float().mean((2, 3)) / 255
    expected = fid.frechet_distance(fid.of_rows(means), fid.load_statistics(files / "reference.npz"))
    assert row["fid"] == pytest.approx(expected, rel=1e-6) and row["fid"] > 0
    assert row["inception_score"] == pytest.approx(fid.inception_score(means * 2)[0], rel=1e-6)
    assert (row["steps"], row["omega"], row["t_min"], row["t_max"]) == (1, 2.0, 0.1, 0.9)
    line = capsys.readouterr().out.splitlines()[1].split()
    assert line[:6] == ["1", "2", "[0.1,", "0.9]", "20", f"{row['fid']:.3f}"]

    # The same images, found.
    status, found = run(files, tmp_path / "again", "--samples-dir", folder, checkpoint=False)
    assert status == 0 and found["rows"][0]["fid"] == row["fid"] and found["rows"][0]["omega"] is None


def test_a_grid_with_a_plot_goes_on_where_it_stopped(files, tmp_path, monkeypatch, capsys):
    grid = ["--omega", 1, 4, "--interval", 0, 1, "--interval", 0.4, 0.6, "--steps", 1, 2]
    real, calls = evaluation.frechet_distance, []

    def stops(*args):
        calls.append(args)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(evaluation, "frechet_distance", stops)
    status, results = run(files, tmp_path, *grid)
    assert status == 1 and len(results["rows"]) == 3
    assert "No space left" in capsys.readouterr().err
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    status, results = run(files, tmp_path, *grid, "--plot", tmp_path / "plot.png")
    assert status == 0 and len(calls) == 4 + 5  # those that were there are not made again
    settings = [(r["steps"], r["t_min"], r["omega"]) for r in results["rows"]]
    assert settings == [(n, low, w) for n in (1, 2) for low in (0.0, 0.4) for w in (1.0, 4.0)]
    assert len({r["fid"] for r in results["rows"]}) == 8
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert len(capsys.readouterr().out.splitlines()) == 1 + 8 + 2

    status, _ = run(files, tmp_path, "--seed", 1)
    assert status == 1 and "seed 0 (not 1); choose another --out" in capsys.readouterr().err


def test_statistics_of_a_folder_and_of_the_digits(files, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    images = torch.randint(0, 256, (11, 3, 5, 5), dtype=torch.uint8)
    for i, image in enumerate(images):
        generate.write_png(folder / f"{i}.png", image)
    out = tmp_path / "out.npz"
    command = ["--extractor", str(files / "means.pt"), "--device", "cpu", "--make-statistics"]
    assert evaluate.main([*command, str(folder), str(out)]) == 0
    got, expected = fid.load_statistics(out), fid.of_rows(images.float().mean((2, 3)) / 255)
    np.testing.assert_allclose(got.covariance, expected.covariance, rtol=1e-5, atol=1e-9)
    status, results = run(files, tmp_path, "--reference", folder, reference=False)
    _, same = run(files, tmp_path / "same", "--reference", out, reference=False)
    assert status == 0 and results["rows"][0]["fid"] == pytest.approx(same["rows"][0]["fid"], rel=1e-6)
    assert evaluate.main([*command, "digits", str(out)]) == 0
    assert fid.load_statistics(out).mean == pytest.approx(4.884 / 16, abs=0.002)  # of scikit-learn's pixels


def test_latents_are_decoded(files, tmp_path):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    network_file(tmp_path / "latents.safetensors", LATENTS)
    vae = autoencoder(tmp_path / "vae")
    more = ["--checkpoint", tmp_path / "latents.safetensors", "--vae", vae, "--samples-dir", tmp_path / "s"]
    status, results = run(files, tmp_path, *more)
    assert status == 0 and results["settings"]["vae"]
    (image, *_) = generate.image_files(tmp_path / "s")
    assert next(generate.read_images([image])).shape == (1, 3, 8, 8)


def test_another_autoencoder_than_that_of_the_latents_is_refused(files, tmp_path, capsys):
    """A run's checkpoint knows which one prepared its data; sampling, evaluating and resuming ask for it."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    vae, other = tiny_data.autoencoder(tmp_path / "vae"), tiny_data.autoencoder(tmp_path / "other")
    weights = other / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["decoder.conv_out.bias"] += 0.5
    save_file(state, weights, {"format": "pt"})
    source = tiny_data.images(tmp_path / "images", broken=False)
    prepare_options = ["--size", "32", "--device", "cpu", "--workers", "1"]
    assert prepare.main([str(source), str(tmp_path / "latents"), "--vae", str(vae), *prepare_options]) == 0
    options = {"runs": tmp_path, "name": "trained", "data": tmp_path / "latents", "patch_size": 2, "steps": 2}
    assert train.main(tiny_run.arguments(**options)) == 0
    run_folder = tmp_path / "trained"
    capsys.readouterr()

    def asked(folder):
        sampled = sample.main(
            ["--checkpoint", str(run_folder), "--vae", str(folder), "--out", str(tmp_path / "grid.png")]
        )
        more = ["--checkpoint", run_folder, "--vae", folder, "--count", 4]
        return sampled, run(files, tmp_path, *more)[0]

    assert asked(vae) == (0, 0)
    assert asked(other) == (1, 1)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("imf.")]
    for line in errors[-2:]:
        assert f"--vae {other}: must be the autoencoder whose latents the network was trained on" in line

    again = tmp_path / "again"
    assert prepare.main([str(source), str(again), "--vae", str(other), *prepare_options]) == 0
    shutil.rmtree(tmp_path / "latents")
    shutil.move(again, tmp_path / "latents")
    assert train.main(["--resume", str(run_folder), "--steps", "3"]) == 1
    assert "are of another autoencoder than those that" in capsys.readouterr().err


def test_one_evaluation_at_a_time(files, tmp_path, capsys):
    for name in ("out", "samples"):
        (tmp_path / name).mkdir(exist_ok=True)
        with locked(tmp_path / name):
            status, results = run(files, tmp_path, "--samples-dir", tmp_path / "samples")
        assert status == 1 and not results
        assert f"{tmp_path / name}: process {os.getpid()} on" in capsys.readouterr().err
    assert run(files, tmp_path, "--samples-dir", tmp_path / "samples")[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_evaluation_keeps_what_is_finished(number, files, tmp_path, monkeypatch, capsys):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # processes beside a terminal may ignore it
    real = evaluation.measure

    def measure(images, *args):
        if (tmp_path / "out" / "results.json").exists():
            signal.raise_signal(number)
        return real(images, *args)

    monkeypatch.setattr(evaluation, "measure", measure)
    status, results = run(files, tmp_path, "--omega", 1, 2)
    assert status == 128 + number and [row["omega"] for row in results["rows"]] == [1.0]
    assert "imf.evaluate: stopped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--count", 21], "count must be a positive multiple of the 5 classes"),
        (["--checkpoint", "nowhere"], "nowhere: no such file or folder"),
        (["--extractor", "nothing.pt"], r"nothing\.pt: no such file"),
        (["--reference", "nothing"], "nothing: no such file or folder; wanted statistics"),
        (["--reference", "nothing.npz"], r"nothing\.npz: no such file"),
        (["--vae", "nowhere"], "the network makes images already"),
        (["--omega", 0.5], "omega .* must be at least 1, got 0.5"),
        (["--extractor", "pixels"], r"features must be \[B, 3\] .* got \[6, 48\]: of another extractor"),
        (["--device", "tpu"], "--device must be"),
    ],
)
def test_what_does_not_fit_is_said(files, tmp_path, capsys, more, message):
    status, results = run(files, tmp_path, *more)
    assert status == 1 and not results
    assert re.search(f"imf.evaluate: .*{message}", capsys.readouterr().err)


def test_original_mean_flows_have_no_guidance_to_choose(files, tmp_path, capsys):
    form = {"conditioning": "adaln", "block": "plain", "omega_input": False, "interval_input": False}
    config = dataclasses.replace(IMAGES, aux_head_depth=0, **form)
    network_file(tmp_path / "mf.safetensors", config, method="mf")
    more = ["--checkpoint", tmp_path / "mf.safetensors"]
    status, results = run(files, tmp_path, *more)
    assert status == 0 and results["rows"][0]["omega"] == 1 and results["rows"][0]["fid"] > 0
    status, _ = run(files, tmp_path, *more, "--omega", 1, 2)
    assert status == 1 and "omega must be 1, it is no input of this network, got 2" in capsys.readouterr().err


def test_broken_images_are_named(files, tmp_path, capsys):
    for i in range(3):
        generate.write_png(tmp_path / f"{i}.png", torch.zeros(3, 4, 4, dtype=torch.uint8))
    (tmp_path / "1.png").write_bytes(b"")
    status, results = run(files, tmp_path, "--samples-dir", tmp_path, checkpoint=False)
    assert status == 1 and not results
    assert re.search(r"1 of 3 images cannot be read: .*1\.png", capsys.readouterr().err)
    status, _ = run(files, tmp_path, "--samples-dir", tmp_path, "--count", 4, checkpoint=False)
    assert status == 1 and "wanted 4 images (--count), found 3" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_at_any_moment_an_evaluation_goes_on(files, tmp_path):
    grid = ["--omega", 1, 4, "--steps", 1, 2, "--count", 200]
    arguments = ["--checkpoint", files / "network.safetensors", "--extractor", files / "means.pt", *grid]
    arguments += ["--reference", files / "reference.npz", "--batch-size", 3, "--device", "cpu"]
    chance = random.Random(0)
    where = [str(a) for a in (*arguments, "--samples-dir", tmp_path / "s", "--out", tmp_path / "out")]
    made = []
    for _ in range(20):
        child = children.start(evaluate.main, where)
        time.sleep(chance.uniform(0, 1.5))
        child.kill()
        children.finish(child)
        made.append(len(generate.image_files(tmp_path / "s")))
    assert any(0 < count < 800 for count in made), made  # not all before the first sample or after the last
    assert evaluate.main(where) == 0
    whole = [str(a) for a in (*arguments, "--out", tmp_path / "whole")]
    assert evaluate.main(whole) == 0
    files_of = (tmp_path / name / "results.json" for name in ("out", "whole"))
    tables = [json.loads(path.read_text())["rows"] for path in files_of]
    got, expected = ([(r["steps"], r["omega"], r["fid"], r["inception_score"]) for r in t] for t in tables)
    assert got == expected and len(got) == 4


@pytest.mark.slow
def test_two_processes_make_the_samples_of_one(files, tmp_path):
    found = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        arguments = ["--checkpoint", files / "network.safetensors", "--extractor", files / "means.pt"]
        arguments += [
            "--reference",
            files / "reference.npz",
            "--count",
            25,
            "--omega",
            1,
            2,
            "--device",
            "cpu",
        ]
        arguments += ["--samples-dir", folder / "samples", "--out", folder]
        arguments += ["--device", "cpu"]
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        command = [sys.executable, *launch, "-m", "imf.evaluate", *map(str, arguments)]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[2], timeout=300)
        found.append((folder, json.loads((folder / "results.json").read_text())))
    (one, first), (two, second) = found
    assert len(first["rows"]) == 2
    for a, b in zip(first["rows"], second["rows"], strict=True):
        assert a["fid"] == pytest.approx(b["fid"], rel=1e-9)
        assert a["inception_score"] == pytest.approx(b["inception_score"], rel=1e-9)
    for path in generate.image_files(one / "samples"):
        assert path.read_bytes() == (two / path.relative_to(one)).read_bytes()

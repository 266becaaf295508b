"""From a folder of images to the figures of samples: the README's commands one after another, in small."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from imf.training import checkpoint
from tests.helpers.tiny_data import autoencoder, images

pytest.importorskip("diffusers", reason="the autoencoder: pip install diffusers")
pytestmark = pytest.mark.slow

NETWORK = ("--hidden-size", "32", "--depth", "3", "--num-heads", "1", "--aux-head-depth", "1")
SHORT = ("--batch-size", "8", "--threads", "1", "--precision", "bf16", "--sample-every", "0")
FORMS = {
    "one process": (1, ()),
    "two processes, DDP": (2, ()),
    "two processes, FSDP2": (2, ("--sharding", "fsdp", "--checkpointing")),
}


@pytest.mark.parametrize("form", FORMS)
def test_from_images_to_figures(form, tmp_path):
    processes, sharding = FORMS[form]

    def run(module, *arguments, processes=1):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *(launch if processes > 1 else []), "-m", f"imf.{module}"]
        done = subprocess.run(
            [*command, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{module}: {done.stdout}\n{done.stderr}"

    images(tmp_path / "images", count=6, broken=False)
    vae = autoencoder(tmp_path / "vae")
    statistics = ("--statistics", "images.npz", "--extractor", "pixels")
    run("data.prepare", "images", "latents", "--vae", vae, "--size", "32", *statistics)

    preset = ("--preset", "iMF-B/2", "--data", "latents", *NETWORK, *SHORT, *sharding)
    run("train", *preset, "--steps", "3", processes=processes)
    run("train", "--resume", "runs/latents", "--steps", "5", processes=processes)
    saved = checkpoint.read_metadata(checkpoint.find(tmp_path / "runs/latents"))
    assert (saved.step, saved.precision, saved.config.network.num_classes) == (5, "bf16", 2)
    assert saved.config.network.input_size == 4

    trained = ("--checkpoint", "runs/latents", "--vae", vae)
    run("sample", *trained, "--classes", "0", "1", "--columns", "3", "--out", "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        assert len(picture.getcolors(maxcolors=1 << 20)) > 100

    judged = (
        "--extractor",
        "pixels",
        "--reference",
        "images.npz",
        "--count",
        "12",
        "--samples-dir",
        "samples",
    )
    run("evaluate", *trained, *judged, "--omega", "1", "2", processes=processes)
    rows = json.loads((tmp_path / "evaluation/results.json").read_text())["rows"]
    assert [row["omega"] for row in rows] == [1, 2]
    assert all(row["count"] == 12 and row["fid"] > 0 for row in rows)
    assert len([*(tmp_path / "samples").rglob("*.png")]) == 24

"""docs/your-images.md, command by command as the page has them, with less training and fewer samples."""

import gzip
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.doc_commands import ROOT, fences
from tests.helpers.image_files import idx_bytes

PACKAGE = "/usr/share/datasets/fashion-mnist"  # of Debian's dataset-fashion-mnist, as the page has it
LESS = {
    "imf.train": "--steps 6 --batch-size 32 --checkpoint-every 3 --figures 100",
    "imf.evaluate": "--count 200 --batch-size 50",
}


def files_of_the_same_form(folder):
    """Two gzipped IDX files of 600 grey images in ten classes: squares of a place and size of their own."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 600, np.uint8)
    images = rng.integers(0, 60, (600, 28, 28), np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 8, 2 : 10 + label] += 150
    for name, values in (("images-idx3", images), ("labels-idx1", labels)):
        (folder / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(idx_bytes(values)))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("files", ["of the package", "made here"])
def test_from_files_to_samples(files, tmp_path):
    if files == "made here":
        source = files_of_the_same_form(tmp_path / "source")
    elif not (source := Path(PACKAGE)).is_dir():
        pytest.skip(f"{PACKAGE}: Debian's package dataset-fashion-mnist is not installed")
    block = next(fence.text for fence in fences(ROOT / "docs/your-images.md") if fence.language == "bash")
    assert PACKAGE in block
    for line in block.replace(PACKAGE, str(source)).splitlines():
        python, *words = shlex.split(line)
        assert python == "python"
        command = [sys.executable, *words, *shlex.split(LESS.get(words[1], ""))]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=600)

    run = tmp_path / "runs/fashion"
    results = json.loads((run / "results.json").read_text())
    assert [row["steps"] for row in results["scores"]] == [1, 2, 4]
    assert all(0 < row["accuracy"] <= 1 and row["variance_ratio"] > 0 for row in results["scores"])
    assert [json.loads(line)["step"] for line in (run / "figures.jsonl").read_text().splitlines()] == [3, 6]
    with Image.open(tmp_path / "sneakers.png") as drawn:
        assert np.asarray(drawn).std() > 0
    assert len(list((tmp_path / "figures").iterdir())) > 0

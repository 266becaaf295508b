"""Samples by number: their noise, classes and files, and going on after a kill."""

import json
import random
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from imf.evaluation import samples as generate
from imf.io import fingerprint
from imf.model.config import IMFConfig
from imf.program import UserError
from tests.helpers import children


class Painter(nn.Module):
    """Paints noise times a colour of its class: what a sample's noise and label were can be read from it."""

    config = IMFConfig(
        input_size=8, patch_size=4, in_channels=3, hidden_size=16, depth=2, num_heads=1, aux_head_depth=1,
        num_classes=3,
    )  # fmt: skip

    def __init__(self, pause=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.pause, self.sizes = pause, []

    def forward(self, z, t, h, omega, t_min, t_max, y, heads="u"):
        self.sizes.append(len(z))
        time.sleep(self.pause)
        return z - z.clamp(-2, 2) * (y[:, None, None, None] + 1) / 8


SETTINGS = generate.Settings("w", "", "fp32", 12, 7, 1, 1.0, 0.0, 1.0)


def painted(**changes):
    return torch.cat(list(generate.sample_images(Painter(), SETTINGS, range(12), **changes)))


def test_the_noise_belongs_to_seed_and_number():
    z = generate.noise(7, range(100), (4, 8, 8))
    assert z.dtype == torch.float32 and z.shape == (100, 4, 8, 8)
    assert torch.equal(generate.noise(7, [99, 3], (4, 8, 8)), z[[99, 3]])
    assert len({row.numpy().tobytes() for row in z}) == 100
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02
    # Neighbours, and other seeds, are independent: correlations are those of 25,600 independent pairs.
    for other in (z.roll(1, 0), generate.noise(8, range(100), (4, 8, 8))):
        assert abs((z * other).mean()) < 4 / 160
    assert generate.noise(7, [], (4, 8, 8)).shape == (0, 4, 8, 8)
    assert generate.noise(2**63 - 1, [10**9], (2,)).isfinite().all()


def test_classes_are_balanced_and_in_order():
    assert generate.classes(range(6), 6, 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert generate.classes([5, 0], 6, 3).tolist() == [2, 0]
    for count in (0, 7):
        with pytest.raises(ValueError, match=f"positive multiple of the 3 classes .* got {count}"):
            generate.classes(range(1), count, 3)


def test_bytes_are_rounded_and_clipped():
    x = torch.tensor([-3.0, -1.0, -0.999, 0.0, 1 / 255, 0.5, 1.0, 2.0])
    assert generate.to_bytes(x).tolist() == [0, 0, 0, 128, 128, 191, 255, 255]
    with pytest.raises(UserError, match="finite"):
        generate.to_bytes(torch.tensor([float("nan")]))


def test_batches_and_slices_make_the_same_images():
    whole = painted(batch_size=12)
    z = generate.noise(7, range(12), (3, 8, 8)).clamp(-2, 2)
    colours = (generate.classes(range(12), 12, 3) + 1) / 8
    assert torch.equal(whole, generate.to_bytes(z * colours[:, None, None, None]))
    assert torch.equal(painted(batch_size=5), whole)
    parts = [
        torch.cat(list(generate.sample_images(Painter(), SETTINGS, r))) for r in (range(5), range(5, 12))
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_files_hold_the_same_images_and_are_not_made_twice(tmp_path):
    whole = painted()
    assert torch.equal(painted(folder=tmp_path, batch_size=5), whole)
    files = generate.image_files(tmp_path)
    assert [path.name for path in files] == [f"{i:06d}.png" for i in range(12)]
    assert torch.equal(torch.cat(list(generate.read_images(files, 5))), whole)

    (tmp_path / "000003.png").unlink()
    (tmp_path / "000004.png").write_bytes((tmp_path / "000004.png").read_bytes()[:60])
    model = Painter()
    again = torch.cat(list(generate.sample_images(model, SETTINGS, range(12), folder=tmp_path)))
    assert torch.equal(again, whole) and model.sizes == [2]


def test_a_folder_keeps_to_its_settings(tmp_path):
    painted(folder=tmp_path)
    other = generate.Settings(**{**vars(SETTINGS), "seed": 8})
    with pytest.raises(UserError, match=r"holds other samples, of seed 7 \(not 8\)"):
        list(generate.sample_images(Painter(), other, range(12), folder=tmp_path))
    (tmp_path / generate.SETTINGS).write_text("{")
    with pytest.raises(UserError, match="no JSON"):
        painted(folder=tmp_path)
    (tmp_path / generate.SETTINGS).unlink()
    with pytest.raises(UserError, match=r"holds 12 images and no settings\.json"):
        painted(folder=tmp_path)


def test_images_that_do_not_fit_are_named(tmp_path):
    for i in range(4):
        Image.effect_noise((6, 4), 50).convert("RGB").save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    (tmp_path / "2.png").write_bytes((tmp_path / "0.png").read_bytes()[:50])
    with pytest.raises(UserError, match=r"2 of 4 images cannot be read: .*1\.png, .*2\.png"):
        list(generate.read_images(generate.image_files(tmp_path), 2))
    for i in (1, 2):
        Image.new("L", (4, 6)).save(tmp_path / f"{i}.png")
    with pytest.raises(UserError, match=r"1\.png: images must be of one size, \[3, 4, 6\]"):
        list(generate.read_images(generate.image_files(tmp_path), 3))
    with pytest.raises(UserError, match="1 or 3 channels, got 4"):
        generate.write_png(tmp_path / "x.png", torch.zeros(4, 2, 2, dtype=torch.uint8))


def test_a_full_disk_names_the_file_and_leaves_no_half_image(tmp_path, monkeypatch):
    def full(self, path, *args, **kwargs):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match=r"0000\d\d\.png: could not be written: .*No space"):
        painted(folder=tmp_path)
    assert not generate.image_files(tmp_path)


def test_fingerprints_tell_weights_apart():
    a = {"x": torch.zeros(3), "y": torch.zeros((), dtype=torch.bfloat16)}
    assert fingerprint(a) == fingerprint(dict(reversed(a.items())))
    for b in ({**a, "x": torch.tensor([0.0, 0, -0.0])}, {"x": a["x"]}, {"z": a["x"], "y": a["y"]}):
        assert fingerprint(b) != fingerprint(a)


def paint_slowly(folder):
    list(generate.sample_images(Painter(pause=0.01), SETTINGS, range(12), batch_size=2, folder=folder))


def test_killed_at_any_moment_it_goes_on(tmp_path):
    chance, counts = random.Random(0), []
    for number in range(3):
        folder, made = tmp_path / str(number), []
        for _ in range(4):
            child = children.start(paint_slowly, folder)
            wanted = len(made) + chance.randint(0, 4)  # files, so that a slow machine is no other test
            while child.is_alive() and len(list(folder.glob("*.png"))) < wanted:
                time.sleep(0.001)
            child.kill()
            children.finish(child)
            for path in (made := generate.image_files(folder) if folder.exists() else []):
                assert np.asarray(Image.open(path)).shape == (8, 8, 3)  # what has a name is whole
            counts.append(len(made))
        assert torch.equal(painted(folder=folder), painted())
        assert json.loads((folder / generate.SETTINGS).read_text()) == vars(SETTINGS)
    assert any(0 < count < 12 for count in counts), counts

"""Sampling: the update against a loop written by hand, grids pixel by pixel, the command."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import imf
from imf import evaluate, sample, sampling
from imf.program import UserError
from imf.training.config import DIGITS_NETWORK
from tests.helpers import tiny_evaluation


class Velocity(nn.Module):
    """A velocity that depends on every input, so that a wrong one shows; keeps what it was called with."""

    config = DIGITS_NETWORK

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.calls = []

    def forward(self, z, t, h, omega, t_min, t_max, y, heads="u"):
        assert heads == "u"
        self.calls.append((h, omega, t_min, t_max))
        rows = h + omega.log() + 0.3 * t_min - 0.2 * t_max + 0.1 * y
        return self.scale * z * rows[:, None, None, None]


NOISE = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 3, 5, 9])


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_against_a_loop_by_hand(steps):
    model = Velocity()
    z, t = NOISE.double(), 1.0
    for i in range(steps):
        r = 1 - (i + 1) / steps
        factor = (t - r) + torch.tensor(2.5).double().log() + 0.3 * 0.4 - 0.2 * 0.6 + 0.1 * LABELS.double()
        z = z - (t - r) * 0.5 * z * factor[:, None, None, None]
        t = r
    got = imf.generate(model, NOISE, LABELS, steps=steps, omega=2.5, t_min=0.4, t_max=0.6)
    torch.testing.assert_close(got.double(), z, rtol=1e-5, atol=1e-5)
    assert not got.requires_grad and got.dtype == torch.float32 and len(model.calls) == steps
    for scalars in model.calls:
        assert all(s.shape == (4,) and s.dtype == torch.float32 for s in scalars)


def test_the_noise_is_left_alone():
    kept = NOISE.clone()
    imf.generate(Velocity(), NOISE, LABELS, steps=2)
    assert torch.equal(NOISE, kept)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"omega": 0.5}, "omega .* must be at least 1, got 0.5"),
        ({"omega": float("nan")}, "omega .* must be finite in fp32, got nan"),
        ({"t_min": 0.7, "t_max": 0.6}, r"t_max .* must be in \[t_min, 1\] = \[0.7, 1\], got 0.6"),
        ({"y": LABELS[:3]}, r"got \[4, 1, 8, 8\] and \[3\]"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        imf.generate(Velocity(), **{"noise": NOISE, "y": LABELS, **arguments})


def test_grid_pixel_by_pixel():
    images = torch.tensor([-1.0, 0.0, 1.0, 5.0]).reshape(4, 1, 1, 1).expand(4, 1, 2, 2)
    picture = sampling.draw_grid(images, columns=2, scale=3, gap=1)
    assert picture.size == (2 * 7 + 1, 2 * 7 + 1)
    assert [picture.getpixel(at)[0] for at in [(1, 1), (6, 6), (8, 1), (1, 8), (8, 8)]] == [
        0,
        0,
        128,
        255,
        255,
    ]
    assert picture.getpixel((7, 3)) == picture.getpixel((0, 0)) == (255, 255, 255)  # gap and border


def test_grid_in_colour_and_what_it_refuses():
    red = torch.tensor([1.0, -1.0, -1.0]).reshape(1, 3, 1, 1)
    assert sampling.draw_grid(red, columns=1, scale=1, gap=1).getpixel((1, 1)) == (255, 0, 0)
    with pytest.raises(ValueError, match="1 or 3 channels, got 4"):
        sampling.draw_grid(torch.zeros(1, 4, 2, 2), columns=1)
    with pytest.raises(ValueError, match="columns must divide the 5 images, got 2"):
        sampling.draw_grid(torch.zeros(5, 1, 2, 2), columns=2)


def test_class_grid_has_a_row_per_class_and_keeps_its_noise():
    model = Velocity()
    a, b = (sampling.class_grid(model, columns=3, seed=1) for _ in range(2))
    assert (
        a.tobytes() == b.tobytes() and a.tobytes() != sampling.class_grid(model, columns=3, seed=2).tobytes()
    )
    side = 8 * 5 + 4
    assert a.size == (20 + 3 * side + 4, 10 * side + 4)
    margins = [a.crop((0, row * side, 20, (row + 1) * side)) for row in range(10)]
    assert all(min(margin.convert("L").tobytes()) < 128 for margin in margins)  # a label beside every row
    assert len({margin.tobytes() for margin in margins}) == 10  # and all of them different


@pytest.mark.parametrize("seed", ["-1", "9" * 23])
def test_command_refuses_seeds_out_of_range(seed, capsys):
    with pytest.raises(SystemExit):
        sample.main(["--checkpoint", "none", f"--seed={seed}"])
    assert f"--seed must be at least 0 and below 2 ** 63, got {seed}" in capsys.readouterr().err


def test_command_refuses_devices_that_are_not_there(capsys):
    assert sample.main(["--checkpoint", "none", "--device", "tpu"]) == 1
    assert "--device must be auto, cpu, cuda or cuda:<index>, got 'tpu'" in capsys.readouterr().err


def test_command_reports_a_missing_checkpoint(tmp_path, capsys):
    assert sample.main(["--checkpoint", str(tmp_path / "none"), "--out", str(tmp_path / "grid.png")]) == 1
    assert "no such file or folder" in capsys.readouterr().err
    assert not (tmp_path / "grid.png").exists()


NAMES = ("tench, Tinca tinca", "T-shirt", "bag", "7", "Bag")


@pytest.mark.parametrize(
    ("given", "labels"),
    [
        (["1", "0"], [1, 0]),
        (["1,0", "4"], [1, 0, 4]),
        (["bag"], [2]),
        (["t-SHIRT,bag", "Tench, tinca tinca"], [1, 2, 0]),
        (["4,bag", "T-shirt"], [4, 2, 1]),
        (["3"], [3]),  # a number is a label, also where a class has it as its name
    ],
)
def test_classes_are_named_or_numbered(given, labels):
    assert sampling.find_classes(given, NAMES, 5) == labels


@pytest.mark.parametrize(
    ("given", "names", "message"),
    [
        (["7"], NAMES, "--classes must be within 0 and 4, got 7"),
        (["-1"], NAMES, "must be labels from 0 to 4, or names, got '-1'"),
        (["tshirt"], NAMES, "or names, got 'tshirt'; names are t-shirt"),
        (["1,"], NAMES, "or names, got ''"),
        (["bag"], (), "got 'bag'; this checkpoint knows no names"),
    ],
)
def test_classes_that_are_not_there(given, names, message):
    with pytest.raises(UserError, match=message):
        sampling.find_classes(given, names, 5)


def test_command_draws_classes_by_name(tmp_path, capsys, monkeypatch):
    config = replace(DIGITS_NETWORK, depth=2, hidden_size=16, num_heads=1, aux_head_depth=1, num_classes=3)
    path = tiny_evaluation.network_file(tmp_path / "a.safetensors", config, class_names=("ant", "bee", "cow"))
    threads: list[int] = []
    monkeypatch.setattr(sample.torch, "set_num_threads", threads.append)
    options = ["--checkpoint", str(path), "--device", "cpu", "--columns", "2", "--threads", "1"]
    pictures = {}
    for classes in ("cow,ant", "2,0", "bee,ant"):
        out = tmp_path / f"{classes}.png"
        assert sample.main([*options, "--out", str(out), "--classes", classes]) == 0
        pictures[classes] = out.read_bytes()
    assert pictures["cow,ant"] == pictures["2,0"] != pictures["bee,ant"] and threads == [1] * 3
    assert sample.main([*options, "--classes", "cat"]) == 1
    assert "got 'cat'; names are ant" in capsys.readouterr().err


def test_names_get_the_margin_that_they_need():
    images = torch.zeros(2, 1, 8, 8)
    narrow, wide = (sampling.draw_grid(images, 1, row_labels=[x, "b"]) for x in ("a", "a longer name, 名"))
    assert narrow.width == 20 + 44 + 4 and wide.width > narrow.width + 30
    assert min(wide.crop((0, 0, 8, 44)).convert("L").tobytes()) < 255  # it begins at the left edge


@pytest.mark.parametrize("command", [sample, evaluate])
@pytest.mark.parametrize("threads", ["-1", "4097", "two", "9" * 30])
def test_threads_out_of_range(command, threads, capsys):
    with pytest.raises(SystemExit):
        command.main(
            ["--extractor", "pixels", f"--threads={threads}"]
            if command is evaluate
            else ["--checkpoint", "none", f"--threads={threads}"]
        )
    assert f"--threads: must be from 0 to 4096, got {threads}" in capsys.readouterr().err

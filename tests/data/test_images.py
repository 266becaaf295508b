"""Image files of every mode become the right 8-bit pixels, or are skipped with a reason that says why."""

import os
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from imf import evaluate
from imf.data.prepare import __main__ as prepare
from imf.data.prepare.form import Form, center_crop
from imf.evaluation import fid
from imf.evaluation import samples as generate
from imf.images import BrokenImage, read_image
from imf.program import UserError
from tests.helpers.tiny_evaluation import Means, script

RAMP = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
COLOURS = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=2)


def tiff(path, bits, values, photometric=1, sample_format=1, order="<"):
    """Write grey [8, 8] as a TIFF without compression; `values` are its bytes."""
    entries = [(256, 8), (257, 8), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 8)]
    entries += [(279, len(values)), (339, sample_format)]
    header = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(values))
    directory = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in entries)
    count = struct.pack(f"{order}H", len(entries))
    path.write_bytes(header + values + count + directory + bytes(4))


def png(path, width, height, bits, colour, rows=b""):
    """Write a PNG of these rows, each with its filter byte; without rows only the header is right."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    packed = (
        struct.pack(">I", len(x)) + name + x + struct.pack(">I", zlib.crc32(name + x)) for name, x in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


def twelve_bits(values):
    pairs = values.reshape(-1, 2).astype(int)
    return b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)


def grey(mode):
    return Image.fromarray(RAMP).convert(mode)


def deep(values):
    """8 bits -> 16 bits that round to them, some from above and some from below."""
    noise = np.random.default_rng(0).integers(-120, 121, values.shape)
    return (values.astype(int) * 257 + noise).clip(0, 65535).astype(np.uint16)


LEVELS = np.arange(256)
PALETTE = np.stack([LEVELS, 255 - LEVELS, LEVELS // 2], axis=1).astype(np.uint8)


def palette(**options):
    def write(path):
        image = Image.fromarray(RAMP).convert("P")
        image.putpalette(PALETTE.tobytes())
        image.save(path, **options)

    return write


def colour(mode):
    return lambda path: Image.fromarray(COLOURS).convert(mode).save(path)


def there_and_back(mode):
    return np.asarray(Image.fromarray(COLOURS).convert(mode).convert("RGB"))


def with_alpha(path):
    """Transparent pixels keep their colours."""
    Image.merge("RGBA", [*Image.fromarray(COLOURS).split(), Image.fromarray(RAMP)]).save(path)


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it by 90 degrees
    Image.fromarray(COLOURS).save(path, exif=exif)


def animated(path):
    Image.fromarray(COLOURS).save(path, save_all=True, append_images=[Image.new("RGB", (8, 8))] * 2)


def deep_colour(path):
    rows = deep(COLOURS).astype(">u2")
    png(path, 8, 8, 16, 2, b"".join(b"\0" + row.tobytes() for row in rows))


@pytest.mark.parametrize(
    ("name", "write", "expected", "off"),
    [
        ("a.png", lambda p: grey("1").save(p), np.asarray(grey("1").convert("L")), 0),
        ("a.png", lambda p: grey("L").save(p), RAMP, 0),
        ("a.png", lambda p: grey("LA").save(p), RAMP, 0),
        ("a.png", palette(), PALETTE[RAMP], 0),
        ("a.png", palette(transparency=bytes(range(256))), PALETTE[RAMP], 0),
        ("a.tif", lambda p: grey("PA").save(p), RAMP, 0),
        ("a.bmp", lambda p: Image.fromarray(COLOURS).save(p), COLOURS, 0),
        ("a.png", with_alpha, COLOURS, 0),
        ("a.tif", colour("RGBX"), there_and_back("RGBX"), 0),
        ("a.tif", colour("CMYK"), there_and_back("CMYK"), 0),
        ("a.tif", colour("YCbCr"), there_and_back("YCbCr"), 0),
        ("a.tif", colour("LAB"), there_and_back("LAB"), 0),
        ("a.png", lambda p: Image.fromarray(deep(RAMP)).save(p), RAMP, 0),
        ("a.tif", lambda p: Image.fromarray(deep(RAMP)).save(p), RAMP, 0),
        ("a.tif", lambda p: tiff(p, 16, deep(RAMP).astype(">u2").tobytes(), order=">"), RAMP, 0),
        ("a.tif", lambda p: tiff(p, 16, deep(255 - RAMP).tobytes(), photometric=0), RAMP, 0),
        ("a.tif", lambda p: tiff(p, 12, twelve_bits(RAMP * 16.06)), RAMP, 0),
        ("a.pgm", lambda p: p.write_bytes(b"P5 8 8 1020\n" + (RAMP * 4.0).astype(">u2").tobytes()), RAMP, 0),
        ("a.png", deep_colour, COLOURS, 1),
        ("a.jpg", lambda p: Image.fromarray(COLOURS).save(p, "PNG"), COLOURS, 0),  # content counts
        ("a.png", rotated, COLOURS, 0),
        ("a.png", animated, COLOURS, 0),
    ],
)  # fmt: skip
def test_pixels_of_every_mode(tmp_path, name, write, expected, off):
    """By the reader of training data and by that of evaluation."""
    write(tmp_path / name)
    try:
        Image.open(tmp_path / name).load()
    except OSError as error:
        pytest.skip(f"Pillow {PIL.__version__} cannot read what it wrote: {error}")
    pixels = Form(8)(read_image(tmp_path / name)).transpose(1, 2, 0).astype(int)
    wanted = expected if expected.ndim == 3 else expected[..., None].repeat(3, 2)
    assert np.abs(pixels - wanted).max() <= off
    (batch,) = generate.read_images([tmp_path / name])
    assert batch.shape[1] == (3 if expected.ndim == 3 or "PA" in Image.open(tmp_path / name).mode else 1)
    assert np.array_equal(batch[0].expand(3, 8, 8).permute(1, 2, 0), pixels)


@pytest.mark.parametrize(
    ("name", "write", "reason"),
    [
        ("a.tif", lambda p: Image.fromarray(RAMP.astype(np.int32)).save(p), "32-bit integers, .* range"),
        ("a.tif", lambda p: tiff(p, 16, RAMP.astype(np.int16).tobytes(), sample_format=2), "signed or"),
        ("a.tif", lambda p: tiff(p, 8, RAMP.tobytes(), sample_format=2), "signed or .* range"),
        ("a.tif", lambda p: tiff(p, 8, RAMP.tobytes(), sample_format=2, order=">"), "signed or"),
        ("a.tif", lambda p: Image.fromarray(RAMP / np.float32(255)).save(p), "floating-point numbers"),
        ("a.ppm", lambda p: p.write_bytes(b"Pf 8 8 -1.0\n" + RAMP.astype("<f4").tobytes()), "floating-point"),
        ("a.png", lambda p: png(p, 60_000, 60_000, 8, 0), "too many pixels: at most 89,478,485 are decoded"),
        ("a.png", lambda p: png(p, 10_000, 9_000, 1, 0), "too many pixels"),  # of which Pillow only warns
        ("a.jpg", lambda p: p.write_bytes(b""), "an empty file"),
        ("a.png", lambda p: png(p, 9, 9, 8, 2), "OSError: image file is truncated|ValueError|not enough"),
        ("a.png", lambda p: p.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "no image format"),
        ("a.webp", lambda p: p.write_bytes(b"RIFF\x08\0\0\0WEBPVP8 "), "."),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_holds_no_usable_image(tmp_path, name, write, reason):
    write(tmp_path / name)
    with pytest.raises(BrokenImage, match=reason):
        read_image(tmp_path / name)
    with pytest.raises(UserError, match=f"1 of 1 images cannot be read: .*{name}; of the first: "):
        list(generate.read_images([tmp_path / name]))


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(3 << 40)  # without a block on the disk
    with pytest.raises(BrokenImage, match=r"^3,298,534,883,328 bytes: at most 1,073,741,824 are read"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("shape", [(2003, 1), (1, 2004), (3, 1999), (199, 5)])
def test_thin_images_are_cut_before_they_are_scaled(shape, monkeypatch):
    """The same crop as of the image scaled in full, whose size would know no bound."""
    size, image = 24, Image.effect_noise(shape, 90).convert("RGB")
    width, height = (round(length * size / min(shape)) for length in shape)
    left, top = (width - size) // 2, (height - size) // 2
    full = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    sizes, resize = [], Image.Image.resize

    def noted(self, to, *args, **kwargs):
        sizes.append(to)
        return resize(self, to, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", noted)
    crop = center_crop(image, size).transpose(1, 2, 0)
    assert np.abs(crop.astype(int) - full[top : top + size, left : left + size]).max() <= 1
    assert max(max(to) for to in sizes) <= 32 * size


@pytest.fixture
def strange(tmp_path):
    """Two whole images, and everything else that can have an image's name."""
    folder = tmp_path / "source" / "ant"
    folder.mkdir(parents=True)
    (folder / "folder.png").mkdir()
    for name in ("whole.png", "folder.png/whole.png"):
        Image.fromarray(COLOURS).save(folder / name)
    os.mkfifo(folder / "fifo.png")
    with socket.socket(socket.AF_UNIX) as opened:
        before = Path.cwd()
        os.chdir(folder)  # the path of a socket must be short
        opened.bind("socket.png")
        os.chdir(before)
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "empty.png").touch()
    png(folder / "bomb.png", 50_000, 50_000, 8, 0)
    Image.fromarray(RAMP / np.float32(255)).save(folder / "float.tif")
    (folder / "notes.txt").touch()
    return tmp_path / "source"


def command(*arguments):
    """A process, which a hang would not outlive."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/zero, sockets and FIFOs as on Linux")
def test_prepare_skips_them_and_says_why(strange, tmp_path):
    out = tmp_path / "out"
    done = command("imf.data.prepare", strange, out, "--pixels", "--size", 8, "--workers", 2)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "BombWarning" not in done.stderr
    assert (out / "files.txt").read_text() == "ant/folder.png/whole.png\nant/whole.png\n"
    skipped = dict(line.split("\t") for line in (out / "skipped.tsv").read_text().splitlines())
    assert skipped["ant/fifo.png"] == "must be a regular file, got a FIFO"
    assert skipped["ant/socket.png"] == "must be a regular file, got a socket"
    assert skipped["ant/device.png"] == "must be a regular file, got a character device"
    assert skipped["ant/bomb.png"].startswith("too many pixels") and len(skipped) == 6
    assert "1 others are left out " in done.stdout and "such as ant/notes.txt" in done.stdout
    assert f"6 images skipped, all listed in {out / 'skipped.tsv'}:" in done.stdout
    assert "  ant/device.png: must be a regular file" in done.stdout and done.stdout.count("\n  ant/") == 5


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/zero, sockets and FIFOs as on Linux")
def test_evaluate_refuses_them_by_name(strange, tmp_path):
    script(Means(), tmp_path / "means.pt")
    options = ("--extractor", tmp_path / "means.pt", "--device", "cpu", "--make-statistics")
    done = command("imf.evaluate", *options, strange, tmp_path / "out.npz")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "BombWarning" not in done.stderr
    assert "6 of 8 images cannot be read: " in done.stderr and "bomb.png" in done.stderr


def test_grey_images_among_colour_and_tiffs_count(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "a.tif")
    Image.fromarray(RAMP).save(tmp_path / "b.png")
    Image.fromarray(RAMP).save(tmp_path / "c.tiff")
    images = torch.cat(list(generate.read_images(generate.image_files(tmp_path), 2)))
    assert images.shape == (3, 3, 8, 8) and torch.equal(images[1], torch.tensor(RAMP).expand(3, 8, 8))


def test_a_folder_of_samples_that_was_changed(tmp_path, capsys):
    script(Means(), tmp_path / "means.pt")
    folder = tmp_path / "samples"
    folder.mkdir()
    options = ["--extractor", str(tmp_path / "means.pt"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    with pytest.raises(SystemExit, match="2"):
        evaluate.main([*options, "--samples-dir", str(folder)])
    assert f"--samples-dir: no images in {folder}" in capsys.readouterr().err
    (folder / "a.png").symlink_to(tmp_path / "nothing")
    assert evaluate.main([*options, "--samples-dir", str(folder)]) == 1
    assert "a.png: a link to nothing" in capsys.readouterr().err


def test_an_extractor_that_fails_is_named(tmp_path, capsys):
    class Fails(torch.nn.Module):
        def forward(self, x):
            return x.float().reshape(-1, 7)

    script(Fails(), tmp_path / "fails.pt")
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    options = ["--extractor", str(tmp_path / "fails.pt"), "--device", "cpu", "--make-statistics"]
    assert evaluate.main([*options, str(tmp_path), str(tmp_path / "out.npz")]) == 1
    said = capsys.readouterr().err
    assert "fails.pt: the module fails on images [1, 3, 8, 8] uint8: " in said and "size 192" in said
    assert "Traceback" not in said


def test_statistics_of_sixteen_bit_images(tmp_path):
    """The command sees the levels, which were all white."""
    for i, image in enumerate((RAMP, 255 - RAMP, RAMP // 2)):
        Image.fromarray(deep(image)).save(tmp_path / f"{i}.png")
    script(Means(), tmp_path / "means.pt")
    options = ["--extractor", str(tmp_path / "means.pt"), "--device", "cpu", "--make-statistics"]
    assert evaluate.main([*options, str(tmp_path), str(tmp_path / "out.npz")]) == 0
    expected = np.mean([RAMP.mean(), (255 - RAMP).mean(), (RAMP // 2).mean()]) / 255
    assert fid.load_statistics(tmp_path / "out.npz").mean == pytest.approx([expected] * 3)


def test_a_class_of_which_nothing_can_be_used_is_warned_of(tmp_path, capsys):
    for name, image in (("ant", RAMP), ("bee", RAMP.astype(np.float32))):
        (tmp_path / "source" / name).mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / "source" / name / "a.tif")
    options = ["--pixels", "--size", "8"]
    assert prepare.main([str(tmp_path / "source"), str(tmp_path / "out"), *options]) == 0
    said = capsys.readouterr()
    assert "warning: bee: a class of which no image could be used" in said.err
    assert "bee/a.tif: floating-point numbers" in said.out

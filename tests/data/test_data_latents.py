"""Packed data: samples of the posterior, random access over shards, and folders that are not whole."""

import json
import shutil

import numpy as np
import pytest
import torch

from imf import data, train
from imf.data.prepare import __main__ as prepare
from imf.data.prepare.encoder import Encoder
from imf.data.prepare.form import Form
from imf.data.prepare.formats import find
from imf.data.prepare.pack import pack
from imf.program import UserError
from tests.helpers import tiny_data


class Moments(Encoder):
    """In the autoencoder's place: mean and std are known functions of the image's first pixel."""

    kind, dtype, shape, row_shape = "latents", "float32", (4, 32, 32), (2, 4, 32, 32)
    about = {"mean": [1.0, 2.0, 3.0, 4.0], "std": [2.0, 2.0, 4.0, 4.0]}  # noqa: RUF012

    def __call__(self, images):
        first = images[:, :1, :1, :1].astype(np.float32)
        rows = np.empty((len(images), *self.row_shape), np.float32)
        rows[:, 0], rows[:, 1] = first * np.arange(1, 5)[:, None, None], 0.5 + first / 256
        return rows


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of 8 latents in shards of 4, 4 and 0 images, less the broken; what it was made of."""
    source = find([tiny_data.images(tmp_path_factory.mktemp("source"))])
    out = tmp_path_factory.mktemp("out")
    pack(source, out, Moments(), form=Form(8), batch_size=3, shard_size=3, workers=1)
    kept = [
        image for image in source.decoded(range(10), Form(8), 1, ahead=1) if isinstance(image, np.ndarray)
    ]
    return out, torch.tensor(np.stack(kept)[:, 0, 0, 0].astype(np.float32))


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "folder")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_rows_are_samples_of_their_posterior(made):
    out, first = made
    packed = data.load(out)
    assert packed.shape == (4, 32, 32) and len(packed) == 8 and packed.num_classes == 2
    assert packed.class_names == ["ant", "bee"] and packed.labels.tolist() == [0] * 5 + [1] * 3
    rows = torch.tensor([7, 0, 3, 3, 5])
    x, y = packed.fetch(rows, generator())
    assert x.shape == (5, 4, 32, 32) and x.dtype == torch.float32 and torch.equal(y, packed.labels[rows])
    first, channel = first[rows][:, None, None, None], torch.arange(1, 5)[:, None, None]
    latents = x * torch.tensor([2, 2, 4, 4])[:, None, None] + channel
    noise = (latents - first * channel) / (0.5 + first / 256)
    # 20,480 normal values: mean and deviation within 4.5 standard errors, 1 / √n and 1 / √(2 n)
    assert abs(noise.mean()) < 4.5 / 20480**0.5 and abs(noise.std() - 1) < 4.5 / 40960**0.5
    correlations = torch.corrcoef(noise.flatten(1)) - torch.eye(5)
    assert correlations.abs().max() < 4.5 / 64  # rows of 4096, two of them of one image


def test_noise_of_a_row_depends_on_its_seed_alone(made):
    packed = data.load(made[0])
    rows = torch.tensor([1, 6, 2, 4])
    whole, _ = packed.fetch(rows, generator())
    again, _ = packed.fetch(rows, generator())
    other, _ = packed.fetch(rows, generator(1))
    assert torch.equal(whole, again) and not torch.equal(whole, other)
    half = generator()
    data.row_seeds(half, 2)
    assert torch.equal(packed.fetch(rows[2:], half)[0], whole[2:])
    torch.manual_seed(5)  # the global generator has no part in it
    assert torch.equal(packed.fetch(rows, generator())[0], whole)


def test_batches_do_not_depend_on_processes_nor_on_where_they_begin(made):
    packed = data.load(made[0])

    def batches(first, count, **options):
        with data.Batches(packed, batch_size=6, seed=2, first=first, **options) as walk:
            return [next(walk) for _ in range(count)]

    whole = batches(0, 4)
    parts = [batches(2, 2, process=p, processes=3) for p in range(3)]
    for step, (x, y) in enumerate(whole[2:]):
        assert torch.equal(torch.cat([part[step][0] for part in parts]), x)
        assert torch.equal(torch.cat([part[step][1] for part in parts]), y)


def test_mean_and_deviation_of_all_samples_are_in_the_index(made):
    """Against 200 samples of every latent."""
    packed = data.load(made[0])
    x, _ = packed.fetch(torch.arange(8).repeat(200), generator())
    said = packed.index["samples"]
    assert np.allclose(x.mean((0, 2, 3)), said["mean"], rtol=1e-3)
    assert np.allclose(x.std((0, 2, 3)), said["std"], rtol=1e-3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([8]), r"rows must be in \[0, 8\), got 8 ... 8"),
        (torch.tensor([-1]), r"rows must be in \[0, 8\)"),
        (torch.tensor([1.0]), r"rows must be \[B\] int64, got \[1\] torch.float32"),
        (torch.zeros(2, 2, dtype=torch.int64), r"got \[2, 2\]"),
    ],
)
def test_wrong_rows_are_named(made, rows, message):
    with pytest.raises(ValueError, match=message):
        data.load(made[0]).fetch(rows, generator())


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_verify(folder):
    """Bytes that changed in place are seen by their checksum, and by that alone."""
    assert len(list(data.load(folder).verify())) == 3 and prepare.main(["--verify", str(folder)]) == 0
    path = folder / "shard-00001.npy"
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00001\.npy: its SHA-256 must be .* got"):
        list(data.load(folder).verify())
    assert prepare.main(["--verify", str(folder)]) == 1


def truncate(folder):
    path = folder / "shard-00001.npy"
    path.write_bytes(path.read_bytes()[:-100])


def relabel(values):
    return lambda folder: np.save(folder / "labels.npy", np.array(values))


def other_shape(folder):
    rows = np.zeros((3, 2, 4, 16, 64), np.float32)  # as many bytes
    np.save(folder / "shard-00000.npy", rows)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"shard-00001\.npy: must have 98,432 bytes, as index\.json says, got 98,332: truncated"),
        (
            lambda f: (f / "shard-00002.npy").unlink(),
            r"shard-00002\.npy: could not be read",
        ),
        (other_shape, r"shard-00000\.npy: must be \[3, 2, 4, 32, 32\] float32, .* got \[3, 2, 4, 16, 64\]"),
        (relabel([0] * 7), r"labels\.npy: must be \[8\] int64, as index\.json says, got \[7\]"),
        (relabel([0] * 7 + [2]), r"labels\.npy: labels must be in \[0, 2\), got 0 ... 2"),
        (relabel([0] * 7 + [1]), r"labels\.npy: its SHA-256 must be"),
        (lambda f: (f / "labels.npy").write_bytes(b"\x93NUMPY"), r"labels\.npy: not a whole \.npy file"),
        (lambda f: (f / "labels.npy").unlink(), r"labels\.npy: could not be read"),
        (lambda f: edit(f / "index.json", rows=9), r"index\.json: disagrees with itself .* 9 rows"),
        (lambda f: edit(f / "index.json", shape=[3, 32, 32]), r"index\.json: .* each of 3 channels"),
        (
            lambda f: edit(f / "index.json", kind="video"),
            "kind must be latents or pixels, got 'video'",
        ),
        (lambda f: edit(f / "index.json", shards=[{}]), r"index\.json: disagrees"),
        (lambda f: edit(f / "index.json", format=99), r"index\.json: of format 99, this version reads 1"),
        (lambda f: (f / "index.json").write_text("{"), r"index\.json: not a readable JSON file"),
        (lambda f: (f / "index.json").rename(f / "prepare.json"), "half-made: the same python -m imf"),
        (lambda f: (f / "index.json").unlink(), r"no index\.json in it"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message):
        data.load(folder)


def test_pixels(tmp_path):
    source = tiny_data.images(tmp_path / "source", broken=False)
    assert tiny_data.pack(source, tmp_path / "out") == 0
    packed = data.load(tmp_path / "out")
    rows = torch.tensor([9, 0, 4])
    x, y = packed.fetch(rows, generator())
    found = find([source])
    images = torch.stack(
        [torch.from_numpy(image) for image in found.decoded(rows.tolist(), Form(8), 1, ahead=1)]
    )
    assert torch.equal(packed.images(rows), images) and y.tolist() == [1, 0, 0]
    assert packed.shape == (3, 8, 8) and torch.allclose(x, images / 127.5 - 1, atol=1e-6)
    assert x.min() >= -1 and x.max() <= 1


def test_latents_are_not_flipped(folder, tmp_path, capsys):
    options = ["--data", str(folder), "--flip", "--runs", str(tmp_path / "runs"), "--sample-every", "0"]
    assert train.main([*options, "--device", "cpu"]) == 1
    assert "--flip must be off for latents, got on: " in capsys.readouterr().err

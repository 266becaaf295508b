"""From image folders to packed data: which files, which crop, the autoencoder, and what is refused."""

import numpy as np
import pytest
import torch

from imf import data
from imf.data.prepare import __main__ as prepare
from imf.data.prepare.encoder import Latents
from imf.data.prepare.form import Form
from imf.images import read_image
from imf.program import UserError
from tests.helpers import tiny_data

AE = pytest.importorskip("diffusers", reason="the autoencoder is diffusers'").AutoencoderKL


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return tiny_data.autoencoder(tmp_path_factory.mktemp("vae") / "vae")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny_data.images(tmp_path_factory.mktemp("source"))


def test_latents_are_the_posterior_of_the_autoencoder(images, vae, tmp_path, capsys):
    """Each stored row against diffusers' own encoding of that image alone."""
    command = [str(images), str(tmp_path / "out"), "--vae", str(vae), "--size", "32", "--batch-size", "3"]
    assert prepare.main([*command, "--shard-size", "4", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "10 images in 2 classes" in said and "8 latents [4, 4, 4] of 2 classes" in said
    packed = data.load(tmp_path / "out")
    names = (tmp_path / "out" / "files.txt").read_text().splitlines()
    assert names == [f"ant/{i:02d}.png" for i in range(5)] + [f"bee/{i:02d}.png" for i in range(3)]
    autoencoder = AE.from_pretrained(vae, low_cpu_mem_usage=False)
    stored = torch.cat(
        [torch.from_numpy(np.load(path)) for path in sorted((tmp_path / "out").glob("shard*"))]
    )
    for name, row in zip(names, stored, strict=True):
        image = torch.from_numpy(Form(32)(read_image(images / name)))
        with torch.no_grad():
            posterior = autoencoder.encode(image[None] / 127.5 - 1).latent_dist
        assert torch.allclose(row, torch.stack([posterior.mean[0], posterior.std[0]]), atol=1e-5)
    assert packed.mean.tolist() == pytest.approx([0.86488, -0.27787343, 0.21616915, 0.3738409])
    assert packed.std.tolist() == pytest.approx([4.85503674, 5.31922414, 3.93725398, 3.9870003])


def test_precisions(vae):
    """In bf16 the posterior is that of fp32 to a few of its roundings, and not the same."""
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    exact, rounded = (Latents(vae, 32, torch.device("cpu"), p)(images) for p in ("fp32", "bf16"))
    error = np.sqrt(np.mean((rounded - exact) ** 2) / np.mean(exact**2))
    assert 2**-12 < error < 2**-5 and rounded.dtype == np.float32


def test_broken_images_are_skipped_and_listed(images, tmp_path):
    assert tiny_data.pack(images, tmp_path) == 0
    lines = (tmp_path / "skipped.tsv").read_text().splitlines()
    assert lines[0] == "bee/03.png\tno image format that Pillow knows"
    assert lines[1].startswith("bee/04.png\t") and len(lines) == 2
    assert data.load(tmp_path).index["skipped"] == 2


def test_nothing_but_broken_images(tmp_path, capsys):
    (tmp_path / "source" / "ant").mkdir(parents=True)
    (tmp_path / "source" / "ant" / "a.jpg").write_bytes(b"")
    assert tiny_data.pack(tmp_path / "source", tmp_path / "out") == 1
    assert "none of the 1 images could be decoded: an empty file" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())  # so that another command can begin there


def test_statistics(images, tmp_path):
    """Those of the pixels as features, which NumPy gives as well."""
    path = tmp_path / "statistics.npz"
    assert tiny_data.pack(images, tmp_path / "out", "--statistics", path, "--extractor", "pixels") == 0
    pixels = data.load(tmp_path / "out").images(torch.arange(8)).flatten(1).double().numpy() / 127.5 - 1
    with np.load(path) as got:
        assert np.allclose(got["mu"], pixels.mean(0), atol=1e-6)
        assert np.allclose(got["sigma"], np.cov(pixels.T), atol=1e-6)


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        ({"latent_channels": 8}, 32, "latent_channels"),
        ({"scaling_factor": 0.13025}, 32, r"scaling_factor.* got 0\.13025"),
        ({}, 36, "--size must be a multiple of 8, .* got 36"),
    ],
)
def test_wrong_autoencoder(tmp_path, config, size, message):
    path = tiny_data.autoencoder(tmp_path / "vae", **config)
    with pytest.raises(ValueError, match=message):
        Latents(path, size, torch.device("cpu"), "fp32")


def test_folders_that_hold_no_autoencoder(vae, tmp_path):
    def loads(path):
        return Latents(path, 32, torch.device("cpu"), "fp32")

    with pytest.raises(UserError, match="nowhere: no such folder"):
        loads(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"got no config\.json$"):
        loads(tmp_path)
    (tmp_path / "vae").mkdir()
    with pytest.raises(UserError, match="a whole pipeline: pass the folder vae in it"):
        loads(tmp_path)
    config = tmp_path / "vae" / "config.json"
    config.write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(UserError, match="folder, got one of UNet2DModel"):
        loads(tmp_path / "vae")
    config.write_text((vae / "config.json").read_text())
    (tmp_path / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"got config\.json, .*\.bin; nothing is unpickled"):
        loads(tmp_path / "vae")
    weights = (vae / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(ValueError, match=str(tmp_path)):
        loads(tmp_path / "vae")


def test_a_folder_begun_otherwise_is_refused(images, vae, tmp_path, capsys):
    out = tmp_path / "out"
    assert tiny_data.pack(images, out) == 0
    other = tiny_data.images(tmp_path / "other", count=6)
    for source, options, message in (
        (images, ["--size", "16"], "size was 8, now it is 16"),
        (images, ["--shard-size", "5"], "shard_size was 4, now it is 5"),
        (images, ["--batch-size", "3"], "batch_size was 2, now it is 3"),
        (other, [], "source.images was 10, now it is 12"),
    ):
        assert tiny_data.pack(source, out, *options) == 1
        assert message in capsys.readouterr().err
    assert tiny_data.pack(images, out) == 0  # the same command: it is whole already
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    assert tiny_data.pack(images, tmp_path / "mine") == 1
    assert "OUT must be empty, new or begun by this program, got thesis.txt" in capsys.readouterr().err


def test_another_autoencoder_is_refused(images, vae, tmp_path, capsys):
    def command(path):
        folders = [str(images), str(tmp_path / "out"), "--vae", str(path)]
        return prepare.main([*folders, "--size", "8", "--device", "cpu"])

    assert command(vae) == 0
    other = tiny_data.autoencoder(tmp_path / "other", layers_per_block=2)
    assert command(other) == 1 and "encoder.vae_sha256 was" in capsys.readouterr().err
    assert tiny_data.pack(images, tmp_path / "out") == 1 and "kind was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "SOURCE and OUT are needed, or --verify OUT"),
        (["a", "b"], "either --vae PATH, for latents, or --pixels"),
        (["a", "b", "--pixels", "--vae", "c"], "either --vae PATH"),
        (["a", "b", "--pixels", "--workers", "-1"], "--workers must be at least 0, got -1"),
        (["a", "b", "--pixels", "--statistics", "c"], "--statistics FILE and --extractor NAME go together"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        prepare.main(arguments)
    assert message in capsys.readouterr().err

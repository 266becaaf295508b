"""The autoencoder: its constants, round trips, and folders that hold another or none."""

import json
import os

import pytest
import torch

from imf.evaluation import vae
from imf.program import UserError
from tests.helpers.tiny_evaluation import autoencoder

pytest.importorskip("diffusers", reason="diffusers is not installed")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return autoencoder(tmp_path_factory.mktemp("vae"))


def test_decoding_undoes_the_normalisation(folder):
    model = vae.load(folder, CPU)
    raw = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * 5
    mean, std = torch.tensor([vae.MEAN, vae.STD])[..., None, None]
    z = (raw - mean) / std
    torch.testing.assert_close(z[0, 2, 1, 1].item(), (raw[0, 2, 1, 1].item() - 0.21616915) / 3.93725398)
    with torch.no_grad():
        expected = model.decode(raw).sample
    got = vae.decode(model, z)
    assert got.shape == (2, 3, 6, 6) and not got.requires_grad
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"latents must be \[B, 4, H, W\], got \[2, 3, 3, 3\]"):
        vae.decode(model, z[:, :3])


def test_another_autoencoder_is_refused(tmp_path, folder):
    with pytest.raises(UserError, match=r"scaling_factor 0\.18215, got 0\.13025"):
        vae.load(autoencoder(tmp_path / "xl", scaling_factor=0.13025), CPU)
    with pytest.raises(UserError, match="latent_channels 4, got 16"):
        vae.load(autoencoder(tmp_path / "sd3", latent_channels=16), CPU)
    (tmp_path / "vq").mkdir()
    (tmp_path / "vq" / "config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    with pytest.raises(UserError, match="must be an AutoencoderKL's folder, got one of VQModel"):
        vae.load(tmp_path / "vq", CPU)


def test_folders_without_a_whole_autoencoder_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        vae.load(tmp_path, CPU)
    folder = autoencoder(tmp_path / "vae")
    weights = folder / "diffusion_pytorch_model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(UserError, match="no AutoencoderKL can be read"):
        vae.load(folder, CPU)
    weights.unlink()
    torch.save({}, folder / "diffusion_pytorch_model.bin")  # a pickle is not looked at
    with pytest.raises(
        UserError, match=r"must hold diffusion_pytorch_model\.safetensors, got .*; nothing is unpickled"
    ):
        vae.load(folder, CPU)


def test_weights_that_lack_a_layer_are_refused(tmp_path, folder):
    from safetensors.torch import load_file, save_file

    other = autoencoder(tmp_path / "vae")
    state = load_file(other / "diffusion_pytorch_model.safetensors")
    del state["decoder.conv_in.bias"]
    save_file(state, other / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"lack decoder\.conv_in\.bias \(1\)"):
        vae.load(other, CPU)


def test_latents_need_one_and_images_do_not(folder):
    assert vae.of_network(None, 1, CPU) is None and vae.of_network(folder, 4, CPU) is not None
    with pytest.raises(UserError, match="makes latents: pass the autoencoder's folder"):
        vae.of_network(None, 4, CPU)
    with pytest.raises(UserError, match=r"makes images already.*3 channels"):
        vae.of_network(folder, 3, CPU)

"""The pipeline of diffusers: its images, its folders, and what it refuses."""

import json
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed")

import imf
from imf.evaluation import vae
from imf.model.pretrained import Sampling
from imf.pipeline import IMFPipeline
from imf.program import UserError
from tests.helpers.tiny_evaluation import LATENTS, autoencoder
from tests.helpers.tiny_run import perturbed

CPU = torch.device("cpu")


def network(**sampling):
    """A network of grey images of 8 x 8 with a run's settings."""
    result = perturbed("imf").requires_grad_(False)
    result.sampling = Sampling(**{"omega": 1.5, "t_min": 0.25, "t_max": 0.75, **sampling})
    return result


def noise(seed):
    return torch.Generator().manual_seed(seed)


def test_images_are_those_of_the_network():
    net = network(class_names=tuple("abcdefghij"))
    pipeline = IMFPipeline(net)
    z = torch.randn((2, 1, 8, 8), generator=noise(3))
    guidance = {"omega": 1.5, "t_min": 0.25, "t_max": 0.75}
    samples = imf.generate(net, z, torch.tensor([3, 7]), steps=2, **guidance)
    wanted = (samples / 2 + 0.5).clamp(0, 1)

    def draw(labels, output_type, **options):
        return pipeline(labels, 2, generator=noise(3), output_type=output_type, **options).images

    assert torch.equal(draw([3, 7], "latent"), samples)
    assert torch.equal(draw([3, 7], "pt"), wanted) and torch.equal(draw(["d", "h"], "pt"), wanted)
    assert np.array_equal(draw([3, 7], "np"), wanted.permute(0, 2, 3, 1).numpy())
    for image, x in zip(draw([3, 7], "pil"), wanted, strict=True):
        assert image.size == (8, 8) and image.mode == "L"
        assert np.array_equal(np.asarray(image), (x[0] * 255).round().byte().numpy())
    plain = imf.generate(net, z, torch.tensor([3, 7]), steps=2, omega=4.0, t_min=0.0, t_max=0.5)
    got = draw([3, 7], "latent", guidance_scale=4.0, guidance_interval=(0.0, 0.5))
    assert torch.equal(got, plain) and not torch.equal(plain, samples)
    rows = [pipeline(label, generator=noise(label), output_type="latent").images for label in (1, 2)]
    several = pipeline([1, 2], generator=[noise(1), noise(2)], output_type="latent", return_dict=False)[0]
    assert torch.allclose(several, torch.cat(rows), atol=1e-5)


def test_a_folder_is_the_pipeline(tmp_path):
    """The network's part of it is a folder of `save_pretrained`; its dtype is that of products."""
    net = network()
    net.compute_dtype = torch.bfloat16
    IMFPipeline(net).save_pretrained(tmp_path / "pipeline")
    assert json.loads((tmp_path / "pipeline" / "model_index.json").read_text())["network"] == [
        "imf.pipeline",
        "IMFModel",
    ]
    assert imf.load(tmp_path / "pipeline" / "network").sampling == net.sampling
    again = IMFPipeline.from_pretrained(tmp_path / "pipeline")
    assert again.network.network.compute_dtype == torch.bfloat16
    images = [p([4], generator=noise(0), output_type="latent").images for p in (IMFPipeline(net), again)]
    assert torch.equal(*images)
    assert again.to(torch.float32).network.network.compute_dtype == torch.float32
    assert again.to("cpu", torch.bfloat16).network.dtype == torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # `dtype` is its name in newer versions of diffusers
        wide = IMFPipeline.from_pretrained(tmp_path / "pipeline", torch_dtype=torch.float32)
    assert wide.network.network.compute_dtype == torch.float32
    with pytest.raises(UserError, match=r"dtype must be one of .*, got torch\.float16"):
        again.to(torch.float16)
    (tmp_path / "pipeline" / "network" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
        IMFPipeline.from_pretrained(tmp_path / "pipeline")


def test_latents_are_decoded(tmp_path):
    net = perturbed("imf", LATENTS).requires_grad_(False)
    decoder = vae.load(autoencoder(tmp_path / "vae"), CPU)
    pipeline = IMFPipeline(net, decoder)
    latents = pipeline([0, 4], generator=noise(1), output_type="latent").images
    images = pipeline([0, 4], generator=noise(1), output_type="pt").images
    assert latents.shape == (2, 4, 4, 4) and images.shape == (2, 3, 8, 8)
    assert torch.allclose(images, (vae.decode(decoder, latents) / 2 + 0.5).clamp(0, 1), atol=1e-6)
    pipeline.save_pretrained(tmp_path / "pipeline")
    again = IMFPipeline.from_pretrained(tmp_path / "pipeline")
    got = again([0, 4], generator=noise(1), output_type="pt").images
    assert torch.allclose(got, images, atol=1e-5)  # its weights lie elsewhere in memory
    rounded = again.to(torch.bfloat16)([0, 4], generator=noise(1), output_type="pt").images
    assert rounded.dtype == torch.float32 and torch.allclose(rounded, images, atol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": [11]}, "labels must be within 0 and 10"),
        ({"class_labels": "cat"}, "labels must be integers, no names are known, got 'cat'"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer of at least 1, got 0"),
        ({"guidance_scale": 0.0}, "omega .* must be at least 1, got 0.0"),
        ({"guidance_interval": (0.5, 0.25)}, "t_max"),
        ({"output_type": "jpg"}, "output_type must be one of 'pil', 'np', 'pt', 'latent', got 'jpg'"),
    ],
)
def test_bad_calls(options, message):
    with pytest.raises(UserError, match=message):
        IMFPipeline(network())(**{"class_labels": [1], **options})


def test_networks_and_autoencoders_that_do_not_fit(tmp_path):
    from diffusers import AutoencoderKL

    decoder = vae.load(autoencoder(tmp_path / "vae"), CPU)
    with pytest.raises(UserError, match=r"the network makes images, leave vae out \(1 channels\)"):
        IMFPipeline(network(), decoder)
    latents = perturbed("imf", LATENTS)
    with pytest.raises(UserError, match=r"the network makes latents, pass the vae that decodes them"):
        IMFPipeline(latents)
    other = AutoencoderKL.from_pretrained(autoencoder(tmp_path / "xl", scaling_factor=0.13025))
    with pytest.raises(UserError, match=r"vae: wanted Stable Diffusion 1's autoencoder.*got 0\.13025"):
        IMFPipeline(latents, other)
    with pytest.raises(UserError, match=r"network must be one of imf\.load, got a Linear"):
        IMFPipeline(torch.nn.Linear(2, 2))

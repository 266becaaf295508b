"""Small sources, autoencoders and folders for the tests of data."""

import os
import resource
import signal
import sys

import numpy as np
from PIL import Image

from imf.data.prepare import __main__ as prepare


def images(root, classes=("ant", "bee"), count=5, broken=True):
    """Folders of noise of several sizes, a class each; in the last class two files are broken."""
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            height, width = rng.integers(9, 40, 2)
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02d}.png")
    if broken:
        (root / classes[-1] / "03.png").write_bytes(b"no image")
        whole = (root / classes[-1] / "04.png").read_bytes()
        (root / classes[-1] / "04.png").write_bytes(whole[: len(whole) // 2])
    return root


def autoencoder(path, **config):
    """A random AutoencoderKL of Stable Diffusion's form, and few channels, saved in `path`."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    small = {
        "block_out_channels": (4, 4, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 2,
        "layers_per_block": 1,
    }
    AutoencoderKL(**{**small, **config}).save_pretrained(path)
    return path


def pack(source, out, *more):
    """Prepares pixels of 8 x 8 in shards of 4; returns the exit status."""
    options = {"--size": 8, "--shard-size": 4, "--batch-size": 2, "--workers": 1}
    command = [source, out, "--pixels", *(part for option in options.items() for part in option), *more]
    return prepare.main([str(part) for part in command])


def content(folder):
    """Path below `folder` -> bytes, for every file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def kill_before(number, folder):
    """From now on this process is killed (SIGKILL) before its `number`-th change of what lies in `folder`."""
    left = number

    def hook(event, arguments):
        nonlocal left
        below = str(folder) in str(arguments[0]) if arguments else False
        changes = event in ("os.rename", "os.mkdir") or (event == "open" and arguments[2] & os.O_CREAT)
        if (changes and below) or event in (
            "os.remove",
            "os.rmdir",
        ):  # whose paths may be relative
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def pack_until(number, source, out):
    """Packs until the `number`-th change of what lies in `out`."""
    kill_before(number, out)
    return pack(source, out)


def pack_in(size, source, out):
    """Packs where no file may have more than `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return pack(source, out)

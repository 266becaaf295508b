"""Pack an image folder for training: `python -m imf.data.prepare SOURCE OUT --vae PATH`."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

from PIL import Image

from imf.data.prepare.encoder import PRECISIONS
from imf.data.prepare.pack import pack_command, verify_command
from imf.evaluation.inception import FORMS
from imf.program import run


def main(argv: list[str] | None = None) -> int:
    """`python -m imf.data.prepare`; returns the exit status: 2 for a wrong argument, else `run`'s."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not arguments.verify:
        if arguments.source is None or arguments.out is None:
            parser.error("SOURCE and OUT are needed, or --verify OUT")
        if (arguments.vae is None) != arguments.pixels:
            parser.error("either --vae PATH, for latents, or --pixels is needed")
        if (arguments.statistics is None) != (arguments.extractor is None):
            parser.error("--statistics FILE and --extractor NAME go together")
        if arguments.workers < 0:
            parser.error(f"--workers must be at least 0, got {arguments.workers}")
        arguments.workers = arguments.workers or os.cpu_count() or 1
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such images are skipped, and listed
    return run(
        "imf.data.prepare",
        lambda: verify_command(arguments.verify) if arguments.verify else pack_command(arguments),
        stopped="stopped; the same command resumes where it stopped",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m imf.data.prepare",
        description="Pack a folder of images, as latents or pixels, for imf.train. The same command resumes "
        "where a stopped or killed one ended.",
    )
    add = parser.add_argument
    add(
        "source", type=Path, nargs="?", metavar="SOURCE", help="folder with a folder per class, or ImageNet's"
    )
    add("out", type=Path, nargs="?", metavar="OUT", help="folder to write: new, empty, or begun alike")
    add("--vae", type=Path, metavar="PATH", help="folder of diffusers' AutoencoderKL (sd-vae-ft-mse)")
    add("--pixels", action="store_true", help="store the pixels, without an autoencoder")
    add("--labels", type=Path, metavar="FILE", help="lines `file label`, for images without class folders")
    add("--size", type=int, default=256, help="pixels of a side after the crop (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="images encoded together (default: %(default)s)")
    add("--shard-size", type=int, default=4096, help="images per shard (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<index> (default: %(default)s)")
    add("--precision", choices=PRECISIONS, default="fp32", help="of the encoder (default: %(default)s)")
    add("--workers", type=int, default=0, help="threads that decode images (default: one per core)")
    add("--statistics", type=Path, metavar="FILE", help="write FID statistics of the images (.npz) too")
    add("--extractor", metavar="NAME", help=f"by these features: {FORMS}")
    add("--verify", type=Path, metavar="OUT", help="only check every byte of a finished folder")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""Pack images for training: `python -m imf.data.prepare SOURCE OUT --vae PATH`."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

from PIL import Image, ImageColor

from imf.data.prepare.encoder import PRECISIONS
from imf.data.prepare.form import FITS
from imf.data.prepare.pack import pack_command, verify_command
from imf.evaluation.inception import FORMS
from imf.program import run


def main(argv: list[str] | None = None) -> int:
    """`python -m imf.data.prepare`; returns the exit status: 2 for a wrong argument, else `run`'s."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not arguments.verify:
        if len(arguments.paths) < 2:
            parser.error("SOURCE and OUT are needed, or --verify OUT")
        *arguments.sources, arguments.out = arguments.paths
        if (arguments.vae is None) != arguments.pixels:
            parser.error("either --vae PATH, for latents, or --pixels is needed")
        if (arguments.statistics is None) != (arguments.extractor is None):
            parser.error("--statistics FILE and --extractor NAME go together")
        if arguments.channels is not None and not arguments.pixels:
            parser.error("--channels goes with --pixels: the autoencoder takes 3")
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
        usage="%(prog)s SOURCE [SOURCE ...] OUT (--pixels | --vae PATH) [options]",
        description="Pack images, as latents or pixels, for imf.train. The same command resumes where a "
        "stopped or killed one ended.",
    )
    add = parser.add_argument
    sources = (
        "SOURCE: a folder of images, or of a folder per class, or ImageNet's; IDX (MNIST), parquet or tar "
        "files (WebDataset), or a folder of them; a .npz or .npy file; a folder of Dataset.save_to_disk. "
        "OUT: folder to write: new, empty, or begun alike"
    )
    add("paths", type=Path, nargs="*", metavar="SOURCE OUT", help=sources)
    add("--vae", type=Path, metavar="PATH", help="folder of diffusers' AutoencoderKL (sd-vae-ft-mse)")
    add("--pixels", action="store_true", help="store the pixels, without an autoencoder")
    text = "lines `file label`, for images without class folders; a .npy file for images in one"
    add("--labels", type=Path, metavar="FILE", help=text)
    add("--unconditional", action="store_true", help="read no labels: one class for all images")
    text = "names of the classes, between commas, or a file with one per line (default: the source's)"
    add("--class-names", metavar="NAMES", help=text)
    text = "column, array or extension that holds the images (default: the usual names)"
    add("--image-key", metavar="NAME", help=text)
    text = "column, array, extension or JSON field that holds the labels (default: the usual names)"
    add("--label-key", metavar="NAME", help=text)
    text = "pixels of a side (default: 256 for latents; for pixels the images' own, if all have the same)"
    add("--size", type=_positive, help=text)
    text = "crop the centre, or pad to a square (default: %(default)s)"
    add("--fit", choices=FITS, default="crop", help=text)
    text = "1, grey, or 3, colour (default: 1 if all images are grey)"
    add("--channels", type=int, choices=(1, 3), help=text)
    text = "colour behind transparent images, which are skipped without one, and of --fit pad: white, #808080"
    add("--background", type=_colour, metavar="COLOUR", help=text)
    add("--batch-size", type=int, default=64, help="images encoded together (default: %(default)s)")
    add("--shard-size", type=int, default=4096, help="images per shard (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<index> (default: %(default)s)")
    add("--precision", choices=PRECISIONS, default="fp32", help="of the encoder (default: %(default)s)")
    add("--workers", type=int, default=0, help="threads that decode images (default: one per core)")
    add("--statistics", type=Path, metavar="FILE", help="write FID statistics of the images (.npz) too")
    add("--extractor", metavar="NAME", help=f"by these features: {FORMS}")
    add("--verify", type=Path, metavar="OUT", help="only check every byte of a finished folder")
    return parser


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text}")
    return int(text)


def _colour(text: str) -> tuple[int, int, int]:
    try:
        red, green, blue, *_ = ImageColor.getrgb(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a name or #rrggbb, got {text}") from None
    return red, green, blue


if __name__ == "__main__":
    sys.exit(main())

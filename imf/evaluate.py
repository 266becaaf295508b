"""FID and Inception score of samples or images: `python -m imf.evaluate`, on many processes by `torchrun`."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
from PIL import Image

from imf import data
from imf.distributed import initialized
from imf.evaluation import inception as features
from imf.evaluation.run import COUNT, Evaluation, check_arguments
from imf.model.pretrained import PRECISIONS, precision_of
from imf.program import run, thread_count
from imf.training import checkpoint


def main(argv: list[str] | None = None) -> int:
    """Runs `python -m imf.evaluate`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m imf.evaluate",
        description="FID and Inception score of a network's samples, or of images in a folder.",
    )
    add, interval, weights = parser.add_argument, ("T_MIN", "T_MAX"), ("ema", "model")
    add("--checkpoint", type=Path, help="a checkpoint, or the folder of a run (its newest one)")
    add("--weights", choices=weights, default="ema", help="averaged or latest (default: %(default)s)")
    add("--precision", choices=tuple(PRECISIONS), help="of products and attention (default: its own)")
    text = "keep samples here, a folder a setting, and go on from those that are there; "
    add("--samples-dir", type=Path, help=f"{text}without --checkpoint: the images to judge")
    text = f"images, as many of each class (default: {COUNT:,}, or all that --samples-dir holds)"
    add("--count", type=int, help=text)
    add("--steps", type=int, nargs="+", default=[1], help="network calls per sample (default: 1)")
    add("--omega", type=float, nargs="+", help="guidance scales (default: its own)")
    text = "guidance interval; may be given several times (default: its own)"
    add("--interval", type=float, nargs=2, action="append", metavar=interval, help=text)
    add("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="images at a time a process (default: %(default)s)")
    add("--vae", type=Path, help="folder of the AutoencoderKL (sd-vae-ft-mse) that decodes latents")
    add("--extractor", required=True, help=f"what makes features of images: {features.FORMS}")
    add("--reference", help="statistics (.npz), a folder of images or a data set; without it no FID")
    text = "write the statistics of a folder of images or of a data set, and nothing else"
    add("--make-statistics", nargs=2, metavar=("SOURCE", "OUT"), help=text)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<index> (default: %(default)s)")
    add("--threads", type=thread_count, default=0, help="CPU threads (default: as PyTorch chooses)")
    add("--out", type=Path, default=Path("evaluation"), help="folder of results.json (default: %(default)s)")
    add("--plot", type=Path, help="draw the figures over ω into this PNG")
    a = parser.parse_args(argv)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such images are refused by name
    return run("imf.evaluate", lambda: _evaluate(a, parser), "stopped; the same command goes on from there")


def _evaluate(a: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    check_arguments(a, parser.error)
    if a.threads:
        torch.set_num_threads(a.threads)
    with initialized(a.device) as processes:
        extractor = features.load(a.extractor, processes.device)
        if a.make_statistics:
            Evaluation(a, processes, extractor, data.load).make_statistics()
            return
        network = None
        if a.checkpoint:
            path = checkpoint.weights_file(a.checkpoint)
            if processes.rank == 0:
                print(f"Reading {path}, {path.stat().st_size / 2**20:,.1f} MiB", file=sys.stderr)
            network = checkpoint.load(a.checkpoint, a.weights)
            a.precision = a.precision or precision_of(network)
            network.compute_dtype = PRECISIONS[a.precision]
            network.to(processes.device).eval()
        environment = {"checkpoint": str(a.checkpoint or ""), **checkpoint.environment(processes.device)}
        Evaluation(a, processes, extractor, data.load, network).run(environment)


if __name__ == "__main__":
    sys.exit(main())

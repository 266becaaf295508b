"""A grid of samples of a checkpoint: `python -m imf.sample`."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

from imf.distributed import choose_device
from imf.evaluation import vae as autoencoder
from imf.io import check_target, naming, replacing
from imf.program import UserError, run, thread_count
from imf.sampling import MOST_NAMED, class_grid, find_classes
from imf.training import checkpoint


def main(argv: list[str] | None = None) -> int:
    """Runs `python -m imf.sample`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m imf.sample", description="Draw a grid of samples.")
    add, pair, weights = parser.add_argument, ("T_MIN", "T_MAX"), ("ema", "model")
    text = "a run's folder, a checkpoint, or a folder of save_pretrained"
    add("--checkpoint", type=Path, required=True, help=text)
    add("--out", type=Path, default=Path("grid.png"), help="PNG to write (default: %(default)s)")
    add("--steps", type=int, default=1, help="network calls per sample (default: %(default)s)")
    add("--omega", type=float, help="guidance scale (default: the run's)")
    add("--interval", type=float, nargs=2, metavar=pair, help="guidance interval (default: the run's)")
    text = f"labels or names of the rows, by spaces or commas (default: all of up to {MOST_NAMED} classes)"
    add("--classes", nargs="+", metavar="CLASS", help=text)
    add("--vae", type=Path, help="folder of the AutoencoderKL (sd-vae-ft-mse) that decodes latents")
    add("--columns", type=int, default=10, help="samples per class (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<index> (default: %(default)s)")
    add("--threads", type=thread_count, default=0, help="CPU threads (default: as PyTorch chooses)")
    add("--weights", choices=weights, default="ema", help="averaged or latest (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.columns < 1:
        parser.error(f"--columns must be at least 1, got {arguments.columns}")
    if not 0 <= arguments.seed < 2**63:
        parser.error(f"--seed must be at least 0 and below 2 ** 63, got {arguments.seed}")
    return run("imf.sample", lambda: _draw(arguments))


def _draw(a: argparse.Namespace) -> None:
    """Writes the grid and says what was done."""
    check_target(a.out)
    if a.threads:
        torch.set_num_threads(a.threads)
    device, path = choose_device(a.device), checkpoint.weights_file(a.checkpoint)
    print(f"Reading {path}, {path.stat().st_size / 2**20:,.1f} MiB", file=sys.stderr)
    network = checkpoint.load(a.checkpoint, a.weights)
    config, sampling = network.config, network.sampling
    omega = sampling.omega if a.omega is None else a.omega
    t_min, t_max = a.interval or (sampling.t_min, sampling.t_max)
    if a.classes is None and config.num_classes > MOST_NAMED:
        raise UserError(f"--classes: the network knows {config.num_classes}, name those that should be drawn")
    names, every = sampling.class_names, range(config.num_classes)
    classes = every if a.classes is None else find_classes(a.classes, names, config.num_classes)
    vae = autoencoder.of_network(a.vae, config.in_channels, device, sampling.autoencoder)
    decode = partial(autoencoder.decode, vae) if vae else None
    guidance = {"omega": omega, "t_min": t_min, "t_max": t_max}
    options = {"columns": a.columns, "steps": a.steps, "seed": a.seed, **guidance}
    network.to(device)
    picture = class_grid(network, classes=classes, class_names=names, decode=decode, bar=True, **options)
    with naming(a.out), replacing(a.out) as temporary:
        picture.save(temporary, format="PNG")
    print(
        f"{a.out}: {a.columns} samples per class in {a.steps} step(s), omega {omega:g}, "
        f"interval [{t_min:g}, {t_max:g}], from {path}"
    )


if __name__ == "__main__":
    sys.exit(main())

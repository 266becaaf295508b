"""Sampling: from noise to images in n network calls, one by default; `python -m imf.sample` draws a grid.

By the definition of the average velocity u over [r, t], z_r = z_t - (t - r) u(z_t, t, r) exactly: the only
error is the network's. One call serves guided sampling too: omega and the interval are inputs of the network.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from imf.evaluation import vae as autoencoder
from imf.io import check_target, naming, replacing
from imf.model.config import IMFConfig
from imf.program import UserError, exit_status, interruptible
from imf.sampling import class_grid
from imf.training import checkpoint

MOST_ROWS = 20  # of a grid whose classes were not named


def main(argv: list[str] | None = None) -> int:
    """`python -m imf.sample`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m imf.sample", description="Draw a grid of samples.")
    add = parser.add_argument
    add(
        "--checkpoint", type=Path, required=True, help="a checkpoint, or the folder of a run (its newest one)"
    )
    add("--out", type=Path, default=Path("grid.png"), help="PNG to write (default: %(default)s)")
    add("--steps", type=int, default=1, help="network calls per sample (default: %(default)s)")
    add("--omega", type=float, help="guidance scale (default: the run's)")
    add(
        "--interval",
        type=float,
        nargs=2,
        metavar=("T_MIN", "T_MAX"),
        help="guidance interval (default: the run's)",
    )
    add(
        "--classes",
        type=int,
        nargs="+",
        help=f"labels of the rows (default: all of up to {MOST_ROWS} classes)",
    )
    add("--vae", type=Path, help="folder of the AutoencoderKL (sd-vae-ft-mse) that decodes latents")
    add("--columns", type=int, default=10, help="samples per class (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    add(
        "--weights", choices=("ema", "model"), default="ema", help="averaged or latest (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    if arguments.columns < 1:
        parser.error(f"--columns must be at least 1, got {arguments.columns}")
    if not 0 <= arguments.seed < 2**63:
        parser.error(f"--seed must be at least 0 and below 2 ** 63, got {arguments.seed}")
    try:
        with interruptible():
            print(_draw(arguments))
    except (UserError, ValueError, OSError) as error:
        print(f"imf.sample: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print("\nimf.sample: stopped", file=sys.stderr)
        return exit_status(stop)
    return 0


def _draw(arguments: argparse.Namespace) -> str:
    """Write the grid that was asked for; what was done, as text."""
    check_target(arguments.out)
    path = checkpoint.find(arguments.checkpoint)
    network, metadata = checkpoint.load_network(path, arguments.weights)
    omega, *interval = metadata.config.sampling
    omega = omega if arguments.omega is None else arguments.omega
    t_min, t_max = arguments.interval or interval
    channels, cpu = network.config.in_channels, torch.device("cpu")
    picture = class_grid(
        network,
        classes=_rows(arguments.classes, network.config),
        vae=autoencoder.of_network(arguments.vae, channels, cpu, metadata.autoencoder),
        columns=arguments.columns,
        steps=arguments.steps,
        omega=omega,
        t_min=t_min,
        t_max=t_max,
        seed=arguments.seed,
    )
    with naming(arguments.out), replacing(arguments.out) as temporary:
        picture.save(temporary, format="PNG")
    return (
        f"{arguments.out}: {arguments.columns} samples per class in {arguments.steps} step(s), "
        f"omega {omega:g}, interval [{t_min:g}, {t_max:g}], from {path} (step {metadata.step})"
    )


def _rows(classes: list[int] | None, config: IMFConfig) -> Sequence[int]:
    if classes is None and config.num_classes > MOST_ROWS:
        raise ValueError(
            f"--classes: the network knows {config.num_classes}, name those that should be drawn"
        )
    rows = range(config.num_classes) if classes is None else classes
    if min(rows) < 0 or max(rows) >= config.num_classes:
        raise ValueError(f"--classes must be within 0 and {config.num_classes - 1}, got {list(rows)}")
    return rows


if __name__ == "__main__":
    sys.exit(main())

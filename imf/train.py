"""Trains an Improved Mean Flow: `python -m imf.train`."""

from __future__ import annotations

import argparse
import sys

from imf import program
from imf.training.config import TrainConfig, add_arguments, with_arguments
from imf.training.recipes import PRESETS, preset_of
from imf.training.session import fit
from imf.training.setup import find_resumed, resumed_config


def main(argv: list[str] | None = None) -> int:
    """Runs the program; returns the exit status: 0, 1 error, 2 wrong argument, 130 or 143 stopped."""
    preset = preset_of(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m imf.train",
        description="Train an Improved Mean Flow; by default on scikit-learn's digits.",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="go on exactly, from a run's folder or its newest checkpoint (no PATH: the newest run)",
    )
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default=argparse.SUPPRESS,
        help="settings to start from, whose defaults are below (default: digits; small with other --data)",
    )
    add_arguments(parser, preset)
    arguments = parser.parse_args(argv)
    config = preset
    if arguments.resume is None:
        try:
            config = with_arguments(preset, arguments)
        except ValueError as error:
            parser.error(str(error))
    elif "preset" in arguments:
        parser.error("--preset is for new runs; a resumed one goes on with its own settings")
    elif getattr(arguments, "init_from", ""):
        parser.error("--init-from is for new runs; a resumed one goes on with its own weights")
    return program.run(
        "imf.train", lambda: _train(config, arguments), stopped="stopped before the first step"
    )


def _train(config: TrainConfig, arguments: argparse.Namespace) -> None:
    """Trains a new run of `config`, or the one that --resume names, with the arguments that were given."""
    path = None
    if arguments.resume is not None:
        path, metadata = find_resumed(arguments.resume, getattr(arguments, "runs", config.runs))
        config = resumed_config(metadata, arguments)
    fit(config, resume=path)


if __name__ == "__main__":
    sys.exit(main())

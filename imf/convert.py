"""Official checkpoints into this project's and back: `python -m imf.convert`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Literal

import torch

from imf.model.config import IMFConfig
from imf.model.pretrained import has_v_blocks
from imf.official.checkpoints import export_weights, import_weights
from imf.program import run
from imf.training.checkpoint import Metadata, environment, load, save_network
from imf.training.config import TrainConfig
from imf.training.recipes import PRESETS


def main(argv: list[str] | None = None) -> int:
    """Runs `python -m imf.convert`; returns the exit status."""
    text = "Official checkpoints into this project's, and this project's into the official ones."
    parser = argparse.ArgumentParser(prog="python -m imf.convert", description=text)
    add = parser.add_argument
    text = "official: .pth, .safetensors, JAX's folder or .zip; --to official: what imf.load reads"
    add("source", type=Path, help=text)
    add("out", type=Path, help="file to write: .safetensors; --to official also .pth")
    add("--to", choices=("ours", "official"), default="ours", help="names of OUT (default: %(default)s)")
    add("--weights", choices=("ema", "model"), help="averaged or latest (default: both; to official: ema)")
    add("--v-head", action="store_true", help="to official: keep the v-head's blocks")
    add("--input-size", type=int, default=32, help="height of the latents (default: %(default)s)")
    add("--num-heads", type=int, help="attention heads of an MF network that is no preset")
    a = parser.parse_args(argv)
    suffixes = (".safetensors", ".pth") if a.to == "official" else (".safetensors",)
    if a.out.suffix not in suffixes:
        parser.error(f"OUT must end in {' or '.join(suffixes)}, got {a.out}")
    if a.out.exists():
        parser.error(f"OUT exists already: {a.out}")
    return run("imf.convert", lambda: print(_export(a) if a.to == "official" else _import(a)))


def _import(a: argparse.Namespace) -> str:
    """Converts official weights into a file of ours; returns what was done, as text."""
    sizes = {"input_size": a.input_size, "num_heads": a.num_heads}
    network, states, step = import_weights(a.source, a.weights, **sizes)
    preset, config = _settings(network)
    save_network(a.out, states, Metadata(step, 0.0, config, "fp32", environment(torch.device("cpu"))))
    width, heads, patch = network.hidden_size, network.num_heads, network.patch_size
    unknown = f"no preset (depth {network.depth}, width {width}, {heads} heads, patch {patch})"
    count = sum(x.numel() for x in next(iter(states.values())).values())
    sampling = network.has_v_head and not all(map(has_v_blocks, states.values()))
    return (
        f"{a.out}: {preset or unknown}, {count:,} weights ({' and '.join(states)}), step {step}"
        f"{', for sampling: without the v-head' if sampling else ''}"
    )


def _settings(network: IMFConfig) -> tuple[str, TrainConfig]:
    """Finds the preset of a network and its settings; "" and plain ones, without guidance, if it has none."""
    method = "mf" if network.block == "plain" else "imf"
    plain = TrainConfig(method=method, network=network, omega=1.0, t_min=0.0, t_max=1.0)
    return next(((name, x) for name, x in PRESETS.items() if x.network == network), ("", plain))


def _export(a: argparse.Namespace) -> str:
    """Writes our weights into a file of official names; returns what was done, as text."""
    kind: Literal["ema", "model"] = a.weights or "ema"
    count = export_weights(a.source, a.out, load(a.source, kind), a.v_head)
    return f"{a.out}: {count} tensors ({kind}), {'with' if a.v_head else 'without'} the v-head's blocks"


if __name__ == "__main__":
    sys.exit(main())

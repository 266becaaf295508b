"""Official checkpoints into this project's and back: `python -m imf.convert`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from imf.io import naming, replacing
from imf.model.config import IMFConfig
from imf.official.formats import Official, read
from imf.official.names import (
    from_flax,
    from_official,
    mean_flow_from_flax,
    plain_names,
    shape_of,
    to_official,
    torch_names,
)
from imf.program import UserError, exit_status, interruptible
from imf.training.checkpoint import Metadata, empty_weights, environment, find, load_network, save_network
from imf.training.config import TrainConfig
from imf.training.recipes import PRESETS


def main(argv: list[str] | None = None) -> int:
    """`python -m imf.convert`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m imf.convert",
        description="Official checkpoints into this project's, and this project's into the official ones.",
    )
    add = parser.add_argument
    add(
        "source",
        type=Path,
        help="official: .pth, .safetensors, JAX's folder or .zip; --to official: a run or a checkpoint",
    )
    add("out", type=Path, help="file to write: .safetensors; --to official also .pth")
    add("--to", choices=("ours", "official"), default="ours", help="names of OUT (default: %(default)s)")
    add("--weights", choices=("ema", "model"), help="averaged or latest (default: both; to official: ema)")
    add("--v-head", action="store_true", help="to official: keep the v-head's blocks")
    add("--input-size", type=int, default=32, help="height of the latents (default: %(default)s)")
    add("--num-heads", type=int, help="attention heads of an MF network that is no preset")
    arguments = parser.parse_args(argv)
    suffixes = (".safetensors", ".pth") if arguments.to == "official" else (".safetensors",)
    if arguments.out.suffix not in suffixes:
        parser.error(f"OUT must end in {' or '.join(suffixes)}, got {arguments.out}")
    if arguments.out.exists():
        parser.error(f"OUT exists already: {arguments.out}")
    try:
        with interruptible():
            print(_export(arguments) if arguments.to == "official" else _import(arguments))
    except (UserError, KeyError, TypeError, ValueError, OSError) as error:
        print(f"imf.convert: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print("\nimf.convert: stopped", file=sys.stderr)
        return exit_status(stop)
    return 0


def _import(a: argparse.Namespace) -> str:
    """Official weights into a file of ours; what was done, as text."""
    official = read(a.source)
    if a.weights and a.weights not in official.sets:
        there = ", ".join(official.sets)
        raise UserError(f"--weights: there are {there} in {a.source}, got {a.weights}")
    states: dict[str, dict[str, Tensor]] = {}
    shapes: list[IMFConfig] = []
    for kind in [a.weights] if a.weights else official.sets:
        try:
            shape, states[kind] = _converted(official, kind, a)
        # KeyError: a weight is missing; others: of shapes or types that cannot be cut or joined
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            reason = error.args[0] if isinstance(error, KeyError) else error
            raise UserError(f"{a.source}: {reason}") from error
        shapes.append(shape)
    if len(set(shapes)) > 1:
        raise UserError(f"{a.source}: its sets of weights are of two networks: {shapes}")
    _check_whole(a.source, shapes[0], states)
    preset, config = _settings(shapes[0])
    metadata = Metadata(
        step=official.step,
        elapsed=0.0,
        config=config,
        precision="fp32",
        environment=environment(torch.device("cpu")),
    )
    save_network(a.out, states, metadata)
    sampling = config.network.has_v_head and not all(map(_with_v_blocks, states.values()))
    count = sum(x.numel() for x in next(iter(states.values())).values())
    return (
        f"{a.out}: {preset or _described(shapes[0])}, {count:,} weights ({' and '.join(states)}), "
        f"step {official.step}"
        f"{', for sampling: without the v-head' if sampling else ''}"
    )


def _converted(official: Official, kind: str, a: argparse.Namespace) -> tuple[IMFConfig, dict[str, Tensor]]:
    """The shape of a network, and a set of its weights by our names, fp32; raises what does not fit."""
    weights = official.sets[kind]
    named = torch_names(weights) if official.flax else plain_names(weights)
    values = {name: x for name, (_, x) in named.items()}
    shape = shape_of(values, input_size=a.input_size, num_heads=a.num_heads)
    function = from_flax if official.flax else from_official
    if shape.block == "plain":
        function = mean_flow_from_flax
    for name, x in values.items():  # before they are joined, which would turn integers into the others' type
        if not x.is_floating_point() or not x.isfinite().all():
            got = "NaN or infinity" if x.is_floating_point() else x.dtype
            raise ValueError(f"weights must be finite floating-point numbers, got {got} in {name}")
    # Copies: weights of a file may share memory, which safetensors does not write.
    return shape, {n: x.to(torch.float32, copy=True) for n, x in function(weights).items()}


def _described(network: IMFConfig) -> str:
    depth, width, heads = network.depth, network.hidden_size, network.num_heads
    return f"no preset (depth {depth}, width {width}, {heads} heads, patch {network.patch_size})"


def _settings(network: IMFConfig) -> tuple[str, TrainConfig]:
    """The preset of a network, and its settings; "" and plain ones, without guidance, where there is none."""
    for name, preset in PRESETS.items():
        if preset.network == network:
            return name, preset
    method = "mf" if network.block == "plain" else "imf"
    return "", TrainConfig(method=method, network=network, omega=1.0, t_min=0.0, t_max=1.0)


def _export(a: argparse.Namespace) -> str:
    """Weights of ours into a file of official names; what was done, as text."""
    kind: Literal["ema", "model"] = a.weights or "ema"
    network, _ = load_network(find(a.source), kind)
    if network.config.block == "plain":
        raise UserError(
            f"{a.source}: the official PyTorch program has iMF's own networks alone, got {network.config}"
        )
    state = network.state_dict()
    if a.v_head and not _with_v_blocks(state):
        raise UserError(f"--v-head: there is none in {a.source}, whose weights are for sampling")
    if not a.v_head:
        state = {name: x for name, x in state.items() if not name.startswith("v_blocks.")}
    official = to_official(state, network.config)
    with naming(a.out), replacing(a.out) as temporary:
        if a.out.suffix == ".pth":
            torch.save(official, temporary)
        else:
            save_file(official, temporary)
    v_head = "with" if a.v_head else "without"
    return f"{a.out}: {len(official)} tensors ({kind}), {v_head} the v-head's blocks"


def _with_v_blocks(state: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("v_blocks.") for name in state)


def _check_whole(source: Path, config: IMFConfig, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """UserError unless each set has all weights of the network, the v-head's blocks aside."""
    expected = {name: list(x.shape) for name, x in empty_weights(config).items()}
    for kind, state in states.items():
        whole = _with_v_blocks(state)
        wanted = {n: s for n, s in expected.items() if whole or not n.startswith("v_blocks.")}
        got = {name: list(x.shape) for name, x in state.items()}
        different = [n for n in (*wanted, *(got.keys() - wanted.keys())) if wanted.get(n) != got.get(n)]
        if different:
            lines = [f"{n}: wanted {wanted.get(n, 'none')}, got {got.get(n, 'none')}" for n in different[:5]]
            raise UserError("\n  ".join([f"{source}: the {kind} weights are not whole:", *lines]))


if __name__ == "__main__":
    sys.exit(main())

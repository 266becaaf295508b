"""Conversion of official weights into state dicts of this project's networks, and back into files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from imf.io import naming, replacing
from imf.model.config import IMFConfig
from imf.official import names
from imf.official.formats import read
from imf.program import UserError


def import_weights(
    source: Path,
    kind: str | None,
    empty_weights: Callable[[IMFConfig], Mapping[str, Tensor]],
    *,
    input_size: int,
    num_heads: int | None,
) -> tuple[IMFConfig, dict[str, dict[str, Tensor]], int]:
    """Read an official checkpoint: configuration of the network, fp32 state dicts by kind, training step.

    kind: "ema" or "model", default both.  empty_weights: `imf.training.checkpoint.empty_weights`.
    input_size, num_heads: as `imf.official.names.shape_of` takes them.
    Raises: UserError, naming the source, for weights that are not there, not finite or not a network's.
    """
    official = read(source)
    if kind and kind not in official.sets:
        raise UserError(f"--weights: there are {', '.join(official.sets)} in {source}, got {kind}")
    configs, states = [], {}
    for name in [kind] if kind else official.sets:
        weights = official.sets[name]
        try:
            named = names.torch_names(weights) if official.flax else names.plain_names(weights)
            plain = {n: x for n, (_, x) in named.items()}
            configs.append(names.shape_of(plain, input_size=input_size, num_heads=num_heads))
            expected = empty_weights(configs[-1])
            converted = names.convert(named, "from_flax" if official.flax else "from_official")
        except (TypeError, ValueError, IndexError, RuntimeError) as error:  # of shapes that do not fit
            raise UserError(f"{source}: {error}") from error
        _check_complete(source, name, converted, expected)
        # Copies: weights of a file may share memory, which safetensors does not write.
        states[name] = {n: x.to(torch.float32, copy=True) for n, x in converted.items()}
    if len(set(configs)) > 1:
        raise UserError(f"{source}: its sets of weights are of two networks: {configs}")
    return configs[0], states, official.step


def _check_complete(
    source: Path, kind: str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    names = [name for name in expected if has_v_blocks(state) or not name.startswith("v_blocks.")]
    wanted = {name: list(expected[name].shape) for name in names}
    got = {name: list(x.shape) for name, x in state.items()}
    different = [name for name in wanted | got if wanted.get(name) != got.get(name)]
    if different:
        lines = [f"{n}: wanted {wanted.get(n, 'none')}, got {got.get(n, 'none')}" for n in different[:5]]
        raise UserError("\n  ".join([f"{source}: the {kind} weights are not whole:", *lines]))


def export_weights(source: Path, out: Path, network: nn.Module, config: IMFConfig, v_head: bool) -> int:
    """Write a network's weights by their official names into a .pth or .safetensors; returns their number.

    v_head: keep its blocks.
    Raises: UserError for another network than iMF's, or one without v-head; OSError if it cannot be written.
    """
    if config.block == "plain":
        raise UserError(f"{source}: the official PyTorch program has iMF's own networks alone, got {config}")
    state = network.state_dict()
    if v_head and not has_v_blocks(state):
        raise UserError(f"--v-head: there is none in {source}, whose weights are for sampling")
    kept = {name: x for name, x in state.items() if v_head or not name.startswith("v_blocks.")}
    official = names.to_official(kept, config)
    with naming(out), replacing(out) as temporary:
        (torch.save if out.suffix == ".pth" else save_file)(official, temporary)
    return len(official)


def has_v_blocks(state: Mapping[str, Tensor]) -> bool:
    """Return whether weights include the v-head's blocks, which those for sampling lack."""
    return any(name.startswith("v_blocks.") for name in state)

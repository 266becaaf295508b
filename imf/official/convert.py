"""Conversion of official weights into state dicts of this project's networks, and back into files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from imf.io import naming, replacing
from imf.model.config import IMFConfig
from imf.official import names
from imf.official.formats import Official
from imf.program import UserError

States = dict[str, dict[str, Tensor]]  # state dicts of a network, by kind: "ema" and "model"


def states_of(
    source: Path, official: Official, kind: str | None, *, input_size: int, num_heads: int | None
) -> tuple[IMFConfig, States]:
    """Convert the weights that were read from `source`: configuration of the network, fp32 state dicts.

    kind: of the weights, default all.  input_size, num_heads: as `imf.official.names.shape_of` takes them.
    Raises: UserError, naming the source, for weights that are not there or not finite, or do not fit.
    """
    if kind and kind not in official.sets:
        raise UserError(f"--weights: there are {', '.join(official.sets)} in {source}, got {kind}")
    configs, states = [], {}
    try:
        for name in [kind] if kind else official.sets:
            weights = official.sets[name]
            named = names.torch_names(weights) if official.flax else names.plain_names(weights)
            values = {n: x for n, (_, x) in named.items()}
            configs.append(names.shape_of(values, input_size=input_size, num_heads=num_heads))
            for n, x in values.items():  # before they are joined, which turns integers into the others' type
                if not x.is_floating_point() or not x.isfinite().all():
                    got = "NaN or infinity" if x.is_floating_point() else x.dtype
                    raise UserError(f"weights must be finite floating-point numbers, got {got} in {n}")
            table = names.MF if configs[-1].block == "plain" else names.IMF
            converted = names.convert(named, table, "from_flax" if official.flax else "from_official")
            # Copies: weights of a file may share memory, which safetensors does not write.
            states[name] = {n: x.to(torch.float32, copy=True) for n, x in converted.items()}
    except (
        TypeError,
        ValueError,
        IndexError,
        RuntimeError,
    ) as error:  # of shapes that cannot be cut or joined
        raise UserError(f"{source}: {error}") from error
    if len(set(configs)) > 1:
        raise UserError(f"{source}: its sets of weights are of two networks: {configs}")
    return configs[0], states


def check_complete(source: Path, states: States, weights: Mapping[str, Tensor]) -> None:
    """Raise UserError unless each state dict has all `weights` of its network, the v-head's blocks aside."""
    for kind, state in states.items():
        names = [name for name in weights if has_v_blocks(state) or not name.startswith("v_blocks.")]
        wanted = {name: list(weights[name].shape) for name in names}
        got = {name: list(x.shape) for name, x in state.items()}
        different = [n for n in {**wanted, **got} if wanted.get(n) != got.get(n)]
        if different:
            lines = [f"{n}: wanted {wanted.get(n, 'none')}, got {got.get(n, 'none')}" for n in different[:5]]
            raise UserError("\n  ".join([f"{source}: the {kind} weights are not whole:", *lines]))


def write_official(source: Path, out: Path, network: nn.Module, config: IMFConfig, v_head: bool) -> int:
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
        if out.suffix == ".pth":
            torch.save(official, temporary)
        else:
            save_file(official, temporary)
    return len(official)


def has_v_blocks(state: Mapping[str, Tensor]) -> bool:
    """Return whether weights include the v-head's blocks, which those for sampling lack."""
    return any(name.startswith("v_blocks.") for name in state)

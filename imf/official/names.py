"""Weights of the official programs, by name, into this project's networks and back; nothing is rounded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imf.model.config import ORIGINAL, PRESETS, IMFConfig
from imf.program import UserError


def _parts(layers: dict[str, str]) -> dict[str, str]:
    """Names the weight and the bias of each layer."""
    return {
        f"{name}.{part}": f"{ours}.{part}" for name, ours in layers.items() for part in ("weight", "bias")
    }


def _embedders(names: dict[str, str]) -> dict[str, str]:
    """Names the two layers of each embedder."""
    ends = (("mlp.0", "first"), ("mlp.2", "last"))
    return {f"{name}.{layer}": f"{ours}.{end}" for name, ours in names.items() for layer, end in ends}


# Lists of blocks: official → ours. iMF has the first three, MF the last.
_GROUPS = {
    "shared_blocks": "shared_blocks",
    "u_heads": "u_blocks",
    "v_heads": "v_blocks",
    "blocks": "shared_blocks",
}
# Weights of a block: ours ← official ones, one below the other.
_IMF_BLOCK = {
    "attn_scale": ["attn_scale"],
    "mlp_scale": ["mlp_scale"],
    "norm1": ["norm1.weight"],
    "norm2": ["norm2.weight"],
    "q_norm": ["attn.q_norm.weight"],
    "k_norm": ["attn.k_norm.weight"],
    "out": ["attn.out_proj.weight"],
    "down": ["mlp.w2.weight"],
    "qkv": ["attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight"],
    "gate_up": ["mlp.w1.weight", "mlp.w3.weight"],
}
_MF_LAYERS = {
    "attn.qkv": "qkv",
    "attn.proj": "out",
    "mlp.fc1": "up",
    "mlp.fc2": "down",
    "adaLN_modulation.1": "modulation.linear",
}
_MF_BLOCK = {ours: [name] for name, ours in _parts(_MF_LAYERS).items()}
# Weights outside of blocks: official → ours.
_BOTH = {
    **_parts({"x_embedder.proj": "x_embedder"}),
    "y_embedder.embedding_table.weight": "y_embedder.weight",
}
_IMF_EMBEDDERS = {
    "cfg_t_start_embedder": "t_min_embedder",
    "cfg_t_end_embedder": "t_max_embedder",
    "omega_embedder": "omega_embedder",
    "h_embedder": "h_embedder",
}
_IMF_OUTSIDE = {
    **_BOTH,
    **_parts(_embedders(_IMF_EMBEDDERS)),
    **_parts({f"{head}_final_layer.linear": f"{head}_final.linear" for head in "uv"}),
    **{f"{head}_final_layer.norm.weight": f"{head}_final.norm" for head in "uv"},
    **{f"{name}_tokens": f"{name}_tokens" for name in ("class", "omega", "t_min", "t_max", "time")},
}
_MF_OUTSIDE = {
    **_BOTH,
    **_parts(_embedders({"t_embedder": "embedders.t", "h_embedder": "embedders.h"})),
    **_parts({"final_layer.linear": "u_final.linear"}),
    **_parts({"final_layer.adaLN_modulation.1": "u_final.modulation.linear"}),
}


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames official PyTorch weights, and join q, k, v and w1, w3 into one weight each.

    state: by official names ("shared_blocks.0.attn.q_proj._flax_linear.weight" …), with or without a leading
        "net"; those of the v-head's blocks may be missing.
    Returns: a state dict for `imf.model.imf.IMF`, or for `imf.mean_flow.network.DiT` from weights of MF.
    Raises: UserError for a value that is not a tensor, a name that the official network does not have, a
        block without one of its weights, parts of different shapes, or no weights at all.
    """
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise UserError(f"from_official: {name!r} must be a tensor, got a {type(value).__name__}")
    return _convert(state, "from_official")


def from_flax(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """Renames official JAX weights or gradients, keeping their dtype; the rest as `from_official`.

    arrays: as Flax gives them, nested, or flat with the parts of a path joined by "/", with or without a
        leading "params" and "net" ("net/shared_blocks_0/attn/q_proj/_flax_linear/kernel" …).
    """
    return _convert(to_tensors(arrays), "from_flax")


def plain_name(name: str) -> str:
    """Returns the official torch name, without root and Flax layers, of an official name or path of Flax."""
    for pattern, replacement in (
        (r"/", "."),
        (r"^(params\.)?(net\.)?", ""),
        (r"\._flax_(linear|embedding)", ""),
        (r"\.(kernel|embedding)$", ".weight"),
        (r"(shared_blocks|u_heads|v_heads)_(\d+)|\.layers_(\d+)", r"\1.\2\3"),
    ):
        name = re.sub(pattern, replacement, name)
    return name


def _convert(weights: Mapping[str, Tensor], caller: str) -> dict[str, Tensor]:
    if not weights:
        raise UserError(f"{caller}: wanted the weights of an official iMF or MF network, got none")
    names = {given: plain_name(given) for given in weights}
    network, table, outside = "iMF", _IMF_BLOCK, _IMF_OUTSIDE
    if any(name.startswith("blocks.") for name in names.values()):
        network, table, outside = "MF", _MF_BLOCK, _MF_OUTSIDE
    result: dict[str, Tensor] = {}
    blocks: dict[str, dict[str, Tensor]] = {}
    parts = [part for joined in table.values() for part in joined]
    for given, value in weights.items():
        name = names[given]
        match = re.fullmatch(rf"((?:{'|'.join(_GROUPS)})\.\d+)\.(.+)", name)
        if match and match[2] in parts:
            blocks.setdefault(match[1], {})[match[2]] = value
        elif name in outside:
            result[outside[name]] = value.flatten(1) if name == "x_embedder.proj.weight" else value
        else:
            raise UserError(f"{caller}: {given!r} is no weight of the official {network} network")
    for block, values in blocks.items():
        if missing := [part for part in parts if part not in values]:
            raise UserError(f"{caller}: {block} lacks {', '.join(missing)}")
        group, index = block.split(".")
        for ours, joined in table.items():
            rows = [values[part] for part in joined]
            if any(x.shape != rows[0].shape for x in rows):
                got = ", ".join(str(list(x.shape)) for x in rows)
                raise UserError(f"{caller}: {', '.join(joined)} of {block} must have one shape, got {got}")
            result[f"{_GROUPS[group]}.{index}.{ours}"] = torch.cat(rows) if len(rows) > 1 else rows[0]
    return result


def to_official(state: Mapping[str, Tensor], config: IMFConfig) -> dict[str, Tensor]:
    """Renames weights of `imf.model.imf.IMF` to the official PyTorch program's names: undoes `from_official`.

    state: with the v-head's blocks or, as for sampling, without.  config: of that network.
    Returns: copies, by the names that the official program's own files have, which begin with "net".
    Raises: UserError for a name that the network does not have.
    """
    outside = {ours: name for name, ours in _IMF_OUTSIDE.items()}
    groups = {ours: group for group, ours in _GROUPS.items() if group != "blocks"}
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        group, index, part = (*name.split(".", 2), "", "")[:3]
        if group in groups and part in _IMF_BLOCK:
            names = [f"{groups[group]}.{index}.{official}" for official in _IMF_BLOCK[part]]
            result |= zip(names, value.chunk(len(names)), strict=True)
        elif name in outside:
            kernel = (config.in_channels, config.patch_size, config.patch_size)
            result[outside[name]] = value.unflatten(1, kernel) if name == "x_embedder.weight" else value
        else:
            raise UserError(f"to_official: {name!r} is no weight of an iMF network")
    linear = re.compile(r"(_proj|\.mlp\.\w+|\.linear)(?=\.(weight|bias)$)")
    full = {linear.sub(r"\1._flax_linear", name): x for name, x in result.items()}
    return {f"net.{n.replace('_table.', '_table._flax_embedding.')}": x.clone() for n, x in full.items()}


def to_tensors(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """Converts arrays, see `from_flax`, to tensors by path, those of layers as PyTorch's have them."""
    weights = {}
    for path, array in _flat(arrays):
        x = _tensor(path, array)
        if path.endswith("/kernel") and x.dim() in (2, 4):  # (row, column, in, out) → (out, in, row, column)
            x = x.t() if x.dim() == 2 else x.permute(3, 2, 0, 1)
        weights[path] = x.contiguous()
    return weights


def shape_of(
    weights: Mapping[str, Tensor], *, input_size: int = 32, num_heads: int | None = None
) -> IMFConfig:
    """Finds the configuration of the network that official weights of iMF or MF are of.

    weights: tensors by official names.  input_size: of the latents: weights do not tell.  num_heads: of an MF
        network whose width is no preset's: its weights do not tell.
    Raises: UserError for weights that are of neither network, or lack what tells the shape.
    """
    weights = {plain_name(name): x for name, x in weights.items()}
    mean_flow = any(name.startswith("blocks.") for name in weights)
    try:
        width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
        num_classes = len(weights["y_embedder.embedding_table.weight"]) - 1
        first = weights["blocks.0.mlp.fc1.weight" if mean_flow else "u_heads.0.mlp.w1.weight"]
        head_width = 0 if mean_flow else len(weights["u_heads.0.attn.q_norm.weight"])
    except (KeyError, ValueError) as error:
        raise UserError(f"shape_of: no weights of an official iMF or MF network: {error}") from error
    known = {preset.hidden_size: preset.num_heads for preset in PRESETS.values()}
    heads = width // head_width if head_width else num_heads or known.get(width)
    option = "shape_of: num_heads (--num-heads)"
    if heads is None:
        raise UserError(f"{option} of an MF network of width {width} is not known")
    if num_heads not in (None, heads):
        raise UserError(f"{option} must be {heads}, as the weights say, got {num_heads}")
    blocks = Counter(block[0] for block in {tuple(name.split(".")[:2]) for name in weights})
    # 8 / 3 where it gives this width: as the presets have it, though 1 / 3 is no number of fp64.
    ratio = 8 / 3 if int(width * 8 / 3) == len(first) else len(first) / width
    return IMFConfig(
        input_size=input_size,
        patch_size=patch,
        in_channels=channels,
        hidden_size=width,
        depth=blocks["blocks"] + blocks["shared_blocks"] + blocks["u_heads"],
        num_heads=heads,
        num_classes=num_classes,
        **(ORIGINAL if mean_flow else {"aux_head_depth": blocks["u_heads"], "mlp_ratio": ratio}),
    )


def _flat(tree: Mapping[str, Any], root: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{root}{name}/")
        else:
            yield f"{root}{name}", value


def _tensor(path: str, array: Any) -> Tensor:
    """Copies an array into a tensor, also from JAX's bfloat16, which PyTorch does not take from NumPy."""
    if isinstance(array, Tensor):
        return array
    values = np.array(array)
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    if values.dtype.kind != "f":
        got = f"a {type(array).__name__} of {values.dtype}"
        raise UserError(f"from_flax: {path!r} must be an array of floating-point numbers, got {got}")
    return torch.from_numpy(values)

"""Weights of the official programs, by name, into this network's and back.

The official JAX program (Flax names) and its PyTorch port (`iMF-…-2.pth`) keep q, k, v and w1, w3 apart; this
network holds them as one weight each. Values are copied, nothing is rounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imf.model.config import ORIGINAL, PRESETS, IMFConfig

# Official torch name (without "._flax_linear" and "._flax_embedding") → ours, of a block.
_BLOCK = {
    "attn_scale": "attn_scale",
    "mlp_scale": "mlp_scale",
    "norm1.weight": "norm1",
    "norm2.weight": "norm2",
    "attn.q_norm.weight": "q_norm",
    "attn.k_norm.weight": "k_norm",
    "attn.out_proj.weight": "out",
    "mlp.w2.weight": "down",
}
# Where blocks are counted that a velocity passes through.
_DEPTHS = ("blocks", "shared_blocks", "u_heads")
# Ours ← official weights, one below the other.
_FUSED = {
    "qkv": ("attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight"),
    "gate_up": ("mlp.w1.weight", "mlp.w3.weight"),
}
_BLOCK_PARTS = (*_BLOCK, *(name for names in _FUSED.values() for name in names))
_GROUPS = {"shared_blocks": "shared_blocks", "u_heads": "u_blocks", "v_heads": "v_blocks"}
_LAYERS = {
    "x_embedder.proj": "x_embedder",
    "cfg_t_start_embedder.mlp.0": "t_min_embedder.first",
    "cfg_t_start_embedder.mlp.2": "t_min_embedder.last",
    "cfg_t_end_embedder.mlp.0": "t_max_embedder.first",
    "cfg_t_end_embedder.mlp.2": "t_max_embedder.last",
    "omega_embedder.mlp.0": "omega_embedder.first",
    "omega_embedder.mlp.2": "omega_embedder.last",
    "h_embedder.mlp.0": "h_embedder.first",
    "h_embedder.mlp.2": "h_embedder.last",
    "u_final_layer.linear": "u_final.linear",
    "v_final_layer.linear": "v_final.linear",
}
_OUTSIDE = {
    **{f"{name}.{part}": f"{ours}.{part}" for name, ours in _LAYERS.items() for part in ("weight", "bias")},
    **{
        name: name for name in ("class_tokens", "omega_tokens", "t_min_tokens", "t_max_tokens", "time_tokens")
    },
    "y_embedder.embedding_table.weight": "y_embedder.weight",
    "u_final_layer.norm.weight": "u_final.norm",
    "v_final_layer.norm.weight": "v_final.norm",
}


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official PyTorch weights under this network's names.

    Args:
        state: a state dict with the official names ("shared_blocks.0.attn.q_proj._flax_linear.weight" …),
            with or without a leading "net", of the sampling or of the training network.

    Returns:
        A state dict for `imf.model.imf.IMF`; what `state` lacks (the v-head's blocks in the weights for
        sampling) is lacking in it.

    Raises:
        KeyError: a name that the official network does not have, or a block without one of its weights.
        TypeError: a value that is no tensor.
        ValueError: no weights at all, or parts of q, k, v or w1, w3 of different shapes.
    """
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"from_official: {name!r} must be a tensor, got a {type(value).__name__}")
    return _convert("from_official", plain_names(state))


def to_official(state: Mapping[str, Tensor], config: IMFConfig) -> dict[str, Tensor]:
    """This network's weights under the official PyTorch program's names: the inverse of `from_official`.

    Args:
        state: a state dict of `imf.model.imf.IMF`, with the v-head's blocks or, as for sampling, without.
        config: of that network.

    Returns:
        Copies, by the names that the official program's own files have, which begin with "net".

    Raises:
        KeyError: a name that the network does not have.
    """
    outside = {ours: name for name, ours in _OUTSIDE.items()}
    groups = {ours: group for group, ours in _GROUPS.items()}
    parts = {ours: (part,) for part, ours in _BLOCK.items()} | _FUSED
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        match = re.fullmatch(r"(\w+)\.(\d+)\.(\w+)", name)
        if match and match[1] in groups and match[3] in parts:
            names = parts[match[3]]
            pieces = value.chunk(len(names))
            result |= {f"{groups[match[1]]}.{match[2]}.{n}": x for n, x in zip(names, pieces, strict=True)}
        elif name in outside:
            p = config.patch_size
            kernel = name == "x_embedder.weight"
            result[outside[name]] = value.unflatten(1, (config.in_channels, p, p)) if kernel else value
        else:
            raise KeyError(f"to_official: {name!r} is no weight of an iMF network")
    layers = re.compile(r"(_proj|\.mlp\.\w+|\.linear)(?=\.(weight|bias)$)")
    return {
        "net."
        + layers.sub(r"\1._flax_linear", name).replace("_table.", "_table._flax_embedding."): value.clone()
        for name, value in result.items()
    }


def plain_names(state: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """Official torch name, without the Flax layers -> the name as it was given, and the value."""
    plain = {n: n.removeprefix("net.") for n in state}
    plain = {n: x.replace("._flax_linear", "").replace("._flax_embedding", "") for n, x in plain.items()}
    return {name: (given, state[given]) for given, name in plain.items()}


def _convert(caller: str, weights: dict[str, tuple[str, Tensor]]) -> dict[str, Tensor]:
    """weights: official torch name, without the Flax layers -> the name as it was given, and the value."""
    if not weights:
        raise ValueError(f"{caller}: wanted the weights of an official iMF network, got none")
    result: dict[str, Tensor] = {}
    blocks: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, (given, value) in weights.items():
        match = re.fullmatch(r"(shared_blocks|u_heads|v_heads)\.(\d+)\.(.+)", name)
        if match and match[3] in _BLOCK_PARTS:
            blocks.setdefault((match[1], match[2]), {})[match[3]] = value
        elif name in _OUTSIDE:
            result[_OUTSIDE[name]] = value.flatten(1) if name == "x_embedder.proj.weight" else value
        else:
            raise KeyError(f"{caller}: {given!r} is no weight of the official iMF network")
    for (group, index), parts in blocks.items():
        missing = [part for part in _BLOCK_PARTS if part not in parts]
        if missing:
            raise KeyError(f"{caller}: {group}.{index} lacks {', '.join(missing)}")
        block = f"{_GROUPS[group]}.{index}"
        result |= {f"{block}.{ours}": parts[part] for part, ours in _BLOCK.items()}
        for ours, names in _FUSED.items():
            shapes = [list(parts[part].shape) for part in names]
            if shapes != shapes[:1] * len(shapes):
                raise ValueError(
                    f"{caller}: {', '.join(names)} of {group}.{index} must have one shape, "
                    f"got {', '.join(map(str, shapes))}"
                )
            result[f"{block}.{ours}"] = torch.cat([parts[part] for part in names])
    return result


def from_flax(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """The official JAX weights under this network's names.

    Args:
        arrays: the tree of arrays as Flax gives it, nested, or flat with the parts of a path joined by "/";
            with or without a leading "params" and "net"
            ("net/shared_blocks_0/attn/q_proj/_flax_linear/kernel" …). Gradients map likewise.

    Returns:
        A state dict for `imf.model.imf.IMF`, in the arrays' dtype.

    Raises:
        KeyError, ValueError: as `from_official`.
        TypeError: a value that is no array of a floating-point type that PyTorch has.
    """
    return _convert("from_flax", torch_names(arrays))


def torch_names(arrays: Mapping[str, Any]) -> dict[str, tuple[str, Tensor]]:
    """Official torch name, without the Flax layers -> the path as it was given, and PyTorch's value."""
    weights = {}
    for path, array in _flat(arrays):
        name = path.removeprefix("params/").removeprefix("net/")
        value = _tensor(path, array)
        if name.endswith("/kernel") and value.dim() == 2:
            value = value.t()
        elif name.endswith("/kernel") and value.dim() == 4:  # (row, column, in, out) → (out, in, row, column)
            value = value.permute(3, 2, 0, 1)
        name = re.sub(r"/_flax_(linear|embedding)(?=/)", "", name)
        name = re.sub(r"/(kernel|embedding)$", "/weight", name)
        name = re.sub(r"(shared_blocks|u_heads|v_heads|layers)_(\d+)", r"\1/\2", name).replace(
            "/layers/", "/"
        )
        weights[name.replace("/", ".")] = (path, value.contiguous())
    return weights


# The official program of Mean Flows → `imf.mean_flow.network.DiT`: modules, each with a weight and a bias.
_MF_BLOCK = {
    "attn.qkv": "qkv",
    "attn.proj": "out",
    "mlp.fc1": "up",
    "mlp.fc2": "down",
    "adaLN_modulation.1": "modulation.linear",
}
_MF_OUTSIDE = {
    "x_embedder.proj": "x_embedder",
    "t_embedder.mlp.0": "embedders.t.first",
    "t_embedder.mlp.2": "embedders.t.last",
    "h_embedder.mlp.0": "embedders.h.first",
    "h_embedder.mlp.2": "embedders.h.last",
    "y_embedder.embedding_table": "y_embedder",
    "final_layer.linear": "u_final.linear",
    "final_layer.adaLN_modulation.1": "u_final.modulation.linear",
}


def mean_flow_from_flax(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of the official JAX program of Mean Flows under the names of `imf.mean_flow.network.DiT`.

    Args:
        arrays: as of `from_flax` ("net/blocks/layers_0/attn/qkv/_flax_linear/kernel" …). Gradients map
            likewise.

    Returns:
        A state dict for the network of an MF preset, in the arrays' dtype.

    Raises:
        KeyError: a name that the official network does not have.
        TypeError, ValueError: as `from_flax`.
    """
    result = {}
    for name, (path, value) in torch_names(arrays).items():
        module, _, part = name.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
        ours = _MF_BLOCK.get(block[2]) if block else _MF_OUTSIDE.get(module)
        if ours is None or part not in ("weight", "bias"):
            raise KeyError(f"mean_flow_from_flax: {path!r} is no weight of the official MF network")
        ours = f"shared_blocks.{block[1]}.{ours}" if block else ours
        result[f"{ours}.{part}"] = value.flatten(1) if name == "x_embedder.proj.weight" else value
    if not result:
        raise ValueError("mean_flow_from_flax: wanted the weights of an official MF network, got none")
    return result


def shape_of(
    weights: Mapping[str, Tensor], *, input_size: int = 32, num_heads: int | None = None
) -> IMFConfig:
    """The shape of the network that official weights are of.

    Args:
        weights: by official torch name, without the Flax layers, of iMF or of MF.
        input_size: of the latents: weights do not tell.
        num_heads: of an MF network whose width is no preset's: its weights do not tell.

    Raises:
        ValueError: weights that are of neither network, or lack what tells the shape.
    """
    mean_flow = any(name.startswith("blocks.") for name in weights)
    try:
        width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
        num_classes = len(weights["y_embedder.embedding_table.weight"]) - 1
        first = weights["blocks.0.mlp.fc1.weight" if mean_flow else "u_heads.0.mlp.w1.weight"]
        head_width = 0 if mean_flow else len(weights["u_heads.0.attn.q_norm.weight"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"shape_of: no weights of an official iMF or MF network: {error}") from error
    known = {preset.hidden_size: preset.num_heads for preset in PRESETS.values()}
    heads = width // head_width if head_width else num_heads or known.get(width)
    if heads is None:
        raise ValueError(f"shape_of: num_heads (--num-heads) of an MF network of width {width} is not known")
    if num_heads not in (None, heads):
        raise ValueError(
            f"shape_of: num_heads (--num-heads) must be {heads}, as the weights say, got {num_heads}"
        )
    depth = {group: len({n.split(".")[1] for n in weights if n.startswith(f"{group}.")}) for group in _DEPTHS}
    # 8 / 3 where it gives this width: as the presets have it, though 1 / 3 is no number of fp64.
    ratio = 8 / 3 if int(width * 8 / 3) == len(first) else len(first) / width
    return IMFConfig(
        input_size=input_size,
        patch_size=patch,
        in_channels=channels,
        hidden_size=width,
        depth=depth["blocks"] + depth["shared_blocks"] + depth["u_heads"],
        num_heads=heads,
        num_classes=num_classes,
        **(ORIGINAL if mean_flow else {"aux_head_depth": depth["u_heads"], "mlp_ratio": ratio}),
    )


def _flat(tree: Mapping[str, Any], root: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{root}{name}/")
        else:
            yield f"{root}{name}", value


def _tensor(path: str, array: Any) -> Tensor:
    """A copy of an array, also in JAX's bfloat16, which PyTorch does not take from NumPy."""
    values = np.array(array)
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    if values.dtype.kind != "f":
        raise TypeError(
            f"from_flax: {path!r} must be an array of floating-point numbers, "
            f"got a {type(array).__name__} of {values.dtype}"
        )
    return torch.from_numpy(values)

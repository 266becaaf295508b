"""Weights of the two official programs, by name, into this network's.

The official JAX program (Flax names) and its PyTorch port (`iMF-…-2.pth`) keep q, k, v and w1, w3 apart; this
network holds them as one weight each. Values are copied, nothing is rounded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Official torch name (without "._flax_linear" and "._flax_embedding") → ours. {b} is a block.
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
# Ours ← official weights, one below the other.
_FUSED = {
    "qkv": ("attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight"),
    "gate_up": ("mlp.w1.weight", "mlp.w3.weight"),
}
_GROUPS = {"shared_blocks": "shared_blocks", "u_heads": "u_blocks", "v_heads": "v_blocks"}
_PREFIXES = {
    "x_embedder.proj.": "x_embedder.",
    "y_embedder.embedding_table.": "y_embedder.",
    "cfg_t_start_embedder.mlp.0.": "t_min_embedder.first.",
    "cfg_t_start_embedder.mlp.2.": "t_min_embedder.last.",
    "cfg_t_end_embedder.mlp.0.": "t_max_embedder.first.",
    "cfg_t_end_embedder.mlp.2.": "t_max_embedder.last.",
    "omega_embedder.mlp.0.": "omega_embedder.first.",
    "omega_embedder.mlp.2.": "omega_embedder.last.",
    "h_embedder.mlp.0.": "h_embedder.first.",
    "h_embedder.mlp.2.": "h_embedder.last.",
    "u_final_layer.linear.": "u_final.linear.",
    "v_final_layer.linear.": "v_final.linear.",
}
_EXACT = {
    **{
        name: name for name in ("class_tokens", "omega_tokens", "t_min_tokens", "t_max_tokens", "time_tokens")
    },
    "u_final_layer.norm.weight": "u_final.norm",
    "v_final_layer.norm.weight": "v_final.norm",
}


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official PyTorch weights under this network's names.

    Args:
        state: a state dict with the official names ("shared_blocks.0.attn.q_proj._flax_linear.weight" …),
            of the sampling or of the training network.

    Returns:
        A state dict for `imf.model.IMF`; what `state` lacks (the v-head's blocks in the weights for
        sampling) is lacking in it.

    Raises:
        KeyError: a name that the official network does not have, or a part of q, k, v or w1, w3 missing.
    """
    plain = {
        name.replace("._flax_linear", "").replace("._flax_embedding", ""): x for name, x in state.items()
    }
    result: dict[str, Tensor] = {}
    blocks: dict[str, dict[str, Tensor]] = {}
    for name, value in plain.items():
        if match := re.fullmatch(r"(shared_blocks|u_heads|v_heads)\.(\d+)\.(.+)", name):
            group, index, part = match.groups()
            blocks.setdefault(f"{_GROUPS[group]}.{index}", {})[part] = value
        else:
            result[_outer_name(name)] = value.flatten(1) if name == "x_embedder.proj.weight" else value
    for block, parts in blocks.items():
        result.update({f"{block}.{name}": value for name, value in _block(block, parts).items()})
    return result


def _outer_name(name: str) -> str:
    if name in _EXACT:
        return _EXACT[name]
    for prefix, ours in _PREFIXES.items():
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    raise KeyError(f"from_official: {name!r} is no weight of the official iMF network")


def _block(block: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    result = {}
    for ours, names in _FUSED.items():
        missing = [name for name in names if name not in parts]
        if missing:
            raise KeyError(f"from_official: {block} lacks {', '.join(missing)}")
        result[ours] = torch.cat([parts[name] for name in names])
    for name, value in parts.items():
        if name in _BLOCK:
            result[_BLOCK[name]] = value
        elif not any(name in names for names in _FUSED.values()):
            raise KeyError(f"from_official: {name!r} is no weight of a block of the official iMF network")
    return result


def from_flax(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """The official JAX weights under this network's names.

    Args:
        arrays: Flax path → array, the path's parts joined by "/", with or without a leading "params/" and
            "net/" ("net/shared_blocks_0/attn/q_proj/_flax_linear/kernel" …). Gradients map likewise.

    Returns:
        A state dict for `imf.model.IMF`, in the arrays' dtype.

    Raises:
        KeyError: as `from_official`.
    """
    state = {}
    for path, array in arrays.items():
        name = path.removeprefix("params/").removeprefix("net/")
        value = torch.from_numpy(np.array(array))
        if name.endswith("/kernel") and value.dim() == 2:
            value = value.t()
        elif name.endswith("/kernel") and value.dim() == 4:  # (row, column, in, out) → (out, in, row, column)
            value = value.permute(3, 2, 0, 1)
        name = re.sub(r"/(kernel|embedding)$", "/weight", name)
        name = re.sub(r"(shared_blocks|u_heads|v_heads|layers)_(\d+)", r"\1/\2", name).replace(
            "/layers/", "/"
        )
        state[name.replace("/", ".")] = value.contiguous()
    return from_official(state)

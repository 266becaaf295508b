"""Tiles of the attention kernels by kernel, architecture and shape."""

from typing import Any

from torch import Tensor


def tiles_for(kernel: str, q: Tensor, v: Tensor, length: int) -> dict[str, Any]:
    tiles = {"BLOCK_M": 64, "BLOCK_N": 32, "EDGE_N": 32, "num_warps": 4, "num_stages": 2}
    if kernel == "backward kv":
        del tiles["EDGE_N"]
    return tiles

"""Tiles of the attention kernels, looked up in the table by shape class, without a search at run time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from imf_kernels.backends.triton_kernels.attention_table import TABLE

WIDTHS = (64, 80, 128, 256)
SHORT = 512


def shape_classes(dtype: torch.dtype, width: int, length: int, masked: bool) -> tuple[str, str]:
    """Returns the rows of the table that fit, the closer one first: ("64 short", "64"), ("128 fp32", "fp32").

    `width` is the wider one of queries and values, `length` the number of keys that a program visits, for dk
    and dv of queries. A mask takes registers of its own, whatever the length.
    """
    width = next(widest for widest in WIDTHS if width <= widest)
    if dtype == torch.float32:
        return f"{width} fp32", "fp32"
    return f"{width} {'masked' if masked else 'short' if length <= SHORT else 'long'}", f"{width}"


def architecture_class(name: str) -> str:
    """Returns an architecture's row of the table: its own, or that of the one whose instructions it has."""
    if name in TABLE:
        return name
    if name.startswith("gfx"):
        return "gfx942"
    return "sm_100" if name.startswith("sm_10") else "sm_80"


def tiles_for(
    kernel: str, architecture: str, dtype: torch.dtype, width: int, length: int, masked: bool
) -> dict[str, int]:
    """Returns constants and options for a launch of "forward", "primal" (a forward without a tangent),
    "backward q", "backward kv", "pair q" or "pair kv".

    "primal" has the forward's tiles of keys, on which the last bits of a result depend.
    """
    rows = TABLE[architecture_class(architecture)]
    names = shape_classes(dtype, width, length, masked)

    def fitting(kernel: str) -> Iterator[tuple[int, ...]]:
        return (rows[kernel][name] for name in names if name in rows[kernel])

    m, n, edge, warps, stages = next(fitting("forward" if kernel == "primal" else kernel))
    if kernel == "primal":
        m, warps, stages = next(fitting("primal"), (m, warps, stages))
    tiles = {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    return tiles | {"EDGE_N": edge} if edge else tiles

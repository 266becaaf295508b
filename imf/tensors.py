"""Tensors by name, as files hold them: their forms, their checks, errors of writing them."""

from __future__ import annotations

import math
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from imf.program import UserError


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the CRC-32 of each group of tensors, by the first part of their names; read once, in order."""
    sums: dict[str, int] = {}
    for name in sorted(tensors):
        tensor, group = tensors[name], name.partition(".")[0]
        begun = zlib.crc32(f"{name} {form(tensor)}".encode(), sums.get(group, 0))
        sums[group] = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, begun)
    return {group: f"{value:08x}" for group, value in sums.items()}


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Returns the name of the first tensor that holds NaN or infinity."""

    def finite(x: Tensor) -> bool:  # the extremes are NaN where a value is; finding them takes no memory
        return all(math.isfinite(float(extreme)) for extreme in torch.aminmax(x.float()))

    floats = {name: x for name, x in tensors.items() if x.is_floating_point() and x.numel()}
    return next((name for name, x in floats.items() if not finite(x)), None)


def check_same(path: Path | str, got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises UserError, listing the first differences, unless names, shapes and dtypes are the expected."""
    have, wanted = ({name: form(tensor) for name, tensor in tensors.items()} for tensors in (got, expected))
    names = [*wanted, *(have.keys() - wanted.keys())]
    lines = [
        f"  {name}: checkpoint {have.get(name, 'has none')}, network {wanted.get(name, 'has none')}"
        for name in names
        if wanted.get(name) != have.get(name)
    ]
    if lines:
        lines[5:] = [f"  and {len(lines) - 5} more"] if len(lines) > 5 else []
        raise UserError("\n".join([f"{path}: a checkpoint of another network, or not whole:", *lines]))


def form(tensor: Tensor) -> str:
    """Returns shape and dtype as text: "[2, 3] float32"."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


@contextmanager
def writing(path: Path, what: str, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Turns errors of writing tensors to `path` into a UserError with the bytes needed and free."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        needed, free = sum(tensor.nbytes for tensor in tensors.values()), "an unknown number"
        with suppress(OSError):
            free = f"{shutil.disk_usage(path.parent).free:,}"
        raise UserError(
            f"{path}: could not write {what}: {error}; it needs {needed:,} bytes, {free} are free"
        ) from error

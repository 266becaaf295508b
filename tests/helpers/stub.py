"""Stub of the compiled module, printed from the module itself.

    python -m tests.helpers.stub > imf_kernels/_C.pyi

For type checkers only, it also has a protocol for each operation's kernels, as passed to its
`autograd.Function`.
"""

from __future__ import annotations

import re

from imf_kernels import _C

_HEAD = """\
# Printed by `python -m tests.helpers.stub` from the compiled module; tests/csrc/test_build.py compares them.
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

openmp: bool
intel: bool
cuda: bool
schemas: dict[str, str]
sources: dict[str, str]  # digests by backend, see backends/sources.py

def key(arguments: tuple[object, ...], /) -> bytes | None: ...  # None where a choice must not be remembered
def watch(hooks: object, /) -> None: ...

class Kinds:
    def launch(
        self, grid: tuple[int, int], tensors: tuple[Tensor | None, ...], numbers: tuple[float | None, ...], /
    ) -> tuple[bytes, int] | None: ...  # what Triton must launch: kind, device
    def add(
        self, kind: bytes, launch: int, function: int, threads: int, shared: int, types: str, tensors: int,
        fixed: tuple[object, ...], owner: object, /,
    ) -> None: ...

class Replayed:
    def __init__(self, function: Callable[..., None], /) -> None: ...
    def clear(self) -> None: ...
    def __call__(self, *arguments: object) -> None: ...

def supported_isas() -> list[str]: ...
def isa_unavailable(name: str, /) -> str: ...
def set_isa(name: str, /) -> None: ...
def get_isa() -> str: ...
def cuda_unavailable() -> str: ...
"""
_TYPES = {
    "Tensor": "Tensor",
    "Tensor?": "Tensor | None",
    "Tensor[]": "Sequence[Tensor]",
    "Tensor?[]": "Sequence[Tensor | None]",
    "float": "float",
    "bool": "bool",
}
# Operations whose kernels have the same signature.
_NAMES = {"silu": "elementwise"}
_SAME = ("gelu", "gelu_tanh")


def parameters(schema: str) -> list[str]:
    """Returns the parameters of a schema as Python writes them: "x: Tensor", …"""
    listed = re.sub(r"\(\w!\)", "", schema[1 : schema.index(") -> ")])
    pairs = (parameter.rsplit(" ", 1) for parameter in listed.split(", "))
    return [f"{name}: {_TYPES[kind]}" for kind, name in pairs]


def text() -> str:
    """Returns the stub."""
    lines, operations = [_HEAD], dict[str, dict[str, str]]()
    for function, schema in sorted(_C.schemas.items()):
        lines.append(f"def {function}({', '.join([*parameters(schema), '/'])}) -> None: ...")
        operation, _, name = function.rpartition("_")
        operations.setdefault(operation, {})[name] = schema
    for operation, functions in operations.items():
        if operation in _SAME:
            continue
        lines.append(f"\nclass {_NAMES.get(operation, operation)}(Protocol):")
        for name, schema in functions.items():
            lines.append("    @staticmethod")
            lines.append(f"    def {name}({', '.join([*parameters(schema), '/'])}) -> None: ...")
        if any("partial" in schema for schema in functions.values()):
            lines.append("    @staticmethod")
            lines.append("    def shares(groups: int, length: int, width: int, count: int) -> int: ...")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(text(), end="")

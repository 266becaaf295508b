"""Digests of the sources of kernels, by which a record tells whether it holds for the installed ones.

They are the same for a wheel, a source distribution and a checkout, whatever its line endings: those of the
compiled kernels are taken when they are built (CMakeLists.txt), those of Triton's from the files that Triton
compiles. The latter are read when a record is first compared, once per process. A changed comment changes a
digest too.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from imf_kernels import _C

_BACKENDS = Path(__file__).parent
_IMPORTED = re.compile(
    r"^from imf_kernels\.backends(?:\.| import )(triton_launch|triton_kernels\.\w+)\b", re.MULTILINE
)

# Modules of Triton kernels by public name of the operation; each operation adds its own.
MODULES: dict[str, set[str]] = {}


@functools.cache
def digest(operation: str, backend: str) -> str:
    """Returns the digest of the sources of an operation's kernels; "" for a backend that has none here.

    "cpu": of csrc/cpu. "triton": of the operation's modules of triton_kernels, of all that these import of
    it, and of triton_launch.py, which sets the compiler's options. "cuda": of these, whose backward it runs,
    and of csrc/cuda.
    """
    if backend not in ("triton", "cuda"):
        return _C.sources.get(backend, "")
    found: dict[str, bytes] = {}
    missing = {f"triton_kernels.{module}" for module in MODULES.get(operation, ())}
    while missing:
        texts = {name: _text(_BACKENDS / f"{name.replace('.', '/')}.py") for name in missing}
        found |= texts
        missing = {name for text in texts.values() for name in _IMPORTED.findall(text.decode())} - {*found}
    return of_texts(found if backend == "triton" else found | {"cuda": _C.sources["cuda"].encode()})


def digests() -> dict[str, dict[str, str]]:
    """Returns the digests of all kernels for GPUs by operation and backend."""
    return {o: {b: digest(o, b) for b in ("triton", "cuda")} for o in sorted(MODULES)}


def of_package() -> str:
    """Returns the digest of the package's Python files, "" where they cannot be read.

    Graphs name it, so that what PyTorch's compiler keeps on disk is not used by another version.
    """
    root = _BACKENDS.parent
    try:
        return of_texts({path.relative_to(root).as_posix(): _text(path) for path in root.rglob("*.py")})
    except OSError:
        return ""


def of_texts(texts: Mapping[str, bytes]) -> str:
    """Returns the digest of texts by name; `imf_digest` of CMakeLists.txt is the same function."""
    lines = [f"{name} {hashlib.sha256(text).hexdigest()}\n" for name, text in sorted(texts.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


@functools.cache
def _text(path: Path) -> bytes:
    return path.read_bytes().replace(b"\r\n", b"\n")

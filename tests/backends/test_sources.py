"""Digests of the sources of kernels: what changes them, and what does not."""

import ast
import functools
import shutil
from pathlib import Path

import pytest

from imf_kernels import _C
from imf_kernels.backends import sources
from imf_kernels.backends.operators import OPERATIONS

ROOT = Path(__file__).parents[2]
PACKAGE = "imf_kernels.backends"
BACKENDS = ROOT / "imf_kernels" / "backends"
FILES = [
    "triton_launch.py",
    *sorted(f"triton_kernels/{p.name}" for p in BACKENDS.glob("triton_kernels/*.py")),
]
PUBLIC = {o.public for o in OPERATIONS.values() for b in o.backends if b.name == "triton"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of imf_kernels/backends, of which digests are computed anew at every call."""
    shutil.copytree(sources._BACKENDS, tmp_path / "backends", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(sources, "_BACKENDS", tmp_path / "backends")
    monkeypatch.setattr(sources, "_text", sources._text.__wrapped__)
    monkeypatch.setattr(sources, "digest", sources.digest.__wrapped__)
    return tmp_path / "backends"


@functools.cache
def imported(file):
    """The files of Triton's kernels that a file imports, itself among them."""
    found = {file}
    for node in ast.walk(ast.parse((BACKENDS / file).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            other = f"{name.removeprefix(f'{PACKAGE}.').replace('.', '/')}.py"
            if name.startswith(f"{PACKAGE}.") and other in FILES and other != file:
                found |= imported(other)
    return found


def test_a_changed_file_changes_the_digests_of_the_operations_that_import_it(folder):
    before = sources.digests()
    assert set(before) == PUBLIC
    for file in FILES:
        text = (folder / file).read_bytes()
        (folder / file).write_bytes(text + b"\n")
        now = sources.digests()
        users = {
            operation
            for operation, modules in sources.MODULES.items()
            if any(file in imported(f"triton_kernels/{module}.py") for module in modules)
        }
        for backend in ("triton", "cuda"):
            assert {o for o in now if now[o][backend] != before[o][backend]} == users, file
        (folder / file).write_bytes(text)
    assert sources.digests() == before


def test_any_file_changes_the_digest_of_the_package(folder):
    before = sources.of_package()
    path = next(folder.rglob("layout.py"))
    path.write_text(path.read_text() + "# changed\n")
    assert sources.of_package() != before


def test_line_endings_and_times_change_nothing(folder):
    before = sources.digests()
    for file in FILES:
        (folder / file).write_bytes((folder / file).read_bytes().replace(b"\n", b"\r\n"))
    assert sources.digests() == before


def test_digests_of_different_kernels_differ(monkeypatch):
    assert sources.digest("rms_norm", "triton") != sources.digest("swiglu", "triton")
    before = {b: sources.digest("rms_norm", b) for b in ("cpu", "triton", "cuda")}
    monkeypatch.setattr(_C, "sources", {"cpu": "other", "cuda": "another"})
    now = {b: sources.digest.__wrapped__("rms_norm", b) for b in before}
    assert [b for b in before if before[b] != now[b]] == ["cpu", "cuda"]


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_the_module_is_built_of_these_sources(backend):
    top = ROOT / "csrc" / backend
    found = [p for p in top.rglob("*") if p.suffix in (".h", ".cpp", ".cuh", ".cu")]
    texts = {p.relative_to(top).as_posix(): p.read_bytes().replace(b"\r\n", b"\n") for p in found}
    assert texts and _C.sources[backend] == sources.of_texts(texts), "build again: pip install -e ."

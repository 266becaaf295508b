"""Build the API reference from the docstrings: `make docs`, or `python docs/api.py [FOLDER]` with pdoc.

Each of these is an error: a warning of pdoc; a public module, class or function without a docstring; a name
in backticks that begins with a package's and does not exist.
"""

from __future__ import annotations

import contextlib
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pdoc
import torch

import imf

ROOT = Path(__file__).resolve().parent.parent
# The packages show the public names, the modules what is documented beyond them.
MODULES = (
    "imf_kernels",
    "imf_kernels.nn",
    "imf",
    "imf.data",
    "imf.evaluation.convnet",
    "imf.evaluation.fid",
    "imf.evaluation.inception",
    "imf.evaluation.quality",
    "imf.evaluation.scores",
    "imf.mean_flow.flow_maps",
    "imf.mean_flow.methods",
    "imf.mean_flow.objective",
    "imf.model.config",
    "imf.model.imf",
    "imf.model.pretrained",
    "imf.objective.draws",
    "imf.objective.imf_loss",
    "imf.official.names",
    "imf.model.sampler",
    "imf.program",
    "imf.sampling",
)
NAME = re.compile(r"`((?:imf|imf_kernels)(?:\.\w+)+)[`(]")


def documented(of: pdoc.doc.Doc) -> Iterator[pdoc.doc.Doc]:
    """Yields a module, class or function and, of modules and classes, their public members."""
    yield of
    if isinstance(of, pdoc.doc.Namespace):
        for member in of.own_members if isinstance(of, pdoc.doc.Class) else of.members.values():
            public = not member.name.startswith("_") and not isinstance(member, pdoc.doc.Variable)
            if public and not isinstance(member, pdoc.doc.Module):
                yield from documented(member)


def exists(name: str) -> bool:
    """Returns whether a dotted name is a module or an attribute, a field without a default included."""
    with contextlib.suppress(ImportError, AttributeError):
        pkgutil.resolve_name(name)
        return True
    with contextlib.suppress(ImportError, AttributeError):
        owner, _, field = name.rpartition(".")
        return field in getattr(pkgutil.resolve_name(owner), "__annotations__", {})
    return False


def faults(of: pdoc.doc.Doc) -> Iterator[str]:
    """Yields what is wrong with a docstring; methods that tensors have too need none."""
    if not of.docstring and not hasattr(torch.Tensor, of.name):
        yield f"{of.fullname}: no docstring"
    for name in NAME.findall(of.docstring):
        if not exists(name):
            yield f"{of.fullname}: `{name}` does not exist"


def main(folder: Path) -> int:
    """Writes the reference into a folder; returns the exit status."""
    warnings.simplefilter("error")
    for name in imf.__all__:  # pdoc looks for names that have been imported
        getattr(imf, name)
    pdoc.render.configure(docformat="google", footer_text="imf-kernels")
    pdoc.pdoc(*MODULES, output_directory=folder)
    found = {
        fault
        for name in MODULES
        for of in documented(pdoc.doc.Module.from_name(name))
        for fault in faults(of)
    }
    print("\n".join(sorted(found)), file=sys.stderr)
    print(f"{folder}/index.html" if not found else f"{len(found)} faults of docstrings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "docs"))

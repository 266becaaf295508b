"""The imports of `imf`: `make lint` keeps its rooms in order; here, the length of the longest chain."""

import functools
import subprocess
import sys

import pytest


def test_the_longest_chain_of_imports():
    grimp = pytest.importorskip("grimp", reason="grimp is not installed")
    graph = grimp.build_graph("imf", exclude_type_checking_imports=True, cache_dir=None)

    @functools.cache
    def chain(module):
        below = [chain(other) for other in graph.find_modules_directly_imported_by(module)]
        return (module, *max(below, key=len, default=()))

    longest = max(map(chain, graph.modules), key=len)
    assert 5 < len(longest) <= 9, longest


def test_statistics_load_neither_networks_nor_kernels():
    code = "import sys; from imf.evaluation import fid; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "imf.evaluation.fid" in loaded
    assert not {"imf.model", "imf.networks", "imf_kernels", "imf_kernels._C"} & set(loaded)

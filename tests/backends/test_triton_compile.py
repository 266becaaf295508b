"""The Triton kernels compile for the GPUs they are meant for, without one; what spills is said below."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from imf_kernels.testing.cases import LARGE, SMALL
from tests.helpers.backends import has_triton

pytest.importorskip("triton", reason="Triton cannot be imported", exc_type=ImportError)

# Bytes of shared memory that a program may have.
SHARED = {
    **{"cuda:80": 163 << 10, "cuda:86": 99 << 10, "cuda:89": 99 << 10, "cuda:90": 227 << 10},
    **{"cuda:100": 227 << 10, "cuda:120": 99 << 10, "hip:gfx942": 64 << 10},
}
# Bytes of stack that are no cost: ptxas keeps an address there now and then, in other kernels with each
# release of Triton; sines of large angles are brought near zero in local memory; the tiles of attention that
# were fastest on an H100 spill a few registers.
ADDRESS = 8
STACK = {"sinusoidal_embedding": 64, "scaled_dot_product_attention": 40}
# Attention in fp32 keeps its operands in registers on NVIDIA GPUs, and from a head dim of 72 on it spills.
SPILLING_FP32 = {"scaled_dot_product_attention": 512}

ATTENTION = [case for case in LARGE if case.operation == "scaled_dot_product_attention"]
ROWS = [case for case in LARGE if case not in ATTENTION and has_triton(case.operation)]
CASES = {"rows": ROWS, "attention": ATTENTION if has_triton("scaled_dot_product_attention") else []}
kinds = pytest.mark.parametrize("kind", CASES)


def compiled(target, dtype, cases):
    """What the launches of these cases need, from a process in which Triton does not interpret."""
    names = [str(case) for case in cases if dtype in (str(d).removeprefix("torch.") for d in case.dtypes)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.helpers.compile_kernels", target, dtype, *names],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    launches = [json.loads(line) for line in run.stdout.splitlines()]
    assert {launch["case"] for launch in launches} == set(names)
    return launches


def check(target, dtype, cases):
    operations = {str(case): case.operation for case in cases}
    for launch in compiled(target, dtype, cases):
        operation = operations[launch["case"]]
        spills = SPILLING_FP32.get(operation, 0) if dtype == "float32" else 0
        assert launch["stack"] <= max(spills, STACK.get(operation, ADDRESS)), f"spilled registers: {launch}"
        assert launch["shared"] <= SHARED[target], launch
        attention = operation == "scaled_dot_product_attention"
        assert not attention or launch["matrix instructions"] or dtype == "float32", launch


@kinds
@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_a_block_of_a_network_in_bfloat16(target, kind):
    named = "head dim 72", "DiT-XL/2"
    check(target, "bfloat16", [case for case in CASES[kind] if case.name.startswith(named)])


@pytest.mark.parametrize(("target", "dtype"), [("cuda:86", "bfloat16"), ("cuda:120", "float32")])
def test_the_widest_heads_fit_gpus_with_little_shared_memory(target, dtype):
    """Consumer GPUs have 99 KiB a block, sm_80 has 163."""
    cases = [case for case in SMALL if str(case) == "scaled_dot_product_attention width 256"]
    assert all(launch["shared"] <= 99 << 10 for launch in compiled(target, dtype, cases))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@kinds
@pytest.mark.parametrize("target", SHARED)
def test_every_shape_of_training(target, kind, dtype):
    check(target, dtype, CASES[kind])

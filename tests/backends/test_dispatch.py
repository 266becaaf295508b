"""The choice of a backend: by name or the first that can, with its reasons, never in silence."""

import logging

import pytest
import torch

import imf_kernels as ik
from imf_kernels import info
from imf_kernels.backends import cpu, dispatch
from imf_kernels.backends.dispatch import Backend, choose
from imf_kernels.backends.operators import OPERATIONS
from tests.helpers.backends import NO_OPERATIONS

X = torch.ones(2)
FAST = Backend("fast", unavailable=lambda tensors: "it is out of order")
SLOW = Backend("slow")
LAST = Backend("last", opt_in=lambda tensors: "it runs on request")


@pytest.fixture(autouse=True)
def nothing_logged_yet():
    dispatch.log_once.cache_clear()


def test_the_first_that_can_is_taken_and_the_reason_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="imf_kernels"):
        for _ in range(3):
            assert choose("op", [FAST, SLOW, LAST], None, (X,)) is SLOW
    assert [r.message for r in caplog.records] == ["op runs on the slow backend (fast: it is out of order)"]


def test_a_first_choice_is_not_worth_a_word(caplog):
    with caplog.at_level(logging.INFO, logger="imf_kernels"):
        assert choose("op", [SLOW, FAST], None, (X,)) is SLOW
    assert not caplog.records


def test_a_backend_by_name_runs_or_says_why_not():
    assert choose("op", [FAST, SLOW, LAST], "last", (X,)) is LAST
    with pytest.raises(RuntimeError, match="op: backend 'fast' cannot run: it is out of order"):
        choose("op", [FAST, SLOW], "fast", (X,))
    with pytest.raises(ValueError, match="op: backend must be one of 'fast', 'slow', got 'quick'"):
        choose("op", [FAST, SLOW], "quick", (X,))


def test_no_backend_left():
    with pytest.raises(
        RuntimeError, match="op: no backend can run: fast: it is out of order; last: it runs on request"
    ):
        choose("op", [FAST, LAST], None, (X,))


def test_a_reason_is_asked_about_the_tensors():
    asked = []
    picky = Backend("picky", unavailable=lambda tensors: asked.extend(tensors))
    assert choose("op", [picky], None, (X, X + 1)) is picky and [t[0].item() for t in asked] == [1, 2]


def test_instruction_sets():
    sets = cpu.instruction_sets()
    assert sets[0] == "plain" and cpu.instruction_set() == sets[-1]
    for name in sets:
        with cpu.use_instruction_set(name):
            assert cpu.instruction_set() == name
    with pytest.raises(ZeroDivisionError), cpu.use_instruction_set("plain"):
        _ = 1 / 0
    assert cpu.instruction_set() == sets[-1]
    with pytest.raises(ValueError, match="unknown instruction set 'sse9'; there are plain, neon, avx2, "):
        cpu.use_instruction_set("sse9").__enter__()


def test_info_lists_every_operation_and_backend():
    text = info.report()
    assert cpu.instruction_set() in text and torch.__version__ in text
    for name, operation in OPERATIONS.items():
        assert name in text
        assert operation.backends[-1].name == "reference"
    assert {operation.public for operation in OPERATIONS.values()} == set(ik.__all__) - NO_OPERATIONS


def test_operations_without_kernels_of_a_name_take_it_for_another():
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    for name in ("triton", "cuda"):  # products on GPUs are PyTorch's
        assert torch.equal(ik.linear(x, weight, backend=name), ik.linear(x, weight, backend="reference"))
    t = torch.ones(3)
    assert torch.equal(ik.sinusoidal_embedding(t, 4, backend="cpu"), ik.sinusoidal_embedding(t, 4))
    half = x.bfloat16()  # on the CPU, which Triton's interpreter does not take
    with pytest.raises(RuntimeError, match=r"rms_norm: backend 'cuda' cannot run: .*(ROCm|Triton's)"):
        ik.rms_norm(half, torch.ones(3), backend="cuda")
    with pytest.raises(
        ValueError, match="linear: backend must be one of 'cpu', 'triton', 'cuda', 'reference', got 'gpu'"
    ):
        ik.linear(x, weight, backend="gpu")

"""What the tests of the operations share: backends, poisoned memory, one thread unless a test says more."""

import contextlib

import pytest
import torch

from imf_kernels import cpu

ISAS = ("plain", "avx2", "avx512", "avx512_bf16")
KERNELS = tuple(f"cpu-{isa}" for isa in ISAS)
BACKENDS = ("reference", *KERNELS)


@contextlib.contextmanager
def running_on(name):
    """The name to pass as `backend`, with the instruction set of "cpu-avx2" chosen meanwhile."""
    backend, _, isa = name.partition("-")
    if isa and isa not in cpu.instruction_sets():
        pytest.skip(f"this processor has no {isa}")
    with cpu.use_instruction_set(isa) if isa else contextlib.nullcontext():
        yield backend


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(params=BACKENDS)
def backend(request, poisoned_memory):
    """Each backend in turn, the `cpu` one with each instruction set, on one thread."""
    with running_on(request.param) as name, threads(1):
        yield name


@pytest.fixture(params=KERNELS)
def kernels(request, poisoned_memory):
    """The `cpu` backend with each instruction set in turn, on one thread."""
    with running_on(request.param) as name, threads(1):
        yield name


@pytest.fixture
def poisoned_memory():
    """New tensors are full of NaN, so that whatever a kernel leaves unwritten is seen.

    That needs PyTorch's deterministic algorithms, which training does not use: tests of runs are without.
    """
    filled, deterministic = (
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.are_deterministic_algorithms_enabled(),
    )
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = filled

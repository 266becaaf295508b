"""The backends that tests run on: which there are here, what they take, how one is chosen."""

import contextlib

import pytest
import torch

from imf_kernels.backends import cpu, cuda, triton_launch
from imf_kernels.backends.operators import OPERATIONS

ON_GPU = torch.cuda.is_available()
ISAS = ("plain", "neon", "avx2", "avx512", "avx512_bf16", "amx_bf16")
KERNELS = (*(f"cpu-{isa}" for isa in ISAS), "triton", "cuda")
BACKENDS = ("reference", *KERNELS)

# What imf_kernels makes public beside its operations.
NO_OPERATIONS = {
    *("Dual", "cat", "checkpoint", "explain", "jvp", "linear_map", "primal", "rope_tables", "use_backend"),
}

# The CUDA kernels are attention's, for compute capability 9.0; tests of their own emulate them elsewhere.
HOPPER = ON_GPU and not cuda.missing() and torch.cuda.get_device_capability() == (9, 0)

DTYPES = {
    "cuda": (torch.bfloat16,),
    "cpu": (torch.float32, torch.bfloat16),
    "triton": triton_launch.DTYPES if ON_GPU else (torch.float32, torch.float16),
    "reference": (torch.float32, torch.bfloat16, torch.float16),
}


def dtypes_of(case, backend):
    """The dtypes of a case that a backend takes here; the natural one first."""
    return [dtype for dtype in case.dtypes if dtype in DTYPES[backend.partition("-")[0]]]


def has_triton(operation):
    """Whether an operation has Triton kernels."""
    return has("triton", operation)


def has(name, operation):
    return any(backend.name == name for backend in OPERATIONS[operation].backends)


def takes(case, dtype, backend):
    if case is None:
        return dtype is None or dtype in DTYPES[backend.partition("-")[0]]
    return dtype in dtypes_of(case, backend) if dtype else bool(dtypes_of(case, backend))


class CPUGenerators(torch.overrides.TorchFunctionMode):
    """Numbers of a generator on the CPU are drawn there and moved to the GPU that is the default device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        drawing = function in (torch.rand, torch.randn, torch.randint, torch.randperm)
        if not drawing or generator is None or generator.device.type != "cpu" or "device" in kwargs:
            return function(*args, **kwargs)
        requires_grad = kwargs.pop("requires_grad", False)
        return function(*args, **kwargs, device="cpu").to("cuda").requires_grad_(requires_grad)


@contextlib.contextmanager
def running_on(name):
    """The name to pass as `backend`, with the instruction set of "cpu-avx2" chosen meanwhile, or the GPU."""
    backend, _, isa = name.partition("-")
    if isa and isa not in cpu.instruction_sets():
        pytest.skip(f"this processor has no {isa}")
    if backend == "triton" and (reason := triton_launch.missing()):
        pytest.skip(reason)
    if backend == "cuda" and not HOPPER:
        pytest.skip("no CUDA kernels: they are for compute capability 9.0")
    with contextlib.ExitStack() as stack:
        if isa:
            stack.enter_context(cpu.use_instruction_set(isa))
        if backend == "cuda" or (backend == "triton" and ON_GPU):
            stack.enter_context(torch.device("cuda"))
            stack.enter_context(CPUGenerators())
        yield backend


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same_numbers(got, wanted):
    """Checks that results for inputs of other strides are the same, to the bit where no GPU computed them.

    There Triton adds numbers in the order in which threads read them.
    """
    if got.is_cuda:
        torch.testing.assert_close(got, wanted)
    else:
        assert torch.equal(got, wanted)

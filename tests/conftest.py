"""What the tests of the operations share: backends, poisoned memory, the number of threads.

On a machine with a GPU the `triton` backend runs on it, elsewhere in Triton's interpreter, on the CPU; the
`cuda` backend runs on a GPU of compute capability 9.0 alone.
"""

import os
from pathlib import Path

# Before PyTorch is imported, and for the processes that tests start: one thread, enough for the small tensors
# of the tests, unless the suite is to run on more (`OMP_NUM_THREADS=3 make test`) or a test says so.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic products ask for

if "IMF_REMOTE_KERNELS" in os.environ:
    from tests.helpers import remote_kernels

    remote_kernels.install(os.environ["IMF_REMOTE_KERNELS"])

from imf_kernels import _C, verify
from imf_kernels.backends import verified
from imf_kernels.testing.cases import Case
from tests.helpers.backends import (
    BACKENDS,
    HOPPER,
    KERNELS,
    ON_GPU,
    has,
    has_triton,
    running_on,
    takes,
)

if "libasan" in os.environ.get("LD_PRELOAD", "") and b"__asan_init" not in Path(_C.__file__).read_bytes():
    pytest.exit(f"{_C.__file__} is not built for the AddressSanitizer that is preloaded", returncode=1)


def pytest_collection_modifyitems(items):
    """Of tests of each case, dtype and backend, leaves out the combinations that do not exist, marks those
    that run on the GPU, and keeps the properties of attention in Triton's interpreter, seconds each, to one
    dtype unless all is tested."""
    items[:] = [item for item in items if _exists(item)]
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        backend = parameters.get("backend", parameters.get("kernels"))
        if backend == "cuda" or (backend == "triton" and ON_GPU):
            item.add_marker(pytest.mark.gpu)
        interpreted = backend == "triton" and not ON_GPU
        attention = "scaled_dot_product_attention" in str(parameters.get("case"))
        half = parameters.get("dtype") == torch.float16
        if interpreted and attention and half and item.path.name == "test_properties.py":
            item.add_marker(pytest.mark.slow)


def _exists(item):
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    backend = parameters.get("backend", parameters.get("kernels"))
    if backend not in BACKENDS:
        return True
    case, dtype = parameters.get("case"), parameters.get("dtype")
    if not isinstance(case, Case):
        case = None
    # "gelu, tanh" is an operation and its variant
    about = item.get_closest_marker("operation")
    named = about.args[0] if about else parameters.get("operation", "rms_norm").partition(",")[0]
    operation = case.operation if case else named
    large = case is not None and case.large  # hours in the interpreter
    if backend == "triton":
        return has_triton(operation) and not (large and not ON_GPU) and takes(case, dtype, backend)
    if backend == "cuda":
        return has("cuda", operation) and _hopper_takes(case, dtype)
    if backend == "cpu-amx_bf16" and (operation != "scaled_dot_product_attention" or dtype == torch.float32):
        return False  # as avx512_bf16: tiles are of attention in bf16 alone
    return (backend == "reference" or has("cpu", operation)) and takes(case, dtype, backend)


def _hopper_takes(case, dtype):
    """Whether attention's kernel for Hopper takes a case."""
    if not HOPPER or case is None:
        return False
    widths = {x.shape[3] for name, x in case.inputs.items() if name != "attn_mask"}
    plain = "attn_mask" not in case.inputs and "is_causal" not in case.options
    return plain and dtype == torch.bfloat16 and all(w % 8 == 0 and w <= 128 for w in widths)


@pytest.fixture(params=BACKENDS)
def backend(request, poisoned_memory):
    """Each backend in turn, the `cpu` one with each instruction set."""
    with running_on(request.param) as name:
        yield name


@pytest.fixture(params=KERNELS)
def kernels(request, poisoned_memory):
    """The `cpu` backend with each instruction set in turn, and `triton`."""
    with running_on(request.param) as name:
        yield name


@pytest.fixture(autouse=True, scope="session")
def no_records():
    """Tests choose as on a machine without a record of imf_kernels.verify."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verified, "record_of", lambda device: None)
        yield


@pytest.fixture
def poisoned_memory():
    """New tensors are full of NaN, so that whatever a kernel leaves unwritten is seen.

    That needs PyTorch's deterministic algorithms, which training does not use: tests of runs are without.
    """
    with verify.poisoned_memory():
        assert torch.empty(3).isnan().all()
        yield

"""The attention of csrc/cuda for Hopper on the emulated machine of tests/cuda_host/hopper."""

import ctypes
import math
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from imf_kernels.ops.attention import _cuda_layout, _reference
from imf_kernels.testing import errors

ROOT = Path(__file__).parents[2]
HOST = ROOT / "tests" / "cuda_host" / "hopper"
BFLOAT16 = 1  # of csrc/types.h


def missing():
    """Why it cannot be built here; `None` where it can."""
    if platform.machine() != "x86_64":
        return f"the emulated machine has run on x86_64 alone, got {platform.machine()}"
    return None if shutil.which("g++") else "no g++"


def build(folder, sources=ROOT / "csrc", warnings=("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")):
    """Compiles the kernels of `sources` for the host; the shared library, loaded."""
    library = folder / "attention.so"
    command = ["g++", "-std=c++17", "-O1", "-march=native", "-ffp-contract=off", *warnings]
    command += ["-shared", "-fPIC", f"-I{HOST}", f"-I{sources}"]
    subprocess.run([*command, "-o", library, HOST / "attention.cpp"], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.attention_forward.restype = ctypes.c_char_p
    return loaded


def within(shape, dtype):
    """A tensor [B, H, L, D] in memory [B, L, H, D] with a margin around each row; all of it, NaN."""
    batch, heads, length, width = shape
    memory = torch.full((batch, length + 2, heads + 1, width + 8), math.nan, dtype=dtype)
    return memory[:, 1:-1, :heads, :width].transpose(1, 2), memory


def _heads(x):
    """Address, sizes, and strides of all dimensions but the last; zeros of `None`."""
    return (0,) * 8 if x is None else (x.data_ptr(), *x.shape, *x.stride()[:3])


def attention(library, q, k, v, q_dot=None, k_dot=None, v_dot=None, scale=None, processors=2, seed=0):
    """Output, its tangent or `None`, and lse, from the emulated kernel.

    Raises:
        RuntimeError: for what the machine found wrong.
        AssertionError: if anything beside the outputs was written.
    """
    (batch, heads, queries, width), value_width = q.shape, v.shape[3]
    stored = next((t for t in (q_dot, k_dot, v_dot) if t is not None), None)
    tangent_rows = 0 if stored is None else stored.shape[0]
    out, memory = within((batch, heads, queries, value_width), q.dtype)
    out_dot, memory_dot = within((tangent_rows, heads, queries, value_width), q.dtype)
    lse = torch.full((batch, heads, queries), math.nan)
    tensors = (q, k, v, q_dot, k_dot, v_dot, out, out_dot if tangent_rows else None)
    for x in (q, k, v, q_dot, k_dot, v_dot):
        assert x is None or _cuda_layout(x) is None
    numbers = [number for x in tensors for number in _heads(x)]
    error = library.attention_forward(
        BFLOAT16,
        (ctypes.c_int64 * len(numbers))(*numbers),
        ctypes.c_void_p(lse.data_ptr()),
        ctypes.c_float(1 / math.sqrt(width) if scale is None else scale),
        processors,
        seed,
    )
    if error:
        raise RuntimeError(error.decode())
    results = out.clone(), out_dot.clone() if tangent_rows else None, lse
    for view, whole in ((out, memory), (out_dot, memory_dot)):
        view.fill_(math.nan)
        assert whole.isnan().all(), "written beside the output"
    return results


def reference(dtype, q, k, v, q_dot=None, k_dot=None, v_dot=None, scale=None):
    """Output, its tangent and lse, to base 2, by PyTorch in `dtype`."""
    q, k, v, q_dot, k_dot, v_dot = (
        None if x is None else x.to(dtype) for x in (q, k, v, q_dot, k_dot, v_dot)
    )
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    out, out_dot = _reference(False, q, q_dot, k, k_dot, v, v_dot, None, False, scale)
    logits = scale * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    return out, out_dot, torch.logsumexp(logits, -1) / math.log(2)


def check(library, arguments, **options):
    """Holds the kernel's output, tangent and lse to the error rule; returns them."""
    scale = {name: options[name] for name in ("scale",) if name in options}
    exact = reference(torch.float64, **arguments, **scale)
    fp32 = reference(torch.float32, **arguments, **scale)
    got = attention(library, **arguments, **options)
    for name, x, wanted, pytorch in zip(("output", "tangent", "lse"), got, exact, fp32, strict=True):
        assert (x is None) == (wanted is None), name
        if x is not None:
            errors.check(name, x, wanted, errors.Yardstick.of(pytorch, wanted))
    return got

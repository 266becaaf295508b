"""Triton kernels touch their tensors alone: in the interpreter, each address read or written is checked.

A GPU reports an access outside only where nothing is mapped, which PyTorch's cached memory makes rare.
"""

import contextlib

import numpy as np
import pytest
import torch

from imf_kernels.backends import triton_launch
from imf_kernels.testing import cases, errors
from tests.helpers.backends import ON_GPU, dtypes_of, has_triton, running_on

interpreter = pytest.importorskip("triton.runtime.interpreter", exc_type=ImportError)
pytestmark = pytest.mark.skipif(ON_GPU, reason="needs Triton's interpreter")

Builder = interpreter.InterpreterBuilder
CASES = [
    c
    for c in cases.SMALL
    if has_triton(c.operation) and "triton" not in c.refused_by and dtypes_of(c, "triton")
]


def extent(x):
    """The first byte of a tensor and the byte behind its last."""
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


@contextlib.contextmanager
def checked(monkeypatch):
    """Raises for a launch that touches memory outside of its tensors."""
    extents = []
    launch = triton_launch.Launcher.__call__
    load, store = Builder.create_masked_load, Builder.create_masked_store

    def check(pointers, mask, what):
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        if not addresses.size:
            return
        size = pointers.get_element_ty().primitive_bitwidth // 8 or 1
        inside = np.zeros(addresses.shape, bool)
        for first, end in extents:
            inside |= (addresses >= first) & (addresses + size <= end)
        assert inside.all(), f"{(~inside).sum()} of {inside.size} addresses {what} are outside of all tensors"

    def checked_launch(launcher, grid, tensors, *numbers):
        extents[:] = [extent(x) for x in tensors if x is not None]
        launch(launcher, grid, tensors, *numbers)

    def checked_load(builder, pointers, mask, *rest):
        check(pointers, mask, "read")
        return load(builder, pointers, mask, *rest)

    def checked_store(builder, pointers, value, mask, *rest):
        check(pointers, mask, "written")
        return store(builder, pointers, value, mask, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(triton_launch.Launcher, "__call__", checked_launch)
        patch.setattr(Builder, "create_masked_load", checked_load)
        patch.setattr(Builder, "create_masked_store", checked_store)
        yield extents


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_kernel_leaves_its_tensors(case, monkeypatch):
    with running_on("triton"):
        # Attention's backward of the pair is too slow in the interpreter for every case.
        differentiable = case.operation != "scaled_dot_product_attention"
        p = errors.problem(case, dtypes_of(case, "triton")[0], differentiable=differentiable)
        with checked(monkeypatch):
            p.evaluate("triton")
            p.evaluate("triton", tangents=False)


def test_what_leaves_them_is_seen(monkeypatch):
    with running_on("triton"), checked(monkeypatch), monkeypatch.context() as patch:
        patch.setattr(__name__ + ".extent", lambda x: (x.data_ptr(), x.data_ptr() + 8))
        with pytest.raises(Exception, match="are outside of all tensors"):
            cases.silu("vector", 40).run({"x": torch.ones(40)}, "triton")

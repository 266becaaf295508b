"""The CUDA kernels: where they run, why not elsewhere, and what their name means for other operations.

On compute capability 9.0 they are tested with the other backends, under the name `cuda`; tests/csrc emulates
them.
"""

import re
from dataclasses import replace

import pytest
import torch

import imf_kernels as ik
from imf_kernels import _C, info
from imf_kernels.backends import cuda
from imf_kernels.backends.dispatch import choose
from imf_kernels.backends.operators import OPERATIONS
from imf_kernels.ops import attention
from tests.helpers.backends import ON_GPU


def refused(dtype=torch.bfloat16):
    """Why attention's CUDA kernel does not take a tensor."""
    q = torch.zeros(1, 1, 2, 8, dtype=dtype)
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run: ") as error:
        ik.scaled_dot_product_attention(q, q, q, backend="cuda")
    return str(error.value).partition("cannot run: ")[2]


def test_why_not_here():
    """Without a GPU the module loads, and says what is missing; tensors elsewhere are refused by device."""
    assert refused() == "it takes CUDA tensors, got one on cpu"
    if not _C.cuda:
        assert "IMF_CUDA=ON" in cuda.missing()
    elif ON_GPU:
        assert cuda.missing() is None
    else:
        assert re.search("driver|no CUDA", cuda.missing()) and cuda.missing() in info.report()


@pytest.mark.parametrize("capability", [(8, 9), (10, 0), (12, 0)])
def test_other_gpus_are_refused(capability, monkeypatch):
    monkeypatch.setattr(attention, "unfit", lambda *asked: None)
    monkeypatch.setattr(cuda, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert refused() == "it runs on compute capability 9.0, got {}.{}".format(*capability)


def test_one_name_serves_all_operations_of_a_network():
    for operation in OPERATIONS.values():
        table = [replace(b, unavailable=lambda asked: None) for b in operation.backends]
        names = {backend.name for backend in table}
        expected = next(name for name in ("cuda", "triton", "reference") if name in names)
        assert choose(operation.public, table, "cuda", ()).name == expected
        assert (expected == "cuda") == (operation.name == attention.NAME)


def test_what_the_kernel_cannot_read_is_copied(monkeypatch):
    """In graphs any layout may arrive, and tangents are no part of the choice."""
    got = []
    monkeypatch.setattr(_C, "attention_forward", lambda *arguments: got.extend(arguments))
    q, k, v, v_dot = torch.randn(4, 1, 2, 3, 8, dtype=torch.bfloat16)
    unaligned = torch.zeros(q.numel() + 1, dtype=q.dtype)[1:].view_as(q).copy_(q)
    odd = torch.zeros(1, 2, 3, 9, dtype=q.dtype)[..., :8].copy_(k)
    attention._CUDA.forward(unaligned, odd, v, None, k[:, :1].expand_as(k), v_dot, "the rest")
    inputs = [x for x in got[:6] if x is not None]
    assert [attention._cuda_layout(x) for x in inputs] == [None] * 5
    for x, wanted in zip(inputs, (q, k, v, k[:, :1].expand_as(k), v_dot), strict=True):
        assert torch.equal(x, wanted)
    assert inputs[2] is v and got[3] is None and got[6] == "the rest"


@pytest.mark.parametrize("width", [4, 12, 136])
def test_head_dims_are_refused_in_graphs_too(width, monkeypatch):
    monkeypatch.setattr(attention, "unfit", lambda *asked: None)
    q = torch.zeros(1, 1, 2, width, dtype=torch.bfloat16)

    def call(q):
        return ik.scaled_dot_product_attention(q, q, q, backend="cuda")

    with pytest.raises(Exception, match=f"multiples of 8 up to 128, got {width}"):
        torch.compile(call, backend="eager", fullgraph=True)(q)
    torch._dynamo.reset()

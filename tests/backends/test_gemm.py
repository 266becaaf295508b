"""The products of a linear layer: right on both sides of the border between libraries, and repeatable."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import imf_kernels as ik
from imf_kernels import Dual, info
from imf_kernels.backends import matmul
from tests.helpers.backends import threads

# From one number to 2²² multiply-adds and more, where another library may take over.
SHAPES = [(1, 1, 1), (5, 3, 2), (300, 24, 40), (1100, 33, 17), (511, 64, 128), (512, 64, 128), (513, 65, 129)]


def layer(rows, out, width, dtype=torch.float32):
    """x with its tangent, weight, bias and the cotangent of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, width), (rows, width), (out, width), (out,), (rows, out))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def results(x, x_dot, weight, bias, dy):
    x, weight, bias = (p.clone().requires_grad_() for p in (x, weight, bias))
    y = ik.linear(Dual(x, x_dot), weight, bias, backend="cpu")
    return [y.primal.detach(), y.tangent.detach(), *torch.autograd.grad(y.primal, (x, weight, bias), dy)]


@pytest.mark.parametrize(("rows", "out", "width"), SHAPES)
def test_every_product_is_right(rows, out, width):
    x, x_dot, w, b, dy = arguments = layer(rows, out, width)
    exact = [p.double() for p in arguments]
    x, x_dot, w, b, dy = exact
    wanted = [x @ w.t() + b, x_dot @ w.t(), dy @ w, dy.t() @ x, dy.sum(0)]
    for got, product in zip(results(*arguments), wanted, strict=True):
        torch.testing.assert_close(got.double(), product, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "out", "width"), [(0, 3, 4), (5, 0, 4), (5, 3, 0)])
def test_empty_layers(rows, out, width, dtype):
    x, _, weight, _, dy = layer(rows, out, width, dtype)
    y, y_dot, dx, dw, db = results(x, x, weight, torch.zeros(out, dtype=dtype), dy)
    assert y.shape == y_dot.shape == (rows, out) and not y.any() and not y_dot.any()
    assert dx.shape == x.shape and dw.shape == weight.shape and not dw.any() and db.shape == (out,)


def test_two_processes_choose_alike():
    """Every size at which the products are chosen, while the other process keeps the processor busy."""
    script = textwrap.dedent("""
        import hashlib, sys, torch
        sys.path.insert(0, sys.argv[1])
        from tests.backends.test_gemm import SHAPES, layer, results
        torch.set_num_threads(2)
        digest = hashlib.sha256()
        for shape in [*SHAPES, (1500, 300, 200), (200, 768, 768), (4000, 48, 16)]:
            for _ in range(20):
                for x in results(*layer(*shape)):
                    digest.update(x.numpy().tobytes())
        print(digest.hexdigest())
    """)
    command = [sys.executable, "-c", script, str(Path(__file__).parents[2])]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (process.communicate(timeout=120)[0] for process in running)
    assert len(first) == 65 and first == second


def test_a_repeated_call_gives_the_same_bits():
    arguments = layer(1500, 300, 200)
    with threads(2):
        first = results(*arguments)
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(first, results(*arguments), strict=True))


def test_info_names_the_library_of_products():
    assert f"large fp32 products {matmul.library()}" in info.report()

"""The choice of a matrix product: every candidate is right, choices are measured once, kept and restored."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import imf_kernels as ik
from imf_kernels import gemm


@pytest.fixture(autouse=True)
def no_choices_yet(monkeypatch):
    monkeypatch.setattr(gemm, "_choices", {})


@pytest.mark.parametrize("name", list(gemm._PRODUCTS))
@pytest.mark.parametrize(("rows", "out", "width"), [(1, 1, 1), (5, 3, 2), (300, 24, 40), (1100, 33, 17)])
def test_every_product_is_right(name, rows, out, width):
    """As the three products of a layer, with the transposed operands they get there."""
    x, w, dy, bias = (torch.randn(*s) for s in ((rows, width), (out, width), (rows, out), (out,)))
    run = gemm._PRODUCTS[name]
    for got, wanted in [
        (run(x, w, bias), x.double() @ w.double().t() + bias.double()),
        (run(dy, w.t(), None), dy.double() @ w.double()),
        (run(dy.t(), x.t(), None), dy.double().t() @ x.double()),
    ]:
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


def test_choices_do_not_depend_on_the_rows_that_came_first(monkeypatch):
    """A layer is measured once, for few and for many rows, whatever came; then nothing is added."""
    measured = []
    monkeypatch.setattr(gemm, "_fastest", lambda a, b: measured.append((a.shape, b.shape)) or "torch")
    w = torch.randn(6, 4, requires_grad=True)
    ik.linear(torch.randn(3, 4), w, backend="cpu").sum().backward()
    first = gemm.choices()
    assert len(first) == len(measured) == 6
    for rows in (1, 2000, 5000):
        ik.linear(torch.randn(rows, 4), w, backend="cpu").sum().backward()
    assert gemm.choices() == first
    ik.linear(torch.randn(3, 4), torch.randn(5, 4), backend="cpu")
    assert len(gemm.choices()) == 12


def test_saved_choices_are_used_instead_of_measuring(monkeypatch):
    x, w = torch.randn(8, 4), torch.randn(6, 4)
    ik.linear(x, w, backend="cpu")
    saved = gemm.choices()
    used = []

    def product(a, b, bias):
        used.append(a.shape)
        return a @ b.t()

    monkeypatch.setitem(gemm._PRODUCTS, "torch", product)
    monkeypatch.setattr(gemm, "_fastest", lambda a, b: pytest.fail("measured"))
    gemm.load_choices({key: "torch" for key in saved})
    torch.testing.assert_close(ik.linear(x, w, backend="cpu"), x @ w.t())
    assert used == [(8, 4)]
    gemm.choices().clear()
    assert gemm.choices()  # a copy


def test_choices_that_cannot_be_had_are_named():
    with pytest.raises(ValueError, match=r"gemm\.load_choices: 'forward few .*' was 'cublas', which cannot"):
        gemm.load_choices({"forward few 6x4 threads=1": "cublas"})
    assert gemm.choices() == {}


def test_without_a_rival_and_in_bf16_nothing_is_measured(monkeypatch):
    x, w = torch.randn(8, 4), torch.randn(6, 4)
    ik.linear(x.bfloat16(), w.bfloat16(), backend="cpu")
    monkeypatch.setattr(gemm, "_PRODUCTS", {"torch": gemm._torch})
    torch.testing.assert_close(ik.linear(x, w, backend="cpu"), x @ w.t())
    assert gemm.choices() == {}


def test_fast_dtype_is_one_of_the_two():
    assert gemm.fast_dtype() in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("name", list(gemm._PRODUCTS))
@pytest.mark.parametrize(("rows", "out", "width"), [(0, 3, 4), (5, 0, 4), (5, 3, 0)])
def test_empty_layers_whatever_was_chosen(monkeypatch, name, rows, out, width):
    monkeypatch.setattr(gemm, "_fastest", lambda a, b: name)
    x, w = torch.randn(rows, width, requires_grad=True), torch.randn(out, width, requires_grad=True)
    y = ik.linear(x, w, backend="cpu")
    y.sum().backward()
    assert y.shape == (rows, out) and not y.any() and x.grad.shape == x.shape and w.grad.shape == w.shape


def test_choices_that_a_checkpoint_lacks_are_measured(monkeypatch):
    x, w = torch.randn(8, 4), torch.randn(6, 4)
    ik.linear(x, w, backend="cpu")
    whole = gemm.choices()
    kept = {key: name for key, name in whole.items() if "many" in key}
    gemm.load_choices(kept)
    ik.linear(x, w, backend="cpu")
    assert gemm.choices().keys() == whole.keys() and kept.items() <= gemm.choices().items()


def test_python_threads_measure_a_layer_once(monkeypatch):
    measured = []

    def slowly(a, b):
        measured.append(a.shape)
        time.sleep(0.01)
        return "torch"

    monkeypatch.setattr(gemm, "_fastest", slowly)
    x, w = torch.randn(8, 4), torch.randn(6, 4)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: ik.linear(x, w, backend="cpu"), range(8)))
    assert len(measured) == 6

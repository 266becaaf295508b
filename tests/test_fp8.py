"""FP8 for what carries no gradient: rounding, products, where they are used, what they do to a step."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ON_GPU
from tiny_run import ALONE, arguments, config, perturbed

import imf_kernels as ik
from imf import start, train
from imf.methods import METHODS, objective
from imf.objective import Draws, Guidance
from imf_kernels import Dual, fp8, triton_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (ON_GPU or fp8.cpu_scales_rows()), reason="this PyTorch's FP8 on a CPU has one scale for all rows"
    ),
]

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
needs_triton = pytest.mark.skipif(triton_backend.missing() is not None, reason=str(triton_backend.missing()))


def randn(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def rows_of_every_kind(dtype):
    x = randn(8, 100, dtype=dtype)
    x[1] = 0
    x[2] *= 1e-6  # all are small: the scale follows
    x[3, 1:] *= 2.0**-12  # beside one large one they are denormal in e4m3
    x[4] = torch.linspace(-448, 448, 100, device=DEVICE)  # many lie between two numbers
    x[5, 7], x[6, 7] = float("inf"), float("nan")
    return x


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("strided", [False, True])
def test_the_kernel_rounds_as_pytorch_does(dtype, strided, monkeypatch):
    x = rows_of_every_kind(dtype)
    if strided:
        x = torch.cat([x, x + 1], dim=1)[:, :100]
    q, scale = fp8.quantized(x)
    monkeypatch.setattr(triton_backend, "unavailable", lambda tensors: "not here")
    wanted, wanted_scale = fp8.quantized(x)
    finite = [0, 1, 2, 3, 4, 7]
    assert torch.equal(scale[finite], wanted_scale[finite])
    assert torch.equal(q.float()[finite], wanted.float()[finite])
    for row in (5, 6):  # what is not finite stays visible
        assert not (q.float() * scale)[row].isfinite().all()


def test_rounding_keeps_to_half_a_unit_and_the_largest():
    x = randn(64, 48, dtype=torch.float32)
    q, scale = fp8.quantized(x)
    assert q.float().abs().amax(1).eq(fp8.LARGEST).all()
    unit = torch.maximum(x.abs() / 8, scale * 2.0**-9)  # a bit more than the distance of numbers there
    assert ((q.float() * scale - x).abs() <= unit / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_that_of_the_rounded_operands(bias):
    x, weight = randn(3, 7, 64), randn(32, 64, seed=1, dtype=torch.float32)
    b = randn(32, seed=2, dtype=torch.float32) if bias else None
    y = fp8.product(x, weight, b)
    (q, s), (p, r) = fp8.quantized(x.flatten(0, 1)), fp8.quantized(weight.bfloat16())
    exact = (q.double() * s.double()) @ (p.double() * r.double()).t() + (b.double() if bias else 0)
    assert y.shape == (3, 7, 32) and y.dtype == torch.bfloat16
    error = (y.double().flatten(0, 1) - exact).norm() / exact.norm()
    assert error < 2 * 2.0**-8  # rounded to bfloat16, with a bias twice
    plain = x.double().flatten(0, 1) @ weight.double().t() + (b.double() if bias else 0)
    assert 0.01 < (y.double().flatten(0, 1) - plain).norm() / plain.norm() < 0.06  # 3 mantissa bits


def test_tangents_alone_or_everything():
    x, x_dot, weight = randn(5, 32), randn(3, 32, seed=1), randn(16, 32, seed=2, dtype=torch.float32)
    weight.requires_grad_()
    exact = ik.linear(Dual(x, x_dot), weight)
    with ik.fp8_products("tangents"):
        y = ik.linear(Dual(x, x_dot), weight)
    assert torch.equal(y.primal, exact.primal) and y.primal.requires_grad
    assert torch.equal(y.tangent_rows, fp8.product(x_dot, weight))
    with ik.fp8_products("everything"), torch.no_grad():
        everything = ik.linear(Dual(x, x_dot), weight)
    assert torch.equal(everything.primal, fp8.product(x, weight))
    assert torch.equal(everything.tangent_rows, y.tangent_rows)
    y.primal.sum().backward()
    gradient, weight.grad = weight.grad, None
    exact.primal.sum().backward()
    assert torch.equal(gradient, weight.grad)
    assert torch.equal(ik.linear(Dual(x, x_dot), weight).tangent, exact.tangent)  # and nothing stays


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (randn(5, 32, dtype=torch.float32), randn(16, 32, dtype=torch.float32)),
        (randn(5, 24), randn(16, 24)),
        (randn(5, 32), randn(15, 32)),
        (randn(0, 32), randn(16, 32)),
    ],
)
def test_other_operands_are_multiplied_as_ever(x, weight):
    with ik.fp8_products("everything"):
        y = ik.linear(Dual(x, x), weight)
    exact = ik.linear(Dual(x, x), weight)
    assert torch.equal(y.primal, exact.primal) and torch.equal(y.tangent, exact.tangent)


def test_what_would_be_wrong_is_refused():
    with pytest.raises(ValueError, match="where must be 'tangents' or 'everything', got 'weights'"):
        ik.fp8_products("weights").__enter__()
    weight = randn(16, 32).requires_grad_()
    with ik.fp8_products("everything"), pytest.raises(RuntimeError, match="nothing may require a gradient"):
        ik.linear(randn(5, 32), weight)


@pytest.mark.parametrize("method", METHODS)
def test_the_objective_keeps_its_primal(method):
    model = perturbed(method).to(DEVICE)
    model.compute_dtype = torch.bfloat16
    x, y = randn(16, 1, 8, 8, dtype=torch.float32), torch.arange(16, device=DEVICE) % 10
    draws = Draws.sample(x, seed=0, step=0)
    exact, rounded = (objective(method, Guidance(), fp8=on)(model, x, y, draws) for on in (False, True))
    assert torch.equal(exact.u, rounded.u) and (exact.v is None or torch.equal(exact.v, rounded.v))
    for name in ("du_dt", "v_g"):
        error = (getattr(rounded, name) - getattr(exact, name)).norm() / getattr(exact, name).norm()
        assert 1e-4 < error < 0.2, (name, error)
    rounded.loss.backward()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp32"}, r"precision .* must be bf16 with fp8, got 'fp32'"),
        ({"precision": "bf16", "compile": True}, r"compile .* must be off with fp8, got True"),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        config(fp8=True, **changes)


def test_training_with_it(tmp_path):
    assert train.main(arguments(runs=tmp_path, precision="bf16", fp8=True, steps=2, device=DEVICE.type)) == 0
    c = config(precision="bf16", fp8=True)
    assert start.initial_state(c, "bf16", ALONE).model.compute_dtype == torch.bfloat16


@needs_triton
@pytest.mark.parametrize("arch", [90, 100])
def test_the_kernel_compiles_without_spills(arch):
    code = f"""
import json, torch, compile_kernels
from imf_kernels import fp8, triton_backend
result = []
with torch.device("meta"), triton_backend.ahead_of_time("cuda", {arch}, 32) as compiled:
    for width in (768, 1024, 2048, 2736):
        fp8.quantized(torch.empty(276, width, dtype=torch.bfloat16))
    kernels = list(compiled)
print(json.dumps([compile_kernels.resources(kernel, "cuda:{arch}") for kernel in kernels]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.path.dirname(__file__)
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    kernels = json.loads(run.stdout)
    assert len(kernels) == 4 and all(kernel["stack"] <= 8 for kernel in kernels), kernels

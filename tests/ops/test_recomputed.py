"""Operations that backward computes again: what they give, and what they keep."""

import pytest
import torch

import imf_kernels as ik
from imf_kernels import Dual
from imf_kernels.ops.elementwise import GELU, GELU_TANH, SILU
from imf_kernels.ops.layer_norm import LAYER_NORM
from imf_kernels.ops.layer_norm_modulate import LAYER_NORM_MODULATE
from imf_kernels.ops.recomputed import recomputed
from imf_kernels.ops.swiglu import SWIGLU

# The operation, shapes of its inputs, other arguments, and the public function.
CASES = {
    "silu": (SILU.operation, [(2, 5, 16)], (), ik.silu),
    "gelu": (GELU.operation, [(2, 5, 16)], (), ik.gelu),
    "gelu, tanh": (GELU_TANH.operation, [(2, 5, 16)], (), lambda x: ik.gelu(x, approximate="tanh")),
    "swiglu": (SWIGLU, [(2, 5, 32)], (), ik.swiglu),
    "modulated norm": (
        *(LAYER_NORM_MODULATE, [(2, 5, 16), (2, 16), (2, 16)], (1.0, 1e-6, None)),
        lambda x, shift, scale: ik.layer_norm_modulate(x, shift, scale, 1e-6),
    ),
    "norm": (
        *(LAYER_NORM, [(2, 5, 16), (16,), (16,)], (0.0, 1e-5, None)),
        lambda x, bias, weight: ik.layer_norm(x, [16], weight, bias, 1e-5),
    ),
}
LAYERS = {"layer": (True, True), "layer without bias": (True, False), "alone": (False, False)}


def made(case, layer, dtype=torch.float32):
    """Inputs, tangents of those that may have one, weight and bias."""
    torch.manual_seed(0)
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in CASES[case][1]]
    moving = inputs[:1] if case == "norm" else inputs
    tangents = [torch.randn_like(x) for x in moving]
    has_weight, has_bias = LAYERS[layer]
    weight = torch.randn(6, 16).to(dtype).requires_grad_() if has_weight else None
    return inputs, tangents, weight, torch.randn(6).to(dtype).requires_grad_() if has_bias else None


def functions(case, weight, bias):
    operation, _, others, public = CASES[case]
    plain = public if weight is None else (lambda *inputs: ik.linear(public(*inputs), weight, bias))
    return (lambda *inputs: recomputed(operation, inputs, others, weight, bias)), plain


def results(function, inputs, tangents, way, parameters):
    y_dot, rest = None, inputs[len(tangents) :]
    if way == "tensors":
        y = function(*inputs)
    elif way == "jvp":
        y, y_dot = ik.jvp(lambda *moving: function(*moving, *rest), (*inputs[: len(tangents)],), (*tangents,))
    else:
        rows = {"Duals": 2, "tangents of some samples": 1}[way]
        dual = function(*map(Dual, inputs, [t[-rows:] for t in tangents]), *rest)
        y, y_dot = dual.primal, dual.tangent
    y.square().sum().backward()
    found = [y.detach(), *(x.grad for x in (*inputs, *parameters) if x is not None)]
    for x in (*inputs, *parameters):
        if x is not None:
            x.grad = None
    return found if y_dot is None else [*found, y_dot.detach()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("way", ["tensors", "Duals", "tangents of some samples", "jvp"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_operation_and_the_layer(case, way, layer, dtype):
    inputs, tangents, weight, bias = made(case, layer, dtype)
    ours, plain = (results(f, inputs, tangents, way, (weight, bias)) for f in functions(case, weight, bias))
    for i, (y, z) in enumerate(zip(ours, plain, strict=True)):
        assert torch.equal(y, z), i


@pytest.mark.parametrize("case", CASES)
def test_the_result_is_not_kept(case):
    inputs, tangents, weight, bias = made(case, "layer")
    kept = []

    def keep(x):
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        functions(case, weight, bias)[0](*map(Dual, inputs, tangents), *inputs[len(tangents) :])
    allowed = {x.data_ptr() for x in (*inputs, weight, bias)}
    assert kept and {x.data_ptr() for x in kept} <= allowed


def test_a_view_is_kept_as_it_is():
    operation, _, others, _ = CASES["norm"]
    projection = torch.randn(2, 5, 3, 16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        recomputed(operation, (projection.unbind(2)[1], None, None), others)
    assert [x.untyped_storage().data_ptr() for x in kept] == [projection.untyped_storage().data_ptr()]


@pytest.mark.parametrize("which", [0, 1], ids=["input", "weight"])
def test_a_write_into_what_is_kept_raises(which):
    inputs, tangents, weight, bias = made("gelu", "layer")
    x = inputs[0] * 1
    y = functions("gelu", weight, bias)[0](Dual(x, tangents[0])).primal
    with torch.no_grad():
        (x, weight)[which].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("case", CASES)
def test_gradients_through_the_tangent(case):
    inputs, tangents, weight, bias = made(case, "layer")
    found = []
    for function in functions(case, weight, bias):
        duals = [Dual(x, t, differentiable=True) for x, t in zip(inputs, tangents, strict=False)]
        y = function(*duals, *inputs[len(duals) :])
        found.append(torch.autograd.grad((y.primal + y.tangent).square().sum(), [*inputs, weight]))
    for ours, plain in zip(*found, strict=True):
        assert torch.equal(ours, plain)


def test_second_derivatives_raise():
    inputs, tangents, weight, bias = made("gelu", "layer")
    y = functions("gelu", weight, bias)[0](Dual(inputs[0], tangents[0])).primal
    with pytest.raises(RuntimeError, match="create_graph=True asks for second derivatives"):
        torch.autograd.grad(y.sum(), inputs, create_graph=True)


def test_torch_func_and_the_reference():
    inputs, tangents, weight, bias = made("modulated norm", "layer")
    ours, plain = functions("modulated norm", weight, bias)
    primals = tuple(x.detach() for x in inputs)
    for y, z in zip(*(torch.func.jvp(f, primals, tuple(tangents)) for f in (ours, plain)), strict=True):
        assert torch.equal(y, z)
    ours, plain = (
        torch.func.grad(lambda *xs, f=f: f(*xs).square().sum(), (0, 1))(*primals) for f in (ours, plain)
    )
    for y, z in zip(ours, plain, strict=True):
        assert torch.equal(y, z)
    with ik.use_backend("reference"):
        ours, plain = (ik.jvp(f, primals, tuple(tangents)) for f in functions("modulated norm", weight, bias))
    for y, z in zip(ours, plain, strict=True):
        assert torch.equal(y.detach(), z.detach())


def test_backward_computes_on_the_backend_of_the_forward(monkeypatch):
    inputs, tangents, weight, bias = made("gelu", "layer")
    asked, decided = [], GELU.operation.backend_for

    def backend_for(backend, *arguments, **options):
        asked.append(backend)
        return decided(backend, *arguments, **options)

    monkeypatch.setattr(GELU.operation, "backend_for", backend_for)
    monkeypatch.setattr(GELU.operation, "choices", {})
    with ik.use_backend("cpu"):
        y = functions("gelu", weight, bias)[0](Dual(inputs[0], tangents[0])).primal
    y.sum().backward()
    assert asked == ["cpu", "cpu"]

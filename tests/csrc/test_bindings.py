"""What the kernels' functions check before a kernel reads memory."""

import pytest
import torch

from imf_kernels import _C
from imf_kernels.backends.operators import OPERATIONS
from imf_kernels.dual import Dual
from imf_kernels.testing.cases import SMALL
from tests.helpers import stub


def rows(*shape):
    return torch.randn(shape)


def silu(x=(4, 3, 8), x_dot=(2, 3, 8), y_dot=(2, 3, 8)):
    _C.silu_forward(rows(*x), rows(*x_dot), rows(*x), rows(*y_dot))


def layer_norm(x_dot=(2, 3, 8), scale_dot=(2, 8), y_dot=(2, 3, 8)):
    x, scale = rows(4, 3, 8), rows(4, 8)
    given = scale, rows(*scale_dot), None, None, rows(4, 3, 8), rows(*y_dot)
    _C.layer_norm_forward(x, rows(*x_dot), *given, rows(3, 12), 1.0, 1e-6)


def attention(q_dot=(2, 2, 5, 8), k_dot=(2, 2, 6, 8), v_dot=(2, 2, 6, 4), out_dot=(2, 2, 5, 4)):
    q, k, v = rows(3, 2, 5, 8), rows(3, 2, 6, 8), rows(3, 2, 6, 4)
    tangents = (rows(*shape) for shape in (q_dot, k_dot, v_dot))
    _C.attention_forward(
        q, k, v, *tangents, None, rows(3, 2, 5, 4), rows(*out_dot), rows(3, 2, 5), 1.0, False
    )


def test_tangents_of_some_samples():
    silu()
    silu((), (), ())
    silu((5,), (3,), (3,))
    layer_norm()
    attention()


@pytest.mark.parametrize(
    ("call", "shapes", "message"),
    [
        (silu, {"x_dot": (2, 3, 7)}, r"x_dot must have the shape of x or fewer samples, got \[2, 3, 7\]"),
        (silu, {"x_dot": (5, 3, 8)}, "x_dot must have the shape of x or fewer samples"),
        (silu, {"x_dot": (6, 8)}, "x_dot must have the shape of x"),
        (silu, {"y_dot": (1, 3, 8)}, r"y_dot must have the samples of x_dot, got \[1, 3, 8\]"),
        (silu, {"x": (5,), "x_dot": (6,), "y_dot": (6,)}, "x_dot must have the shape of x or fewer samples"),
        (layer_norm, {"scale_dot": (1, 8)}, "scale_dot must have the samples of x_dot"),
        (layer_norm, {"scale_dot": (2, 9)}, "scale_dot must have the shape of scale"),
        (layer_norm, {"y_dot": (3, 3, 8)}, "y_dot must have the samples of x_dot"),
        (attention, {"k_dot": (2, 1, 6, 8)}, "k_dot must have the shape of k"),
        (attention, {"v_dot": (1, 2, 6, 4)}, "v_dot must have the samples of q_dot"),
        (attention, {"out_dot": (1, 2, 5, 4)}, "out_dot must have the samples of q_dot"),
    ],
)
def test_tangents_that_do_not_fit(call, shapes, message):
    with pytest.raises(ValueError, match=f"{call.__name__}_forward: {message}"):
        call(**shapes)


def test_tangents_that_are_given_in_part():
    with pytest.raises(ValueError, match="silu_forward: y_dot must be given with x_dot"):
        _C.silu_forward(rows(4, 8), rows(4, 8), rows(4, 8), None)
    with pytest.raises(ValueError, match="silu_forward: y_dot is given without a tangent"):
        _C.silu_forward(rows(4, 8), None, rows(4, 8), rows(4, 8))


def test_groups_that_are_none():
    x, none = rows(4, 8), rows(0, 8)
    with pytest.raises(
        ValueError, match="gated_residual_forward: rows must be those of whole groups, got 4 of 0"
    ):
        _C.gated_residual_forward(x, None, x, None, none, None, rows(4, 8), None)
    with pytest.raises(ValueError, match="layer_norm_backward: rows must be those of whole groups"):
        _C.layer_norm_backward(x, x, None, rows(12), rows(4, 8), rows(1, 1, 2, 8), none, 1.0)


def copied(arguments):
    """Copies in the same memory order."""
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]


@pytest.fixture(scope="module")
def calls():
    """The call of each compiled function with most tensors and sizes above 1 that operations make."""
    found = {}

    def told(arguments):
        shapes = [x.shape for x in arguments if isinstance(x, torch.Tensor)]
        return len(shapes), min(shapes[0], default=0) > 1

    def recording(name, function):
        def record(*arguments):
            if name not in found or told(arguments) > told(found[name]):
                found[name] = copied(arguments)
            return function(*arguments)

        return record

    with pytest.MonkeyPatch.context() as patch:
        for operation in OPERATIONS.values():
            for backend in operation.backends:
                for part, function in list(vars(backend.kernels or object).items()):
                    name = f"{operation.kernels}_{part}"
                    if backend.name == "cpu" and name in _C.schemas:
                        patch.setattr(backend.kernels, part, recording(name, function))
        for case in SMALL:
            if "cpu" in case.refused_by or torch.float32 not in case.dtypes or case.batch < 2:
                continue
            for differentiable in (False, True):
                primals, tangents = case.draw(torch.Generator().manual_seed(0), torch.float32)
                inputs = {
                    name: Dual(
                        x.requires_grad_(name in case.differentiable),
                        tangents[name].requires_grad_(differentiable),
                        differentiable=differentiable,
                    )
                    if name in tangents
                    else x.requires_grad_(name in case.differentiable)
                    for name, x in primals.items()
                }
                results = case.run(inputs, "cpu")
                parts = [y.primal for y in results if isinstance(y, Dual)]
                parts += [y.tangent for y in results if isinstance(y, Dual) and differentiable]
                sum(part.sum() for part in parts).backward()
    return found


def misfits(x):
    """The same tensor of other sizes and of another dtype."""
    for dim in {0, x.dim() - 1}:
        yield f"less of dimension {dim}", x.narrow(dim, 0, x.shape[dim] - 1).clone()
        yield f"more of dimension {dim}", torch.cat([x, x.narrow(dim, 0, 1)], dim)
    yield "double", x.double()
    if x.dim() > 1:
        yield "nothing", x[:0].clone()


@pytest.mark.parametrize("function", _C.schemas)
def test_tensors_that_do_not_fit(function, calls):
    """One of another size or dtype than the others need is refused, before a kernel reads memory."""
    names = [parameter.split(":")[0] for parameter in stub.parameters(_C.schemas[function])]
    arguments = calls[function]
    getattr(_C, function)(*copied(arguments))
    for i, (name, x) in enumerate(zip(names, arguments, strict=True)):
        if not isinstance(x, torch.Tensor) or (name == "partial" and not x.numel()):
            continue
        for what, misfit in misfits(x):
            changed = copied(arguments)
            changed[i] = misfit
            with pytest.raises(ValueError, match=f"{function}: "):
                getattr(_C, function)(*changed)
                pytest.fail(f"{function} took {name} with {what}: {list(misfit.shape)}")

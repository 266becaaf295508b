"""What the kernels' functions check before a kernel reads memory."""

import pytest
import torch

from imf_kernels import _C


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

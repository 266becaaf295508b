"""In-place methods behind every call that `jvp` serves: right as PyTorch's own are, gradients too, or
refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

import imf_kernels as ik

ROWS, WIDTH = 6, 8


def _weight(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()


W = _weight(WIDTH, WIDTH)


def _like(x, *parameters):
    return [p.to(x.dtype) for p in parameters]


SERVED = {
    "linear": lambda x: F.linear(x, *_like(x, W, W[0])),
    "linear of three dimensions": lambda x: F.linear(x.view(2, 3, WIDTH), *_like(x, W)).view(ROWS, WIDTH),
    "layer_norm": lambda x: F.layer_norm(x, (WIDTH,), *_like(x, W[0], W[1])),
    "layer_norm over two dimensions": lambda x: F.layer_norm(x, (ROWS, WIDTH)),
    "rms_norm": lambda x: F.rms_norm(x, (WIDTH,), *_like(x, W[0]), 1e-6),
    "group_norm": lambda x: F.group_norm(x, 2, *_like(x, W[0], W[1])),
    "batch_norm": lambda x: F.batch_norm(x, None, None, *_like(x, W[0], W[1]), training=True),
    "convolution": lambda x: F.conv1d(x, *_like(x, W[:ROWS, :ROWS, None], W[0, :ROWS])),
    "convolution of a batch": lambda x: F.conv2d(
        x.view(1, 1, ROWS, WIDTH), *_like(x, W[:1, :1, None, None])
    ).view(ROWS, WIDTH),
    "matmul": lambda x: x @ W.to(x.dtype),
    "addmm": lambda x: torch.addmm(*_like(x, W[0]), x, *_like(x, W)),
    "einsum": lambda x: torch.einsum("ld,de->el", x, *_like(x, W)).t(),
    "softmax": lambda x: F.softmax(x, -1),
    "log_softmax": lambda x: x.log_softmax(0),
    "normalize": F.normalize,
    "silu": F.silu,
    "gelu": F.gelu,
    "attention": lambda x: F.scaled_dot_product_attention(*[x.view(1, 2, 3, WIDTH)] * 3).view(ROWS, WIDTH),
    "attention of three dimensions": lambda x: F.scaled_dot_product_attention(
        *[x.view(2, 3, WIDTH)] * 3
    ).view(ROWS, WIDTH),
    "checkpoint": lambda x: ik.checkpoint(lambda x: F.linear(x, *_like(x, W)).sin(), x),
    "checkpoint of its input": lambda x: ik.checkpoint(lambda x: x.view(ROWS, WIDTH), x * 1.0),
}

X = _weight(ROWS, WIDTH)
MASK, INDEX = X > 0.3, torch.tensor([0, 2, 5])
# How methods are called that want more than nothing, or something else.
ARGUMENTS = {
    **dict.fromkeys(
        ("add_", "sub_", "subtract_", "mul_", "multiply_", "div_", "divide_", "true_divide_"), (X + 3,)
    ),
    **dict.fromkeys(("floor_divide_", "remainder_", "fmod_", "pow_", "hypot_", "atan2_", "arctan2_"), (2.5,)),
    **dict.fromkeys(("hypot_", "atan2_", "arctan2_", "copysign_", "nextafter_", "xlogy_"), (X + 3,)),
    **dict.fromkeys(
        ("eq_", "ne_", "not_equal_", "lt_", "less_", "le_", "less_equal_", "gt_", "greater_"), (X,)
    ),
    **dict.fromkeys(("ge_", "greater_equal_"), (X,)),
    **dict.fromkeys(("addcmul_", "addcdiv_"), (X, X + 3)),
    **dict.fromkeys(("addmm_", "sspaddmm_"), (_weight(ROWS, 3), _weight(3, WIDTH))),
    **dict.fromkeys(("addbmm_",), (_weight(2, ROWS, 3), _weight(2, 3, WIDTH))),
    **dict.fromkeys(("clamp_", "clip_"), (-0.5, 0.5)),
    **dict.fromkeys(("clamp_min_", "clamp_max_", "fill_", "polygamma_", "bernoulli_", "hardshrink_"), (0.5,)),
    **dict.fromkeys(("transpose_", "swapaxes_", "swapdims_"), (0, 1)),
    **dict.fromkeys(("index_add_", "index_copy_"), (0, INDEX, _weight(3, WIDTH))),
    **dict.fromkeys(("cumsum_", "cumprod_", "unsqueeze_"), (0,)),
    **dict.fromkeys(("scatter_", "scatter_add_"), (0, INDEX.view(3, 1).expand(3, WIDTH), _weight(3, WIDTH))),
    "addmv_": (_weight(ROWS, 3), _weight(3)),
    "addr_": (_weight(ROWS), _weight(WIDTH)),
    "as_strided_": ((ROWS, WIDTH), (WIDTH, 1)),
    "baddbmm_": (_weight(2, ROWS, 3), _weight(2, 3, WIDTH)),
    "copy_": (X,),
    "dequantize": (),
    "fill_diagonal_": (0.5,),
    "float_power_": (2.0,),
    "heaviside_": (X,),
    "index_fill_": (0, INDEX, 0.5),
    "index_put_": ((INDEX,), _weight(3, WIDTH)),
    "index_reduce_": (0, INDEX, _weight(3, WIDTH), "mean"),
    "ldexp_": (INDEX[0],),
    "lerp_": (X, 0.3),
    "logit_": (1e-3,),
    "map_": (X, lambda a, b: a),
    "masked_fill_": (MASK, 0.5),
    "masked_scatter_": (MASK, X),
    "mvlgamma_": (2,),
    "put_": (INDEX, _weight(3)),
    "renorm_": (2, 0, 0.7),
    "resize_": (ROWS, WIDTH),
    "resize_as_": (X,),
    "scatter_reduce_": (0, INDEX.view(3, 1).expand(3, WIDTH), _weight(3, WIDTH), "sum"),
    "set_": (X,),
    "squeeze_": (),
    "swapaxes_": (0, 1),
    "where_": (),
}
# What they give is drawn at random, or no value of the tensor's.
LEFT_OUT = (
    "requires_grad_",
    "retain_grad_",
    "share_memory_",
    "apply_",
    "map_",
    "map2_",
    "sparse_resize_",
    "detach_",
)
METHODS = [n for n in dir(Tensor) if n.endswith("_") and not n.startswith("_") and n not in LEFT_OUT]


def _results(jvp, served, method, dtype=torch.float32):
    """Primal, tangent and gradient; or the error."""
    x = X.clone().to(dtype).requires_grad_()
    arguments = pytree.tree_map_only(Tensor, _of(dtype), ARGUMENTS.get(method, ()))

    def func(x):
        torch.manual_seed(0)
        y = served(x)
        getattr(y, method)(*arguments)
        return y * y  # so that gradients depend on what the method left

    try:
        y, y_dot = jvp(func, (x,), (X.to(dtype).flip(0),))
        y.sum().backward()
        return y.detach(), y_dot.detach(), x.grad
    except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        return error


def _of(dtype):
    return lambda t: t.to(dtype) if t.is_floating_point() else t


def _plain_checkpoint(function, x):
    return function(x)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("call", SERVED)
def test_in_place(call, method, monkeypatch):
    got = _results(ik.jvp, SERVED[call], method)
    monkeypatch.setattr(ik, "checkpoint", _plain_checkpoint)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        theirs = _results(torch.func.jvp, SERVED[call], method)
        exact = _results(torch.func.jvp, SERVED[call], method, torch.float64)
    if isinstance(theirs, Exception) or isinstance(got, NotImplementedError):
        assert isinstance(got, (RuntimeError, NotImplementedError, TypeError, AttributeError)), theirs
        return
    assert not isinstance(got, Exception), got
    if (call, method) == ("group_norm", "sgn_"):  # torch.func.jvp's gradient is memory that nothing filled
        assert not got[1].any() and not got[2].any()
        return
    for ours, theirs_, wanted in zip(got, theirs, exact, strict=True):
        here = wanted.isfinite()
        assert torch.equal(ours.isfinite(), here)
        error, allowed, size = (_largest(y[here]) for y in (ours - wanted, theirs_ - wanted, wanted))
        assert error <= 4 * allowed + 64 * 2**-24 * size  # methods amplify the last roundings before them


def _largest(x):
    return x.abs().max().item() if x.numel() else 0.0

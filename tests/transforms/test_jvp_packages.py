"""flash-attn's and xformers' functions inside `jvp`: results by the error rule, and what is refused.

Run on the packages where they and a GPU are, elsewhere on stand-ins of the same structure.
"""

import threading

import pytest
import torch

import imf_kernels as ik
from imf_kernels.testing import errors
from tests.helpers import attention_packages as twins

DTYPES = [torch.float32, torch.bfloat16]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [3, 0, 5, 1], [4, 2, 3, 0]


@pytest.fixture(scope="module")
def flash():
    with twins.loaded("flash_attn") as package:
        yield package


@pytest.fixture(scope="module")
def xformers():
    with twins.loaded("xformers") as package:
        yield package


def drawn(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator).to(dtype).to(DEVICE) for shape in shapes)


def check(served, formula, primals, tangents):
    """Compares primal, tangent and gradients of `served` inside jvp with the formula's in float64."""

    def results(function, jvp, dtype):
        xs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in primals]
        y, y_dot = jvp(function, tuple(xs), tuple(t.to(dtype or t.dtype) for t in tangents))
        y.backward(drawn(y.shape, seed=9)[0].to(y.dtype))
        return [y.detach(), y_dot.detach(), *(x.grad for x in xs)]

    exact, fp32 = (results(formula, torch.func.jvp, dtype) for dtype in (torch.float64, torch.float32))
    for i, (got, true, near) in enumerate(zip(results(served, ik.jvp, None), exact, fp32, strict=True)):
        assert got.dtype == primals[0].dtype
        # A backward rounds softmax times its cotangent to the dtype.
        errors.check(f"result {i}", got, true, errors.Yardstick.of(near, true), None)


def cumulative(lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)


def dense(causal):
    def formula(q, k, v):
        bias = twins.causal_bias(q.shape[1], k.shape[1], k.shape[1] - q.shape[1], q) if causal else None
        return twins.plain(q, k, v, bias, 0.3)

    return formula


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("queries", "keys", "heads"), [(5, 5, 4), (3, 7, 2), (7, 3, 4)], ids=["square", "wide", "tall"]
)
def test_flash_attn_func(flash, dtype, causal, queries, keys, heads):
    shapes = (2, queries, 4, 16), (2, keys, heads, 16), (2, keys, heads, 16)
    primals, tangents = drawn(*shapes, dtype=dtype), drawn(*shapes, dtype=dtype, seed=1)

    def served(q, k, v):
        return flash.flash_attn_func(q, k, v, softmax_scale=0.3, causal=causal, deterministic=True)

    check(served, dense(causal), primals, tangents)


@pytest.mark.parametrize("varlen", [False, True], ids=["batch", "varlen"])
@pytest.mark.parametrize("packed", ["qkv", "kv"])
def test_packed(flash, packed, varlen):
    lead, dim = ((sum(LENGTHS[0]),), 1) if varlen else ((2, 5), 2)
    shapes = [(*lead, 3, 2, 8)] if packed == "qkv" else [(*lead, 2, 8), (*lead, 2, 2, 8)]
    primals, tangents = drawn(*shapes), drawn(*shapes, seed=1)
    cu, named = cumulative(LENGTHS[0]), {"causal": True, "softmax_scale": 0.3}

    def served(*x):
        if packed == "qkv":
            name, lengths = "qkvpacked", [cu, 5]
        else:
            name, lengths = "kvpacked", [cu, cu, 5, 5]
        name = f"varlen_{name}" if varlen else name
        return getattr(flash, f"flash_attn_{name}_func")(*x, *(lengths if varlen else ()), **named)

    def formula(*x):
        q, k, v = x[0].unbind(dim) if packed == "qkv" else (x[0], *x[1].unbind(dim))
        return twins.varlen(q, k, v, cu, cu, True, 0.3) if varlen else dense(True)(q, k, v)

    check(served, formula, primals, tangents)


@pytest.mark.parametrize(
    ("lengths", "causal", "compiled"),
    [
        (LENGTHS, False, False),
        (LENGTHS, True, False),
        (([4, 4], [3, 3]), True, False),
        pytest.param(LENGTHS, True, True, marks=pytest.mark.slow),
    ],
    ids=["full", "causal", "equal lengths", "compiled"],
)
def test_flash_attn_varlen_func(flash, lengths, causal, compiled):
    cu_q, cu_k = map(cumulative, lengths)
    shapes = (sum(lengths[0]), 4, 8), (sum(lengths[1]), 2, 8), (sum(lengths[1]), 2, 8)
    primals, tangents = drawn(*shapes), drawn(*shapes, seed=1)

    def served(q, k, v):
        return flash.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 5, 4, causal=causal, softmax_scale=0.3)

    def formula(q, k, v):
        return twins.varlen(q, k, v, cu_q, cu_k, causal, 0.3)

    if not compiled:
        check(served, formula, primals, tangents)
        return
    step = torch.compile(lambda *x: ik.jvp(served, x, tangents), fullgraph=True, backend="aot_eager")
    exact = torch.func.jvp(formula, *(tuple(x.double() for x in xs) for xs in (primals, tangents)))
    fp32 = torch.func.jvp(formula, primals, tangents)
    for got, true, near in zip(step(*primals), exact, fp32, strict=True):
        errors.check("compiled", got, true, errors.Yardstick.of(near, true))


def biases(queries, keys, heads, groups=()):
    bias, causal = drawn((2, *groups, heads, queries, keys), seed=5)[0], twins.LowerTriangularMask
    return {
        "none": None,
        "tensor": bias,
        "causal": causal(),
        "bottom right": twins.LowerTriangularFromBottomRightMask(),
        "causal with a tensor": twins.LowerTriangularMaskWithTensorBias(bias),
    }


@pytest.mark.parametrize("kind", biases(5, 7, 2))
@pytest.mark.parametrize("groups", [(), (3,)], ids=["BMHK", "BMGHK"])
def test_memory_efficient_attention(xformers, kind, groups):
    q, k, v = (2, 5, *groups, 2, 8), (2, 7, *groups, 2, 8), (2, 7, *groups, 2, 4)
    primals, tangents = drawn(q, k, v), drawn(q, k, v, seed=1)
    bias = biases(5, 7, 2, groups)[kind]
    if groups and kind == "causal with a tensor":
        bias._bias = bias._bias.flatten(1, 2).unflatten(1, (3, 2))

    def formula(q, k, v):
        dense = bias
        if kind == "causal with a tensor":
            dense = bias._bias + twins.causal_bias(5, 7, 0, bias._bias)
        dense = dense.to(q.dtype) if isinstance(dense, torch.Tensor) else dense
        return twins.efficient(twins.Inputs(q, k, v, dense, scale=0.3))

    def served(q, k, v):
        return xformers.memory_efficient_attention(q, k, v, attn_bias=bias, scale=0.3)

    check(served, formula, primals, tangents)


@pytest.mark.parametrize(
    "mask",
    ["BlockDiagonalMask", "BlockDiagonalCausalMask", "BlockDiagonalCausalFromBottomRightMask"],
)
def test_block_diagonal_masks(xformers, mask):
    bias = getattr(twins, mask)(*LENGTHS)
    shapes = (1, sum(LENGTHS[0]), 2, 8), (1, sum(LENGTHS[1]), 2, 8), (1, sum(LENGTHS[1]), 2, 8)
    check(
        lambda q, k, v: xformers.memory_efficient_attention(q, k, v, bias),
        lambda q, k, v: twins.efficient(twins.Inputs(q, k, v, bias)),
        drawn(*shapes),
        drawn(*shapes, seed=1),
    )


def test_three_dimensions(xformers):
    shapes = (2, 5, 8), (2, 7, 8), (2, 7, 8)
    (bias,) = drawn((2, 5, 7), seed=5)
    check(
        lambda q, k, v: xformers.memory_efficient_attention(q, k, v, bias),
        lambda q, k, v: twins.efficient(twins.Inputs(q, k, v, bias.to(q.dtype))),
        drawn(*shapes),
        drawn(*shapes, seed=1),
    )


SHAPE = (1, 4, 2, 8)
WRONG = {
    "dropout": ({"dropout_p": 0.1}, "dropout_p=0.1 is dropout of the weights; 0.0 is served"),
    "window": ({"window_size": (2, 0)}, r"window_size=\(2, 0\) is a sliding window"),
    "softcap": ({"softcap": 30.0}, "softcap=30.0 is soft-capped logits"),
    "alibi": ({"alibi_slopes": torch.ones(2)}, "alibi_slopes=tensor.* is ALiBi"),
    "weights": ({"return_attn_probs": True}, "return_softmax=True is return_attn_probs=True"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_flash_attn_refuses(flash, case):
    named, message = WRONG[case]
    x = drawn(SHAPE)
    with pytest.raises(NotImplementedError, match=f"jvp: flash_attn_func: {message}"):
        ik.jvp(lambda x: flash.flash_attn_func(x, x, x, **named), x, x)


def test_lengths_that_do_not_end_at_the_tokens(flash):
    x, cu = drawn((9, 2, 8)), cumulative([3, 5])
    with pytest.raises(ValueError, match=r"queries must .* end at the number of tokens, 9, got \[0, 3, 8\]"):
        ik.jvp(lambda x: flash.flash_attn_varlen_func(x, x, x, cu, cu, 5, 5), x, x)


def test_the_cache(flash):
    x = drawn(SHAPE)
    ik.jvp(torch.sin, x, x)
    with pytest.raises(NotImplementedError, match="flash_attn_with_kvcache would leave the tangent behind"):
        ik.jvp(lambda x: flash.flash_attn_with_kvcache(x, x, x), x, x)


def test_what_xformers_refuses(xformers):
    x = drawn(SHAPE)
    call = xformers.memory_efficient_attention
    with pytest.raises(NotImplementedError, match=r"attn_bias=LocalAttentionFromBottomRightMask is not"):
        ik.jvp(lambda x: call(x, x, x, twins.LocalAttentionFromBottomRightMask()), x, x)
    with pytest.raises(NotImplementedError, match=r"p=0.1 is dropout of the weights"):
        ik.jvp(lambda x: call(x, x, x, p=0.1), x, x)
    with pytest.raises(TypeError, match=r"added to the logits, got torch.bool"):
        ik.jvp(lambda x: call(x, x, x, torch.ones(1, 2, 4, 4, dtype=torch.bool)), x, x)


@pytest.mark.parametrize("name", ["flash_attn", "xformers"])
def test_names_imported_before_in_every_mode(name, request):
    """A network's own name for the function: compiled, with a gradient, in a thread, under autocast."""
    package = request.getfixturevalue("flash" if name == "flash_attn" else name)
    call = getattr(package, "flash_attn_func" if name == "flash_attn" else "memory_efficient_attention")
    q, k, v = (x.requires_grad_() for x in drawn(SHAPE, SHAPE, SHAPE))
    tangents = drawn(SHAPE, SHAPE, SHAPE, seed=1)
    want = torch.func.jvp(lambda *x: twins.plain(*x, None, None), (q, k, v), tangents)

    def alike(got):
        torch.testing.assert_close(tuple(x.detach() for x in got), tuple(x.detach() for x in want))

    def step(q, k, v):
        return ik.jvp(call, (q, k, v), tangents)

    alike(step(q, k, v))
    alike(torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v))
    with torch.autocast(DEVICE, torch.bfloat16):  # of which these packages know nothing
        alike(step(q, k, v))
    with torch.no_grad():
        alike(step(q, k, v))

    def threaded(*x):
        found = []
        thread = threading.Thread(target=lambda: found.append(call(*x)))
        thread.start()
        thread.join()
        return found[0]

    alike(ik.jvp(threaded, (q, k, v), tangents))


@pytest.mark.parametrize("name", ["flash_attn", "xformers"])
def test_calls_without_a_tangent_stay_the_packages(name, request):
    package = request.getfixturevalue("flash" if name == "flash_attn" else name)
    call = getattr(package, "flash_attn_func" if name == "flash_attn" else "memory_efficient_attention")
    x, other = drawn(SHAPE, SHAPE)
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        y, _ = ik.jvp(lambda x: x + call(other, other, other), (x,), (x,))
    assert not any("scaled_dot_product" in name for name in seen)
    torch.testing.assert_close(y, x + twins.plain(other, other, other, None, None))
    weight = other.clone().requires_grad_()
    call(weight, weight, weight).sum().backward()
    assert weight.grad.isfinite().all()


def test_forward_mode_of_pytorch_stays_pytorchs(flash):
    x = drawn(SHAPE)
    ik.jvp(torch.sin, x, x)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
        x = torch.autograd.forward_ad.make_dual(*x, *x).requires_grad_()
        flash.flash_attn_func(x, x, x)

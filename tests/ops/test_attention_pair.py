"""The backward of attention's pair, of the output and its tangent, against autograd through `torch.func.jvp`.

The exact gradients are autograd's in float64, PyTorch's errors those of the same computation in float32.
"""

import functools
import itertools
import math
import random

import pytest
import torch

import imf_kernels as ik
from imf_kernels.backends import cpu
from imf_kernels.backends.operators import OPERATIONS
from imf_kernels.ops import attention_pair
from imf_kernels.testing import cases, errors
from imf_kernels.testing.cases import BF16, FP16, FP32, Input
from tests.helpers.backends import DTYPES, KERNELS, running_on, threads

pytestmark = pytest.mark.operation("scaled_dot_product_attention")
NAMES = ("query", "query tangent", "key", "key tangent", "value", "value tangent")
OPERATION = OPERATIONS["scaled_dot_product_attention"]
SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations(("query", "key", "value"), n)]
OFFSETS = [{"offset": 2.0}, {"offset": 4.0}]


def cases_of_the_pair():
    attention = cases.attention
    yield from (
        attention(f"tangents of {'+'.join(s)}", 2, 2, 21, 24, keys=18, value_width=16, tangents=s)
        for s in SUBSETS
    )
    yield from (attention(f"width {d}", 2, 2, 5, d, keys=9) for d in (1, 7, 40, 72))
    yield attention("length 1", 3, 2, 1, 24)
    yield attention("one key", 2, 1, 50, 16, keys=1)
    yield attention("length 276", 1, 1, 276, 64)
    yield attention("keys in several sums", 1, 1, 20, 16, keys=1100)
    yield attention("queries in several sums", 1, 1, 1600, 16, keys=20)
    yield attention("heads first", 2, 2, 19, 32, positions_first=False)
    yield attention("last samples", 3, 2, 19, 32, tangent_rows=2)
    yield attention("scale -0.3", 2, 2, 9, 16, options={"scale": -0.3})
    yield attention("logits far apart", 2, 2, 20, 16, q={"scale": 5.0}, k={"scale": 5.0})
    for offset in ({"offset": 2.0}, {"offset": 4.0}):
        both = {"k": offset, "v": offset}
        name = f"offset {offset['offset']:.0f}"
        yield attention(name, 2, 2, 40, 64, **both)
        yield attention(f"{name}, tangents of q", 1, 2, 40, 64, keys=276, **both, tangents=("query",))
        yield attention(f"{name}, causal", 1, 1, 100, 64, is_causal=True, **both)
    yield attention("causal, more queries", 1, 1, 100, 24, keys=70, is_causal=True)
    yield attention("causal, more keys", 1, 2, 40, 24, keys=101, is_causal=True, tangents=("query",))
    yield attention("causal, one head of keys", 2, 3, 70, 17, kv_heads=1, is_causal=True)
    yield attention("fewer heads of keys", 1, 6, 21, 24, keys=37, value_width=40, kv_heads=2)
    yield attention("mask of bool", 2, 3, 21, 24, keys=37, mask=Input((2, 3, 21, 37), true=0.7))
    yield attention("mask of bool for keys", 2, 1, 21, 24, keys=70, mask=Input((2, 1, 1, 70), true=0.7))
    yield attention("mask added", 1, 3, 21, 24, keys=37, mask=Input((3, 21, 37), scale=2.0))
    yield attention("mask added, in fp32", 1, 2, 70, 24, keys=40, mask=Input((70, 1), FP32, scale=2.0))
    mask = Input((9, 5), true=0.7)
    yield attention(
        "mask, fewer heads of keys, last samples", 3, 6, 9, 8, 5, kv_heads=3, mask=mask, tangent_rows=1
    )


def random_case(seed):
    draw = random.Random(seed)

    def size(most):
        return math.floor(math.exp(draw.uniform(0.0, math.log(most + 1))))

    queries = size(2048)
    keys = min(size(2048), 2**16 // queries)
    kv_heads, group = math.ceil(64 / queries), draw.choice((1, 1, 2, 3))
    width, value_width = size(130), size(130)
    if draw.random() < 0.2:
        mask = Input((queries, keys), true=0.7)
    elif draw.random() < 0.2:
        mask = Input((kv_heads * group, queries, 1), scale=2.0)
    else:
        mask = None
    return cases.attention(
        *(f"random {seed}", 1, kv_heads * group, queries, width, keys, value_width, draw.choice(SUBSETS)),
        kv_heads=kv_heads,
        mask=mask,
        is_causal=mask is None and draw.random() < 0.3,
        **{x: {"offset": draw.choice((0.0, 2.0, 4.0)), "scale": draw.choice((0.3, 1.0, 3.0))} for x in "kv"},
    )


CASES = {case.name: case for case in cases_of_the_pair()}


def draw(case, dtype, seed):
    """Primals, tangents or None, the mask, cotangents of the output and of its tangent's stored samples."""
    generator = torch.Generator("cpu").manual_seed(seed)
    primals, tangents = case.draw(generator, dtype)
    shape = case.outputs[0]
    rows = next(iter(tangents.values())).shape[0]
    cotangents = [torch.randn(n, *shape[1:], generator=generator).to(dtype) for n in (shape[0], rows)]
    arguments = [x for name in ("query", "key", "value") for x in (primals[name], tangents.get(name))]
    return arguments, primals.get("attn_mask"), cotangents


def options_of(case):
    return case.options.get("is_causal", False), case.options.get(
        "scale", 1 / math.sqrt(case.inputs["query"].shape[-1])
    )


def formula(mask, is_causal, scale, q, k, v):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    s = scale * (q @ k.mT)
    if is_causal:
        mask = torch.ones(s.shape[-2:], dtype=torch.bool).tril()
    if mask is not None and mask.dtype != torch.bool:
        return torch.softmax(s + mask, dim=-1) @ v
    if mask is None:
        return torch.softmax(s, dim=-1) @ v
    return (torch.softmax(s.masked_fill(~mask, -1e30), dim=-1) * mask.any(-1, keepdim=True)) @ v


def pair(case, arguments, mask):
    """The output and its tangent's stored samples, by `torch.func.jvp`."""
    primals, tangents = arguments[0::2], arguments[1::2]
    still = primals[0].shape[0] - next(t.shape[0] for t in tangents if t is not None)
    full = tuple(
        torch.zeros_like(x) if t is None else torch.cat([torch.zeros_like(x[:still]), t])
        for x, t in zip(primals, tangents, strict=True)
    )
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(primals[0].dtype)
    out, out_dot = torch.func.jvp(functools.partial(formula, mask, *options_of(case)), tuple(primals), full)
    return out, out_dot[still:]


def by_autograd(case, data, dtype):
    """The gradients that autograd derives from `torch.func.jvp`, of tangents that are given."""
    arguments, mask, cotangents = data
    leaves = [None if x is None else x.to(dtype, copy=True).requires_grad_() for x in arguments]
    wanted = {name: x for name, x in zip(NAMES, leaves, strict=True) if x is not None}
    found = torch.autograd.grad(
        pair(case, leaves, mask), wanted.values(), [c.to(dtype) for c in cotangents], materialize_grads=True
    )
    return dict(zip(wanted, found, strict=True))


def plain(case, arguments, mask, cotangents):
    q, q_dot, k, k_dot, v, v_dot = arguments
    is_causal, scale = options_of(case)
    return attention_pair.plain(
        q, q_dot, k, k_dot, v, v_dot, mask, *cotangents, is_causal, scale
    )  # fmt: skip


def pair_loss(case, arguments, mask, cotangents):
    return sum((x * c).sum() for x, c in zip(pair(case, arguments, mask), cotangents, strict=True))


@functools.cache
def expected(case, dtype):
    """The exact gradients of the first draw, and PyTorch's largest errors in float32 over several."""
    exact, yardsticks = None, {name: [] for name in NAMES}
    for seed in range(8):
        data = draw(case, dtype, seed)
        fp64, fp32 = (by_autograd(case, data, d) for d in (torch.float64, torch.float32))
        exact = exact or fp64
        for name, x in fp32.items():
            yardsticks[name].append(errors.Yardstick.of(x, fp64[name]))
    return exact, {name: errors.Yardstick.largest(y) for name, y in yardsticks.items() if y}


def by_kernels(case, data, backend, needs=(True,) * 6):
    """The gradients of a backend, from its own forward."""
    (q, q_dot, k, k_dot, v, v_dot), mask, (dout, dout_dot) = data
    is_causal, scale = options_of(case)
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2])
    kernels = OPERATION.backend_for(backend, q, q_dot, k, k_dot, v, v_dot, mask, is_causal, scale).kernels
    out, lse = q.new_empty(case.outputs[0]), q.new_empty(q.shape[:3], dtype=FP32)
    out_dot = out[: next(t.shape[0] for t in (q_dot, k_dot, v_dot) if t is not None)].clone()
    kernels.forward(q, k, v, q_dot, k_dot, v_dot, mask, out, out_dot, lse, scale, is_causal)
    found = attention_pair.pair_backward(
        kernels, q, q_dot, k, k_dot, v, v_dot, mask, lse, dout, dout_dot, is_causal, scale, needs
    )  # fmt: skip
    return {name: x for name, x in zip(NAMES, found, strict=True) if x is not None}


def check(case, dtype, backend):
    exact, yardsticks = expected(case, dtype)
    got = by_kernels(case, draw(case, dtype, 0), backend)
    assert got.keys() == exact.keys()
    for name, x in got.items():
        assert x.dtype == dtype
        errors.check(f"{case}, gradient of {name}", x, exact[name], yardsticks[name])


def on(kernels, name, dtype):
    with running_on(kernels) as backend:
        if dtype not in DTYPES[backend]:
            pytest.skip("not one of its dtypes")
        check(CASES[name], dtype, backend)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_gradients_obey_the_error_rule(number):
    """Every case, each on one instruction set and in one dtype in turn."""
    isas = cpu.instruction_sets()
    name, isa = list(CASES)[number], isas[number % len(isas)]
    on(f"cpu-{isa}", name, (FP32, BF16)[number // len(isas) % 2])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("tangents of query+key+value", FP16), ("mask, fewer heads of keys, last samples", FP32)],
)
def test_gradients_of_triton_obey_the_error_rule(name, dtype):
    on("triton", name, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernels", KERNELS)
def test_gradients_of_all_kernels_obey_the_error_rule(kernels, name, dtype):
    on(kernels, name, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("seed", range(200))
def test_random_shapes(seed, dtype):
    isas = cpu.instruction_sets()
    with cpu.use_instruction_set(isas[seed % len(isas)]), threads(1):
        check(random_case(seed), dtype, "cpu")


PLAIN = [
    *(f"tangents of {'+'.join(s)}" for s in SUBSETS),
    *("causal, more queries", "causal, more keys", "fewer heads of keys", "mask of bool", "mask added"),
]


@pytest.mark.parametrize("name", PLAIN)
def test_the_plain_formula_is_the_derivative(name):
    """It equals autograd's in float64, and so central differences along random directions."""
    case = CASES[name]
    arguments, mask, cotangents = draw(case, torch.float64, 0)
    exact = by_autograd(case, (arguments, mask, cotangents), torch.float64)
    got = dict(zip(NAMES, plain(case, arguments, mask, cotangents), strict=True))
    for name, wanted in exact.items():
        torch.testing.assert_close(got[name], wanted, rtol=1e-12, atol=1e-12)

    def loss(step):
        moved = [None if x is None else x + step * d for x, d in zip(arguments, directions, strict=True)]
        with torch.no_grad():
            return pair_loss(case, moved, mask, cotangents)

    torch.manual_seed(1)
    directions = [None if x is None else torch.randn_like(x) for x in arguments]
    along = sum((g * d).sum() for g, d in zip(got.values(), directions, strict=True) if d is not None)
    h = 1e-4
    differences = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
    torch.testing.assert_close(along, differences, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_gradients_do_not_depend_on_threads_or_on_what_else_is_wanted(dtype):
    case = cases.attention("threads", 2, 4, 150, 24, kv_heads=2, is_causal=True, tangent_rows=1)
    data = draw(case, dtype, 0)
    with threads(1):
        one = by_kernels(case, data, "cpu")
    with threads(2):
        two = by_kernels(case, data, "cpu")
    for name, x in one.items():
        assert torch.equal(x, two[name]), name
    for wanted in range(6):
        needs = tuple(i == wanted for i in range(6))
        ((name, x),) = by_kernels(case, data, "cpu", needs).items()
        assert name == NAMES[wanted]
        assert torch.equal(x, one[name]), name


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_query_that_sees_no_key_has_no_gradient(backend):
    with running_on(backend):
        case = CASES["mask of bool"]
        got = by_kernels(case, draw(case, FP32, 0), backend)
        assert not got["query"][:, :, 0].any()
        assert not got["query tangent"][:, :, 0].any()
        assert all(x.isfinite().all() for x in got.values())


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=pytest.mark.slow)])
def test_a_missing_cotangent_is_zero(backend):
    with running_on(backend):
        case = CASES["last samples"]
        arguments, mask, (dout, dout_dot) = draw(case, FP32, 0)
        without = by_kernels(case, (arguments, mask, (None, dout_dot)), backend)
        zeros = by_kernels(case, (arguments, mask, (torch.zeros_like(dout), dout_dot)), backend)
        for name, x in without.items():
            assert torch.equal(x, zeros[name]), name
        primal = by_kernels(case, (arguments, mask, (dout, None)), backend)
        assert list(primal) == ["query", "key", "value"]
        q, k, v = (x.detach().requires_grad_() for x in arguments[0::2])
        out = ik.scaled_dot_product_attention(q, k, v, backend=backend)
        for x, wanted in zip(primal.values(), torch.autograd.grad(out, (q, k, v), dout), strict=True):
            assert torch.equal(x, wanted)

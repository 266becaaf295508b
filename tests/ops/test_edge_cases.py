"""Memory orders, empty tensors, infinities and NaN, exact zeros: as PyTorch does it, on every backend."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import imf_kernels as ik
from imf_kernels import Dual
from imf_kernels.backends import cpu
from imf_kernels.testing import cases, errors
from imf_kernels.testing.cases import FP32, SMALL
from tests.helpers.backends import same_numbers

NAMES = (
    "linear square", "rms_norm width 33", "qk_norm_rope digits", "scaled_dot_product_attention heads first",
    "layer_norm width 33", "layer_norm_modulate width 33", "group_norm image with silu",
    "swiglu width 37", "gated_residual width 45",
    "gated_residual a gate a sample",
    "gated_residual_rms_norm width 45", "gelu matrix", "silu matrix", "prepend_tokens four groups",
)  # fmt: skip
CHOSEN = [next(case for case in SMALL if str(case) == name) for name in NAMES]


def _sliced(x):
    """Every other row of the second to last dimension, and not the whole last one, of a larger tensor."""
    room = torch.full((*x.shape[:-2], 2 * x.shape[-2], x.shape[-1] + 3), math.nan, dtype=x.dtype)
    view = room[..., ::2, 2 : 2 + x.shape[-1]]
    return view.copy_(x)


def _transposed(x):
    """The first two dimensions swapped in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _misaligned(x):
    """Begins one element into its memory."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize("layout", [_sliced, _transposed, _misaligned])
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_memory_order_changes_nothing(case, layout, backend):
    """Inputs, tangents and cotangents in another layout give the same results, and are left as they were."""
    p = errors.problem(case, FP32)
    moved = [{n: layout(x) if x.dim() > 1 else x for n, x in d.items()} for d in (p.primals, p.tangents)]
    cotangents = tuple(layout(c) for c in p.cotangents)
    got = errors.evaluate(case, *moved, cotangents, backend)
    p.check(got)
    for before, after in zip((p.primals, p.tangents), moved, strict=True):
        assert all(torch.equal(before[n], after[n]) for n in before)


# Each operation of x [3, 5, 24], a branch like it, and a row [3, 24] for each sample.
OF_SAMPLES = {
    "linear": lambda x, b, r, **o: ik.linear(x, torch.linspace(-1, 1, 576).view(24, 24), **o),
    "rms_norm": lambda x, b, r, **o: ik.rms_norm(x, torch.linspace(0.5, 1.5, 24), **o),
    "layer_norm": lambda x, b, r, **o: ik.layer_norm(x, [24], **o),
    "layer_norm_modulate": lambda x, b, r, **o: ik.layer_norm_modulate(x, r, Dual(r, r), **o),
    "swiglu": lambda x, b, r, **o: ik.swiglu(x, **o),
    "gelu": lambda x, b, r, **o: ik.gelu(x, **o),
    "silu": lambda x, b, r, **o: ik.silu(x, **o),
    "gated_residual": lambda x, b, r, **o: ik.gated_residual(x, b, torch.linspace(0.5, 1.5, 24), **o),
    "gated_residual, a gate a sample": lambda x, b, r, **o: ik.gated_residual(x, b, Dual(r, r), **o),
    "gated_residual_rms_norm": lambda x, b, r, **o: ik.gated_residual_rms_norm(
        x, b, *torch.linspace(0.5, 1.5, 48).view(2, 24), **o
    )[1],
}


@pytest.mark.parametrize("shape", [(3, 1, 24), (1, 5, 24), (1, 1, 24)], ids=str)
@pytest.mark.parametrize("operation", OF_SAMPLES)
def test_broadcast_inputs(operation, shape, backend):
    """Stride 0: inputs, tangents and cotangents that `expand` made give what their copies give."""
    torch.manual_seed(0)

    def draw(width=24):
        return torch.randn(*shape[:-1], width).expand(3, 5, width)

    def call(x, x_dot, branch, row, dy):
        x.requires_grad_()
        y = OF_SAMPLES[operation](Dual(x, x_dot), branch, row, backend=backend)
        return y.primal, y.tangent.detach(), torch.autograd.grad(y.primal, x, dy)[0]

    row, dy = torch.randn(1, 24).expand(3, 24), draw(12 if operation == "swiglu" else 24)
    drawn = draw(), draw(), draw(), row, dy
    expected = call(*(t.clone() for t in drawn))
    for got, wanted in zip(call(*drawn), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.operation("scaled_dot_product_attention")
@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_broadcast_attention(dims, backend):
    def draw(length):
        sizes = [2, 3, length, 8]
        return torch.randn([1 if i in dims else n for i, n in enumerate(sizes)]).expand(sizes)

    q, k, v, k_dot = draw(5), draw(7), draw(7), draw(7)

    def call(*x):
        y = ik.scaled_dot_product_attention(x[0], Dual(x[1], x[3]), x[2], backend=backend)
        return torch.stack([y.primal, y.tangent])

    assert torch.equal(call(q, k, v, k_dot), call(*(x.clone() for x in (q, k, v, k_dot))))


def test_a_sum_over_rows_reaches_backward_with_stride_0(backend):
    x, w = torch.randn(6, 33, requires_grad=True), torch.randn(33)
    for operation in (lambda x: ik.rms_norm(x, w, backend=backend), lambda x: ik.silu(x, backend=backend)):
        y = operation(x)
        (wanted,) = torch.autograd.grad(y, x, w.repeat(6, 1), retain_graph=True)
        (got,) = torch.autograd.grad((y.sum(0) * w).sum(), x)
        same_numbers(got, wanted)


# Operations of x [..., 4], and the shapes of what they take beside x [*b, 4].
EMPTY = {
    "linear": (ik.linear, lambda *b: [(3, 4), (3,)]),
    "rms_norm": (ik.rms_norm, lambda *b: [(4,)]),
    "layer_norm": (lambda x, *wb, **o: ik.layer_norm(x, [4], *wb, **o), lambda *b: [(4,), (4,)]),
    "layer_norm_modulate": (ik.layer_norm_modulate, lambda *b: [(b[0], 4), (b[0], 4)]),
    "swiglu": (ik.swiglu, lambda *b: []),
    "gelu": (ik.gelu, lambda *b: []),
    "silu": (ik.silu, lambda *b: []),
    "gated_residual": (ik.gated_residual, lambda *b: [(*b, 4), (4,)]),
    "gated_residual, a gate a sample": (ik.gated_residual, lambda *b: [(*b, 4), (b[0], 4)]),
    "gated_residual_rms_norm": (
        lambda *x, **o: ik.gated_residual_rms_norm(*x, **o)[1],
        lambda *b: [(*b, 4), (4,), (4,)],
    ),
}


@pytest.mark.parametrize("lead", [(0,), (0, 3), (3, 0), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("operation", EMPTY)
def test_no_rows(operation, lead, backend):
    """Nothing in, nothing out; and the gradients of weights are zeros, not what was in memory."""
    function, shapes = EMPTY[operation]
    x, *rest = leaves = [torch.ones(shape, requires_grad=True) for shape in ((*lead, 4), *shapes(*lead))]
    y = function(Dual(x, torch.ones(*lead, 4)), *rest, backend=backend)
    assert y.shape[:-1] == y.tangent.shape[:-1] == lead
    y.primal.sum().backward()
    for leaf in leaves:
        assert leaf.grad.shape == leaf.shape and not leaf.grad.any()


@pytest.mark.operation("prepend_tokens")
def test_no_scalars_and_no_tokens(backend):
    t = Dual(torch.ones(0), torch.ones(0))
    assert ik.sinusoidal_embedding(t, 8, backend=backend).tangent.shape == (0, 8)
    x = Dual(torch.ones(2, 0, 3), torch.ones(2, 0, 3))
    groups = [(torch.ones(0, 3), torch.ones(2, 3)), (torch.ones(2, 3), torch.ones(2, 3))]
    y = ik.prepend_tokens(x, groups, backend=backend)
    assert torch.equal(y.primal, torch.full((2, 2, 3), 2.0)) and torch.equal(y.tangent, torch.zeros(2, 2, 3))


@pytest.mark.operation("scaled_dot_product_attention")
@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("dim", ["batch", "heads", "queries", "keys", "width", "value_width"])
def test_attention_with_a_dimension_of_0_or_1(dim, size, backend):
    """Output, tangents of each input and of all, and gradients are those that PyTorch derives."""
    n = {"batch": 2, "heads": 2, "queries": 3, "keys": 20, "width": 8, "value_width": 8} | {dim: size}
    lengths = {"query": n["queries"], "key": n["keys"], "value": n["keys"]}
    widths = {"query": n["width"], "key": n["width"], "value": n["value_width"]}
    shapes = {name: (n["batch"], n["heads"], lengths[name], widths[name]) for name in lengths}
    x = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    x_dot = {name: torch.randn(shape) for name, shape in shapes.items()}

    def plain(*arguments):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(*arguments, scale=0.5)

    def ours(**arguments):
        return ik.scaled_dot_product_attention(**arguments, scale=0.5, backend=backend)

    for moving in ("query",), ("key",), ("value",), tuple(x):
        if backend == "cpu":  # what ran before leaves its numbers in the working memory
            used = Dual(torch.randn(2, 2, 60, 40), torch.randn(2, 2, 60, 40))
            ik.scaled_dot_product_attention(used, used, used, backend=backend)
        out = ours(**{name: Dual(t, x_dot[name]) if name in moving else t for name, t in x.items()})
        directions = (x_dot[name] if name in moving else torch.zeros(shapes[name]) for name in x)
        primals = tuple(t.detach() for t in x.values())
        expected, expected_dot = torch.func.jvp(plain, primals, tuple(directions))
        torch.testing.assert_close(out.primal, expected)
        torch.testing.assert_close(out.tangent.detach(), expected_dot, rtol=1e-4, atol=1e-5)
    cotangent = torch.randn(expected.shape)
    got = torch.autograd.grad(ours(**x), tuple(x.values()), cotangent)
    wanted = torch.autograd.grad(plain(*x.values()), tuple(x.values()), cotangent)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


@pytest.mark.operation("scaled_dot_product_attention")
@pytest.mark.parametrize("heads", [(0, 1), (0, 0)])
def test_attention_without_heads_of_queries(heads, backend):
    """Keys that nothing asks have gradients of zero."""
    q, k, v = (torch.randn(2, n, 5, 8, requires_grad=True) for n in (heads[0], heads[1], heads[1]))
    y = ik.scaled_dot_product_attention(q, k, v, enable_gqa=True, backend=backend)
    assert y.shape == (2, 0, 5, 8)
    for gradient, x in zip(torch.autograd.grad(y.sum(), (q, k, v)), (q, k, v), strict=True):
        assert gradient.shape == x.shape and not gradient.any()


@pytest.mark.operation("scaled_dot_product_attention")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_to_one_key_has_no_derivative_along_logits(dtype, backend):
    """softmax of one logit is 1: no gradient of q and k, no tangent from theirs, exactly."""
    q, k, v = (torch.randn(3, 2, n, 40, dtype=dtype, requires_grad=True) for n in (50, 1, 1))
    duals = Dual(q, torch.randn_like(q)), Dual(k, torch.randn_like(k))
    out = ik.scaled_dot_product_attention(*duals, v, backend=backend)
    assert torch.equal(out.primal, v.expand_as(out.primal)) and not out.tangent.any()
    dq, dk, dv = torch.autograd.grad(out.primal, (q, k, v), torch.randn_like(out.primal))
    assert not dq.any() and not dk.any() and dv.any()


# Each operation as a function of [4, 6] rows, beside PyTorch's own.
def w():
    return torch.linspace(0.5, 1.5, 6)


BY_ROW = {
    "linear": (lambda x, **o: ik.linear(x, w().diag(), **o), lambda x: F.linear(x, w().diag())),
    "rms_norm": (lambda x, **o: ik.rms_norm(x, w(), **o), lambda x: F.rms_norm(x, (6,), w(), eps=1e-6)),
    "layer_norm": (
        lambda x, **o: ik.layer_norm(x, (6,), w(), **o),
        lambda x: F.layer_norm(x, (6,), w()),
    ),
    "layer_norm_modulate": (
        lambda x, **o: ik.layer_norm_modulate(x, x, x, 1e-6, **o),
        lambda x: F.layer_norm(x, (6,), eps=1e-6) * (1 + x) + x,
    ),
    "swiglu": (ik.swiglu, lambda x: F.silu(x[..., :3]) * x[..., 3:]),
    "gelu": (ik.gelu, lambda x: F.gelu(x.double()).float()),  # of inf in float32 oneDNN makes NaN
    "gelu, tanh": (
        lambda x, **o: ik.gelu(x, approximate="tanh", **o),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    "silu": (ik.silu, F.silu),
    "gated_residual": (lambda x, **o: ik.gated_residual(x, x, w(), **o), lambda x: x + x * w()),
    "gated_residual, a gate a sample": (
        lambda x, **o: ik.gated_residual(x, x, x, **o),
        lambda x: x + x * x,
    ),
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("operation", BY_ROW)
def test_what_is_not_finite_stays_in_its_row(operation, value, backend):
    """Row 1 gets what PyTorch gives it, NaN for NaN, primal and gradient; the others do not change."""
    ours, pytorch = BY_ROW[operation]
    x = torch.linspace(-2, 2, 24).view(4, 6)
    clean = ours(Dual(x, x + 1), backend=backend)
    x = x.clone()
    x[1, 2] = value
    x.requires_grad_()
    y = ours(Dual(x, x.detach() + 1), backend=backend)
    (got,) = torch.autograd.grad(y.primal, x, torch.ones_like(y.primal))
    with torch.device("cpu"):  # PyTorch's kernels for GPUs make NaN of more
        theirs = x.detach().cpu().requires_grad_()
        expected = pytorch(theirs)
        (wanted,) = torch.autograd.grad(expected, theirs, torch.ones_like(expected))
    torch.testing.assert_close(y.primal.cpu(), expected, equal_nan=True)
    torch.testing.assert_close(got.cpu(), wanted, equal_nan=True)
    assert not y.tangent[1].isfinite().all() or operation in ("silu", "swiglu")
    others = [0, 2, 3]
    assert torch.equal(y.primal[others], clean.primal[others])
    assert torch.equal(y.tangent[others].detach(), clean.tangent[others])


@pytest.mark.operation("scaled_dot_product_attention")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_what_is_not_finite_in_attention(where, value, backend):
    """Other heads and, for the query, other rows are untouched; the rest is as PyTorch's softmax has it."""
    torch.manual_seed(0)
    x = {n: torch.randn(2, 2, 20, 8) for n in ("query", "key", "value")}
    clean = ik.scaled_dot_product_attention(*(Dual(t, t) for t in x.values()), backend=backend)
    x[where][1, 0, 3, 4] = value
    got = ik.scaled_dot_product_attention(*(Dual(t, t.nan_to_num()) for t in x.values()), backend=backend)
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(got.primal, F.scaled_dot_product_attention(**x), equal_nan=True)
    touched = torch.zeros(2, 2, 20, dtype=torch.bool)
    touched[(1, 0, 3) if where == "query" else (1, 0)] = True
    assert torch.equal(got.primal[~touched], clean.primal[~touched])
    assert torch.equal(got.tangent[~touched], clean.tangent[~touched])


@pytest.mark.parametrize("isa", cpu.instruction_sets())
@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("keys", [30, 600])
def test_gradients_of_other_queries_stay_finite(keys, value, isa):
    """Long enough for bf16 dot products, whose gradient of the query has a term that queries share."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 32, generator=generator).bfloat16() for n in (50, keys, keys))
    q[0, 0, 3, 1] = value
    with cpu.use_instruction_set(isa):
        y = ik.scaled_dot_product_attention(q.requires_grad_(), k, v, backend="cpu")
        (dq,) = torch.autograd.grad(y, q, torch.ones_like(y))
    assert dq.isfinite().all(-1).sum() == 49 and not dq[0, 0, 3].isfinite().all()


@pytest.mark.operation("scaled_dot_product_attention")
def test_logits_that_overflow_one_exponential(backend):
    """Logits of ±1e4 leave a softmax of one 1 and zeros: value, tangent and gradients follow that key."""
    q = torch.full((1, 1, 1, 1), 100.0)
    k, v = (
        torch.tensor([-100.0, 100.0, 0.0]).view(1, 1, 3, 1),
        torch.arange(12.0).view(1, 1, 3, 4).requires_grad_(),
    )
    k_dot = torch.randn(1, 1, 3, 1)
    out = ik.scaled_dot_product_attention(q, Dual(k, k_dot), Dual(v, v.detach() * 2), backend=backend)
    assert torch.equal(out.primal, v[:, :, 1:2])
    # The terms that cancel in the tangent are as large as q k_dot v = 1e3.
    torch.testing.assert_close(out.tangent.detach(), 2 * v[:, :, 1:2].detach(), rtol=0, atol=1e-3)
    (dv,) = torch.autograd.grad(out.primal.sum(), v)
    assert torch.equal(dv[0, 0, :, 0], torch.tensor([0.0, 1.0, 0.0]))


# Rows that are all the same, so that what they add to a weight's gradient has one sign in each column.
SUMMED = [
    cases.rms_norm("200 rows", 200, width=6),
    cases.layer_norm("200 rows", 200, width=6),
    cases.layer_norm_modulate("of 100 positions", 2, 100, width=6),
    cases.gated_residual("200 rows", 200, width=6),
    cases.gated_residual("of 100 positions", 2, 100, width=6, gate_a_sample=True),
]


@pytest.mark.parametrize("cotangents", ["whose sum overflows", "inf", "inf and -inf"])
@pytest.mark.parametrize("case", SUMMED, ids=str)
def test_infinite_sums_over_rows(case, cotangents, backend):
    """Gradients of weights are inf or NaN where PyTorch's are, however many rows are summed."""
    primals = errors.problem(case, FP32).primals
    shared = {n: x[:1] if x.dim() == 2 else x[:, :1] for n, x in primals.items() if n in ("x", "branch")}
    primals |= {n: x.expand_as(primals[n]).contiguous() for n, x in shared.items()}
    dy = torch.full(case.outputs[0], 1e38)
    if "inf" in cotangents:
        dy.view(-1, 6)[70] = math.inf
    if "-inf" in cotangents:
        dy.view(-1, 6)[90] = -math.inf
    got, wanted = (errors.evaluate(case, primals, {}, (dy,), b) for b in (backend, "reference"))
    for name in case.differentiable:
        if name not in shared:
            gradient = f"gradient of {name}"
            assert not wanted[gradient].isfinite().any()
            torch.testing.assert_close(got[gradient], wanted[gradient], equal_nan=True)


@pytest.mark.operation("layer_norm")
@pytest.mark.parametrize("width", [9, 40, 100, 1000, 1024])
@pytest.mark.parametrize("value", [1e18, -1e27, 1e30, 3e38])
def test_layer_norm_of_equal_values_however_large(value, width, kernels):
    """They normalise to exact zeros, and a derivative sees no more than ε of their variance."""
    if value > 1e35 and kernels != "cpu":
        pytest.skip("the sum of a row overflows, which only the CPU's kernels see to")
    x, x_dot, bias = torch.full((2, width), value), torch.randn(2, width), torch.randn(width)
    y = ik.layer_norm(Dual(x.requires_grad_(), x_dot), (width,), None, bias, backend=kernels)
    assert torch.equal(y.primal, bias.expand(2, width))
    dy = torch.randn(2, width)
    (dx,) = torch.autograd.grad(y.primal, x, dy)
    for got, t in ((y.tangent, x_dot), (dx, dy)):
        torch.testing.assert_close(got, 1e-5**-0.5 * (t - t.mean(-1, keepdim=True)), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("isa", cpu.instruction_sets())
@pytest.mark.parametrize("rows", [60, 1000, 20000])
def test_sums_of_equal_cotangents(rows, isa):
    """The gradient of a mean over many rows errs as 8 + log₂(rows) roundings of half an ulp at random do."""
    errors_in_ulps = []
    for value in torch.rand(30, generator=torch.Generator().manual_seed(0)).tolist():
        bias = torch.zeros(3, requires_grad=True)
        with cpu.use_instruction_set(isa):
            y = ik.layer_norm(torch.ones(rows, 3), (3,), torch.ones(3), bias, backend="cpu")
            (db,) = torch.autograd.grad(y, bias, torch.full_like(y, value))
        exact = rows * torch.tensor(value).double().item()
        errors_in_ulps.append((db.double() - exact).abs().max().item() / math.ulp(exact) / 2**29)
    assert math.hypot(*errors_in_ulps) / math.sqrt(30) <= 0.5 * math.sqrt(8 + math.log2(rows))


class _Copies(TorchDispatchMode):
    """Counts calls that copy a tensor."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        copies = func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_)
        self.count += copies and args[0].numel() > 0
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 3, 16, 61])
@pytest.mark.parametrize("samples", [0, 1, 3])
@pytest.mark.parametrize("function", [ik.silu, ik.gelu])
@pytest.mark.parametrize("differentiable", [False, True])
def test_halves_of_a_projection(function, dtype, width, samples, differentiable):
    """Rows at a distance: bit by bit what copies of them give, and no copy is made."""

    def halves(*shape):
        return torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype).chunk(2, dim=-1)[1]

    def results(of):
        leaf = of(x).detach().requires_grad_()
        leaf_dot = of(x_dot).detach().requires_grad_(differentiable)
        with _Copies() as copies:
            y = function(Dual(leaf, leaf_dot, differentiable=differentiable))
            given = [(y.primal, of(dy))]
            if differentiable:
                given.append((y.tangent_rows, of(dy_dot)))
            ys, cotangents = zip(*given, strict=True)
            torch.autograd.backward(ys, cotangents)
        return copies.count, [
            t for t in (y.primal, y.tangent_rows, leaf.grad, leaf_dot.grad) if t is not None
        ]

    torch.manual_seed(0)
    x, dy = halves(3, 50, width), halves(3, 50, width)
    x_dot, dy_dot = halves(samples, 50, width), halves(samples, 50, width)
    copies, strided = results(lambda t: t)
    _, contiguous = results(torch.Tensor.contiguous)
    assert copies == 0
    assert all(map(torch.equal, strided, contiguous))

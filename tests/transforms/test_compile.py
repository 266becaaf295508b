"""Under `torch.compile` and `torch.export`: one graph, and what comes out of eager mode comes out of it."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import imf_kernels as ik
from imf.model.config import IMFConfig
from imf.networks import build
from imf_kernels import Dual
from imf_kernels.backends import operators, sources
from imf_kernels.testing import cases, errors
from imf_kernels.testing.cases import FP32, OPERATIONS, SMALL
from tests.helpers.backends import has_triton, running_on

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch", "ignore:.isinstance.treespec, LeafSpec:FutureWarning"
)
slow = pytest.mark.slow

NAMES = (
    "linear square", "linear weights of x's dtype", "rms_norm width 33", "rms_norm fp32 stream",
    "qk_norm_rope digits", "qk_norm_rope matrix", "scaled_dot_product_attention other value width",
    "scaled_dot_product_attention tangents of query", "scaled_dot_product_attention heads first",
    "swiglu width 37", "gated_residual width 45", "gated_residual only branch", "silu matrix",
    "sinusoidal_embedding dim 256", "prepend_tokens four groups", "prepend_tokens one embedding without",
    "layer_norm width 33", "layer_norm no weights", "layer_norm_modulate width 33",
    "gated_residual a gate a sample",
    "gated_residual_rms_norm width 45", "gelu tanh", "group_norm channels last with silu",
)  # fmt: skip
CASES = [next(c for c in SMALL if str(c) == name) for name in NAMES]
each_operation = pytest.mark.parametrize(
    "case", [next(c for c in CASES if c.operation == name) for name in OPERATIONS], ids=str
)


@pytest.fixture(autouse=True)
def no_graphs_yet():
    torch._dynamo.reset()


def leaves_of(p):
    return {n: x.clone().requires_grad_(n in p.case.differentiable) for n, x in p.primals.items()}


def results_of(call, p, tangents, cotangents=True):
    """Outputs, tangents and gradients of `call(primals, tangents)`, which returns pairs."""
    leaves = leaves_of(p)
    outputs = call(leaves, tangents)
    assert not any(t is not None and t.requires_grad for _, t in outputs)
    wanted = [leaves[n] for n in p.case.differentiable]
    gradients = torch.autograd.grad([y for y, _ in outputs], wanted, p.cotangents) if cotangents else ()
    return [x for pair in outputs for x in pair], list(gradients)


def caller(case, backend=None):
    def call(primals, tangents):
        duals = {n: Dual(x, tangents[n]) if n in tangents else x for n, x in primals.items()}
        results = case.run(duals, backend, **case.output_options)
        return [(y.primal, y.tangent_rows) if isinstance(y, Dual) else (y, None) for y in results]

    return call


def assert_equal(got, wanted):
    for some, others in zip(got, wanted, strict=True):
        for a, b in zip(some, others, strict=True):
            assert (a is None) == (b is None)
            assert a is None or (a.dtype == b.dtype and torch.equal(a, b))


@pytest.mark.parametrize("tangents", [True, pytest.param(False, marks=slow)], ids=["dual", "primal"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_in_a_graph_are_those_of_eager_mode(case, tangents):
    """Bitwise: outputs, tangents and gradients."""
    p = errors.problem(case, case.dtypes[0])
    given = p.tangents if tangents else {}
    call = caller(case)
    wanted = results_of(call, p, given)
    assert_equal(results_of(torch.compile(call, fullgraph=True, backend="aot_eager"), p, given), wanted)


@pytest.mark.parametrize(
    "case", [case for case in CASES if operators.OPERATIONS[case.operation].function is not None], ids=str
)
def test_operators_do_what_their_schemas_say(case, monkeypatch):
    """Each operator of a kernel fills what its schema marks and nothing else, as its fake says."""
    p = errors.problem(case, case.dtypes[0])
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator.namespace == "imf_kernels":
                calls.append((operator, args, kwargs))
            return operator(*args, **kwargs or {})

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with Record():
        results_of(caller(case), p, p.tangents)
    monkeypatch.undo()
    assert {str(operator).partition(".")[2] for operator, _, _ in calls} >= {
        f"{kernels_of(case)}_forward.default"
    }
    for operator, args, kwargs in calls:
        torch.library.opcheck(operator, args, kwargs, test_utils=("test_schema", "test_faketensor"))


def kernels_of(case):
    """The name of the kernels that a case runs on."""
    name = "gelu_tanh" if case.options.get("approximate") == "tanh" else case.operation
    return operators.OPERATIONS[name].kernels


def test_every_kernel_has_an_operator():
    for operation in operators.OPERATIONS.values():
        kernels = any(backend.kernels is not None for backend in operation.backends)
        assert hasattr(torch.ops.imf_kernels, operation.name) == kernels
        for backend in operation.backends:
            assert (backend.kernels is None) == (backend.name in ("reference", "flash"))


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param(case, backend, marks=() if case.operation in ("rms_norm", "prepend_tokens") else slow)
        for case in CASES
        for backend in ("reference", "triton")
        if FP32 in case.dtypes and (case.operation, backend) != ("linear", "triton")
    ],
    ids=str,
)
def test_other_backends_in_a_graph(case, backend):
    with running_on(backend):
        p = errors.problem(case, FP32)
    call = caller(case, backend)
    got = results_of(torch.compile(call, fullgraph=True, backend="aot_eager"), p, p.tangents)
    wanted = results_of(call, p, p.tangents)
    for some, others in zip(got, wanted, strict=True):
        for a, b in zip(some, others, strict=True):
            torch.testing.assert_close(a, b)


class Chain(torch.nn.Module):
    """A Dual in, a Dual out; operations of every kind of shape and PyTorch's own between them."""

    def __init__(self, width=12):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.gate = (torch.nn.Parameter(torch.rand(width) + 0.5) for _ in range(2))
        self.up = torch.nn.Parameter(torch.randn(2 * width, width) * 0.3)

    def forward(self, x):
        y = ik.swiglu(ik.linear(ik.rms_norm(x, self.norm), self.up))
        heads = ik.linear_map(lambda a: a.unflatten(-1, (2, -1)).transpose(1, 2), y)
        y = ik.scaled_dot_product_attention(heads, heads, heads)
        y = ik.linear_map(lambda a: a.transpose(1, 2).flatten(2) * 2, y)
        return ik.gated_residual(x, y, self.gate)


def of_chain(module, x, x_dot):
    """What a Chain makes of a Dual, and gradients."""
    x = x.clone().requires_grad_()
    y = module(Dual(x, x_dot))
    gradients = torch.autograd.grad(y.primal.square().sum(), [x, *module.parameters()])
    return [y.primal, y.tangent.detach(), *gradients]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", pytest.param("inductor", marks=slow)])
@pytest.mark.parametrize("rows", [None, 1])
def test_a_dual_in_and_out_of_a_compiled_module(compiler, rows):
    module, x, x_dot = Chain(), torch.randn(3, 5, 12), torch.randn(3, 5, 12)[:rows]
    got = of_chain(torch.compile(module, fullgraph=True, backend=compiler), x, x_dot)
    for a, b in zip(got, of_chain(module, x, x_dot), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_dual_lives_across_a_break_of_the_graph():
    w = torch.rand(6)

    def call(x, x_dot):
        y = ik.rms_norm(Dual(x, x_dot[1:]), w)
        torch._dynamo.graph_break()
        y = ik.silu(y)
        return y.primal, y.tangent_rows

    x, x_dot = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6)
    for a, b in zip(torch.compile(call, backend="aot_eager")(x, x_dot), call(x, x_dot), strict=True):
        assert torch.equal(a, b)


def test_differentiating_a_tangent_that_a_graph_hands_out():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def silu(x, x_dot):
        return ik.silu(Dual(x, x_dot))

    y = silu(torch.randn(7, requires_grad=True), torch.randn(7))
    with pytest.raises(RuntimeError, match="no gradient flows through tangents"):
        y.tangent.sum().backward()


@pytest.mark.parametrize("mark", [False, True], ids=["automatic", "marked"])
def test_changing_lengths_compile_at_most_twice(mark):
    module = Chain()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for length in (5, 7, 8, 13, 30):
        x, x_dot = torch.randn(2, length, 12), torch.randn(2, length, 12)
        if mark:
            torch._dynamo.mark_dynamic(x, 1)
            torch._dynamo.mark_dynamic(x_dot, 1)
            got = compiled(Dual(x, x_dot))
            wanted = module(Dual(x, x_dot))
            assert torch.equal(got.primal, wanted.primal) and torch.equal(got.tangent, wanted.tangent)
        else:
            for a, b in zip(of_chain(compiled, x, x_dot), of_chain(module, x, x_dot), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert counter.frame_count <= (1 if mark else 2)


def one_row_of_any_size(x, w):
    return ik.silu(x[2:].unsqueeze(0) * w)


def sums_of_any_number(x, w):
    return ik.rms_norm(x, w, backend="triton")


@pytest.mark.parametrize("call", [one_row_of_any_size, sums_of_any_number], ids=lambda f: f.__name__)
def test_sizes_that_inductor_cannot_bound(call, monkeypatch):
    """A kernel fills a tensor of symbolic size."""
    with running_on("triton"):
        from imf_kernels.backends.triton_kernels import rows

        monkeypatch.setattr(rows, "_SHARES", 2)  # the limit, reached by small sums too
        compiled, w = torch.compile(call, fullgraph=True), torch.rand(12, requires_grad=True)
        for length in (300, 400):
            x = torch.randn(length, 12, requires_grad=True)
            got, wanted = (torch.autograd.grad(f(x, w).square().sum(), (x, w)) for f in (compiled, call))
            for a, b in zip(got, wanted, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("channels_last", [False, True])
def test_sums_with_what_a_kernel_returns(channels_last):
    """Inductor may fuse the gradients' sum with loops before and after the kernel that computes one."""
    torch.manual_seed(0)
    into, norm, out = nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 1)

    def residual(x):
        x = into(x)
        return x + out(norm(x))

    x, x_dot = torch.randn(2, 2, 16, 2, 2)
    if channels_last:
        x, x_dot = (t.to(memory_format=torch.channels_last) for t in (x, x_dot))

    def gradients(jvp):
        y, _ = jvp(x)
        weights = [p for layer in (into, norm, out) for p in layer.parameters()]
        return torch.autograd.grad(y.square().mean(), weights)

    def jvp(x):
        return ik.jvp(residual, (x,), (x_dot,))

    for got, wanted in zip(gradients(torch.compile(jvp, fullgraph=True)), gradients(jvp), strict=True):
        torch.testing.assert_close(got, wanted)


def test_graphs_name_the_sources():
    """Else what the compiler keeps on disk would be used by another version of the package."""
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph.code)
        return graph

    torch.compile(ik.silu, backend=compiler)(torch.randn(3))
    assert f"backend = 'cpu {sources.of_package()}'" in graphs[0]


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=slow)])
def test_the_whole_network(compiler):
    """u with its tangent, v, and the gradient of every weight."""
    torch.manual_seed(0)
    model = build(IMFConfig(4, 2, 3, 32, 3, 2, 1, 8 / 3, 5))
    with torch.no_grad():
        for weight in model.parameters():  # scales and heads that are zero at the start
            weight.add_(torch.randn_like(weight) * 0.1)
    z, z_dot, y = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4), torch.tensor([0, 3, 5])
    h, omega, t_min, t_max = torch.rand(4, 3).add(0.5).unbind()

    def results(network):
        u, v = network(
            Dual(z, z_dot), torch.ones(3), Dual(h, torch.ones(3)), omega, t_min, t_max, y, heads="uv"
        )
        gradients = torch.autograd.grad(u.primal.square().sum() + v.square().sum(), [*model.parameters()])
        return [u.primal, u.tangent.detach(), v, *gradients]

    wanted = results(model)
    assert all(x.any() for x in wanted)
    for a, b in zip(results(torch.compile(model, fullgraph=True, backend=compiler)), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.detach().abs().max()))


def test_a_graph_keeps_nothing_of_the_tangent():
    """What is saved for its backward, when cut as Inductor cuts it, is what is saved without tangents."""
    module, x, x_dot = Chain(), torch.randn(3, 5, 12, requires_grad=True), torch.randn(3, 5, 12)

    def saved(*duals):
        torch._dynamo.reset()
        kept = []
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager_decomp_partition")
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.detach()), lambda t: t):
            compiled(*duals)
        return kept

    with_tangent, without = saved(Dual(x, x_dot)), saved(x)
    assert len(with_tangent) == len(without) > 5
    assert all(torch.equal(a, b) for a, b in zip(with_tangent, without, strict=True))


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_wanted_gradients_of_attention(wanted):
    x = [torch.randn(2, 2, 5, 8, requires_grad=i == wanted) for i in range(3)]
    compiled = torch.compile(ik.scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    got, expected = (
        torch.autograd.grad(f(*x).square().sum(), x[wanted])[0]
        for f in (compiled, ik.scaled_dot_product_attention)
    )
    assert torch.equal(got, expected)


def test_numbers_may_come_from_outside():
    """eps, which PyTorch compiles anew for each value, and an embedding's width, which it does not."""
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(x, w, eps, dim):
        return ik.rms_norm(x, w, eps), ik.sinusoidal_embedding(w, dim)

    x, w = torch.randn(3, 4), torch.rand(4)
    for eps, dim in ((1e-6, 8), (1e-3, 8), (1e-3, 10), (1e-3, 12), (1e-3, 14)):
        y, embedding = compiled(x, w, eps, dim)
        assert torch.equal(y, ik.rms_norm(x, w, eps))
        assert torch.equal(embedding, ik.sinusoidal_embedding(w, dim))
    frames = counter.frame_count
    compiled(x, w, 1e-3, 16)
    assert counter.frame_count == frames


def test_one_tensor_for_several_arguments():
    """Also a tangent that is its own primal."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, w):
        return call(x, w)

    def call(x, w):
        y = ik.scaled_dot_product_attention(Dual(x, x.detach()), x, x)
        y = ik.gated_residual(y, y, w)
        return y.primal, y.tangent_rows

    def results(function):
        y, y_dot = function(x, w)
        return [y, y_dot, *torch.autograd.grad(y.sum(), (x, w))]

    x, w = torch.randn(2, 2, 5, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    for a, b in zip(results(compiled), results(call), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_does_not_reach_into_a_graph_either(inside):
    w = torch.randn(4, 6)

    def call(x, x_dot):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            y = ik.linear(ik.rms_norm(Dual(x, x_dot), torch.ones(6)), w)
        return y.primal, y.tangent_rows

    def results(function):
        x = torch.linspace(-1, 1, 18).view(3, 6).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
            y, y_dot = function(x, x.detach() + 1)
        return [y, y_dot, *torch.autograd.grad(y.sum(), x)]

    got = results(torch.compile(call, fullgraph=True, backend="aot_eager"))
    for a, b in zip(got, results(call), strict=True):
        assert a.dtype == FP32 and torch.equal(a, b)


def test_bad_calls_keep_their_words():
    compiled = torch.compile(
        lambda x, **o: ik.rms_norm(x, torch.ones(4), **o), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match=r"rms_norm: weight must be \[5\]"):
        compiled(torch.ones(2, 5))
    with pytest.raises(Exception, match="backend 'cpu' cannot run: it takes float32 and bfloat16"):
        compiled(torch.ones(2, 4, dtype=torch.float64), backend="cpu")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(next(c for c in CASES if c.operation == name), marks=() if name == "rms_norm" else slow)
        for name in OPERATIONS
    ],
    ids=str,
)
@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap"])
def test_transforms_in_a_graph_take_the_reference(case, transform):
    """torch.func inside torch.compile: exact, never a tangent that is silently zero."""
    p = errors.problem(case, FP32)
    name = next(iter(p.tangents))

    def function(x):
        return case.run(p.primals | {name: x}, None)[0]

    def transformed(x, x_dot):
        if transform == "jvp":
            return torch.func.jvp(function, (x,), (x_dot,))[1]
        if transform == "grad":
            return torch.func.grad(lambda x: (function(x) ** 3).sum())(x)
        return torch.func.vmap(function)(torch.stack([x, x_dot]))

    x, x_dot = p.primals[name], p.tangents[name]
    wanted = transformed(x, x_dot)
    assert wanted.any()
    got = torch.compile(transformed, fullgraph=True, backend="aot_eager")(x, x_dot)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=slow)])
def test_export(strict):
    """A graph of operations, with a length that may change and Duals in and out."""
    module, x = Chain(), Dual(torch.randn(3, 5, 12), torch.randn(1, 5, 12))
    length = {1: torch.export.Dim("length", min=2, max=64)}
    program = torch.export.export(module, (x,), dynamic_shapes=([length, length],), strict=strict)
    operators = {str(node.target) for node in program.graph.nodes}
    assert "imf_kernels.rms_norm.default" in operators and not any("_forward" in name for name in operators)
    x = Dual(torch.randn(3, 9, 12), torch.randn(1, 9, 12))
    for exported in (program, program.run_decompositions()):
        y, wanted = exported.module()(x), module(x)
        assert torch.equal(y.primal, wanted.primal) and torch.equal(y.tangent_rows, wanted.tangent_rows)


MADE_BY_KERNELS = {"statistics", "rstd", "lse"}  # in memory of the operation's own


class Relaid(TorchDispatchMode):
    """Hands each kernel what it reads in another order of dimensions in memory, as compiled code may."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "imf_kernels":
            arguments = operator._schema.arguments
            args = [
                x if a.name in MADE_BY_KERNELS else relaid(x) for x, a in zip(args, arguments, strict=False)
            ]
        return operator(*args, **kwargs or {})


def relaid(x):
    if not isinstance(x, torch.Tensor) or x.dim() < 3:
        return x
    return x.transpose(0, 1).contiguous().transpose(0, 1)


RELAID = [
    *(case for case in CASES if len(next(iter(case.inputs.values())).shape) > 2),
    cases.gelu("tensor", 3, 5, 7),
    cases.silu("tensor", 3, 5, 7),
    cases.linear("tensor", 3, 5, width=7, out=4),
]


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("case", RELAID, ids=str)
def test_other_strides_than_traced(case, backend, monkeypatch):
    if backend in case.refused_by or (backend == "triton" and not has_triton(case.operation)):
        pytest.skip(f"{backend} does not run it")
    with running_on(backend):
        p = errors.problem(case, FP32)
        with monkeypatch.context() as patch, Relaid():
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            results = p.evaluate(backend)
        p.check(results)

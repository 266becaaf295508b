"""`imf_kernels.jvp(..., differentiable=True)`: gradients of losses of outputs and tangents."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import imf_kernels as ik
from tests.helpers.networks import NETWORKS, made
from tests.transforms import test_jvp_sweep as sweep
from tests.transforms.test_jvp import X_DOT, Block, X


def loss(y, y_dot):
    return y.square().mean() + (y * y_dot).mean() + (y_dot**3).mean()


def gradients(pair, wanted):
    return torch.autograd.grad(loss(*pair), wanted)


def double(module):
    return module.double(), *(x.double().requires_grad_() for x in (X.detach(), X_DOT.detach()))


def slopes(function, primals, tangents, step=1e-5):
    """Of the loss along random directions of the primals and of the tangents, and what gradients say of both.

    The former by differences of the mode without gradients, in float64.
    """
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (*primals, *tangents)]

    def moved(step, of):
        values = [
            x + step * d * moves for x, d, moves in zip((*primals, *tangents), directions, of, strict=True)
        ]
        with torch.no_grad():
            y, y_dot = ik.jvp(function, tuple(values[: len(primals)]), tuple(values[len(primals) :]))
        return loss(y, y_dot.detach())

    leaves = [x.clone().requires_grad_() for x in (*primals, *tangents)]
    pair = ik.jvp(function, tuple(leaves[: len(primals)]), tuple(leaves[len(primals) :]), differentiable=True)
    found = torch.autograd.grad(loss(*pair), leaves)
    for first in (True, False):
        of = [first] * len(primals) + [not first] * len(tangents)
        difference = (moved(step, of) - moved(-step, of)) / (2 * step)
        yield (
            difference,
            sum((g * d * moves).sum() for g, d, moves in zip(found, directions, of, strict=True)),
        )


def check_slopes(function, *primals, step=1e-5):
    generator = torch.Generator().manual_seed(1)
    tangents = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in primals]
    for wanted, got in slopes(function, primals, tangents, step):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_pytorch():
    """In fp64, of weights, inputs and tangents. PyTorch's own layer_norm is wrong there, so RMSNorm."""
    block = Block()
    block.norm1 = nn.RMSNorm(16, eps=1e-6)
    block, x, x_dot = double(block)
    wanted = [x, x_dot, *block.parameters()]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        theirs = gradients(torch.func.jvp(block, (x,), (x_dot,)), wanted)
    torch.testing.assert_close(gradients(ik.jvp(block, (x,), (x_dot,), differentiable=True), wanted), theirs)
    with ik.use_backend("reference"):
        again = gradients(ik.jvp(block, (x,), (x_dot,), differentiable=True), wanted)
    torch.testing.assert_close(again, theirs)


@pytest.mark.parametrize("backend", ["reference", "cpu", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_served_calls(backend, dtype):
    """As far from fp64 as the gradients of the primal alone are, with the same operations."""
    if backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter is wrong in bfloat16")

    def errors(differentiable):
        found = []
        for exact in (dtype, torch.float64):
            block = Block().to(dtype).to(exact)
            torch.manual_seed(0)
            for p in block.parameters():
                p.data.copy_(torch.randn(p.shape).to(dtype) * 0.2)
            x, x_dot = (t.detach().to(dtype).to(exact).requires_grad_(differentiable) for t in (X, X_DOT))
            with ik.use_backend(None if exact == torch.float64 else backend):
                y, y_dot = ik.jvp(block, (x,), (x_dot,), differentiable=differentiable)
            value = loss(y.double(), y_dot.double()) if differentiable else y.double().square().mean()
            wanted = [*block.parameters(), *([x, x_dot] if differentiable else [])]
            found.append(torch.cat([g.flatten().double() for g in torch.autograd.grad(value, wanted)]))
        return ((found[0] - found[1]).norm() / found[1].norm()).item()

    assert errors(True) < 3 * errors(False) + 1e-7


ROW = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
KERNEL = torch.linspace(-1, 1, 36, dtype=torch.float64).view(4, 3, 3)


def _instance_norm(x):
    return F.instance_norm(x[..., None] * torch.linspace(0.5, 1, 5) + x[..., None].flip(0) ** 2)


def _causal(x):
    return F.scaled_dot_product_attention(x[None], x[None], x[None].sin(), is_causal=True)


CALLS = {
    "softmax": lambda x: torch.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(x, 1) * x,
    "logsumexp": lambda x: x * x.logsumexp(-1, keepdim=True),
    "cross_entropy": lambda x: F.cross_entropy(x, torch.arange(3) % x.shape[1], reduction="none"),
    "normalize": lambda x: F.normalize(x, 2.0, 1) * x,
    "glu": lambda x: F.glu(x, 1),
    "hardsigmoid": lambda x: x * F.hardsigmoid(x),
    "layer_norm of two dimensions": lambda x: F.layer_norm(x, x.shape[1:], ROW, 1 + ROW),
    "group_norm": lambda x: F.group_norm(x, 2),
    "instance_norm": _instance_norm,
    "instance_norm of parameters": lambda x: F.instance_norm(x[None], None, None, x[:, 0], x[:, 1]),
    "instance_norm, tracking, of parameters": lambda x: F.instance_norm(
        x[None], torch.zeros(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype), x[:, 0], x[:, 1]
    ),
    "instance_norm of statistics, of parameters": lambda x: F.instance_norm(
        x[None], ROW[:3], ROW[3:], x[:, 0], x[:, 1], False
    ),
    "batch_norm": lambda x: F.batch_norm(x, None, None, ROW, None, True),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None] ** 2, x[None]),
    "attention, causal": _causal,
    "cdist": lambda x: torch.cdist(x, x.flip(0) ** 2),
    "det": lambda x: torch.linalg.det(x[:, :3]) * x,
    "cholesky_solve": lambda x: torch.cholesky_solve(x, 2 * torch.eye(3, dtype=x.dtype) + x[:, :3].tril()),
    "conv1d": lambda x: F.conv1d(x[None], KERNEL, ROW[:4]),
    "matmul": lambda x: (x @ x.T) @ torch.ones(3, 2, dtype=x.dtype) * (ROW @ x.T).sum(),
    "addmm": lambda x: torch.addmm(x[:, :3], x, x.T, beta=0.5, alpha=2.0),
    "einsum": lambda x: torch.einsum("ij,k->ijk", x, ROW) * x[..., None],
    "bilinear": lambda x: F.bilinear(x, x**2, KERNEL.new_ones(2, 6, 6) / 6),
    "in place": lambda x: (x * 1.5).sin_().mul_(x).add_(1.0).square_(),
    "a view in place": lambda x: torch.zeros_like(x).index_copy_(0, torch.arange(3), x).T.mul_(x.T).exp_(),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls(name):
    """In fp64 against differences: also what PyTorch's own gradients of tangents raise for or get wrong."""
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    check_slopes(CALLS[name], x)


def test_what_pytorch_gets_wrong_is_refused():
    A, w = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    for function, primals in (
        (torch.linalg.solve, (A, A + 1)),
        (torch.ops.aten.linalg_solve.default, (A, A + 1)),
        (torch.slogdet, (A,)),
        (torch.linalg.eigh, (A,)),
        (lambda x, w: F.layer_norm(x, (4,), w), (A, w)),
        (lambda x, w: F.batch_norm(x, None, None, w, None, True), (A, w)),
    ):
        with pytest.raises(NotImplementedError, match=r"imf_kernels\.jvp: .* wrong gradient in PyTorch"):
            ik.jvp(function, primals, primals, differentiable=True)
        ik.jvp(function, primals, primals)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in ("sit", "unet", "edm2") else pytest.mark.slow) for n in NETWORKS],
)
def test_networks(name):
    """float32 against float64: as accurate as the tangent, whose cube is in the loss, as the gradient of the
    output, or as plain PyTorch. The directional derivative in float64 against differences."""
    found = []
    for dtype, backend in ((torch.float32, None), (torch.float32, "reference"), (torch.float64, None)):
        case = made(name)
        module = case.module.to(dtype)
        function = case.function(module, dtype)

        def seeded(*moving, function=function):
            torch.manual_seed(0)
            return function(*moving)

        generator = torch.Generator().manual_seed(1)
        moving = [x.to(dtype).requires_grad_() for x in case.moving]
        tangents = tuple(torch.randn(x.shape, generator=generator).to(dtype) * 0.1 for x in moving)
        wanted = [*moving, *(p for p in module.parameters() if p.requires_grad)]
        with ik.use_backend(backend):
            pair = ik.jvp(seeded, tuple(moving), tangents, differentiable=True)
        results = [pair[1].detach().double()]
        for value in (pair[0].square().mean(), loss(*pair)):
            grads = torch.autograd.grad(value, wanted, allow_unused=True, retain_graph=True)
            results.append(torch.cat([g.double().flatten() for g in grads if g is not None]))
        found.append(results)
    ours, plain = (
        [((x - exact).norm() / exact.norm()).item() for x, exact in zip(xs, found[2], strict=True)]
        for xs in found[:2]
    )
    assert ours[2] < 4 * max(*ours[:2], plain[2]) + 1e-6
    if name in ("sit", "unet", "edm2"):
        check_slopes(seeded, *(x.detach() for x in moving))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", sweep.OPS, ids=sweep.name_of)
def test_sweep(op):
    """Every call of PyTorch's database: right against differences, NaN where PyTorch divides, or an error."""
    for variant in ("function", "in place"):
        call = sweep.VARIANTS[variant](op)
        for sample in itertools.islice(op.sample_inputs("cpu", torch.float64), 2) if call else ():
            moving = sweep.Moving(op, call, sample, variant == "in place")
            if not moving.primals or op.name in NOT_COMPARED:
                continue

            def one(*primals, moving=moving):
                return torch.cat([y.flatten() for y in moving(*primals) if y.dtype == torch.float64])

            try:
                with torch.no_grad():
                    first = [
                        ik.jvp(lambda *p: one(*p).square().mean(), moving.primals, moving.tangents)[1].item()
                        for _ in range(2)
                    ]
            except Exception:
                continue  # refused without gradients too
            if first[0] != first[1]:
                continue
            try:
                pairs = list(slopes(one, moving.primals, moving.tangents))
            except (RuntimeError, NotImplementedError):
                continue  # an error, at the latest in backward
            for difference, got in pairs:
                if difference.isfinite() and got.isfinite():
                    torch.testing.assert_close(got, difference, rtol=1e-3, atol=1e-3)


# Several elements written to one place, whose own gradient is wrong; slopes that differences do not see.
NOT_COMPARED = {
    *("as_strided_scatter", "nn.functional.max_unpool1d", "nn.functional.max_unpool2d"),
    *("nn.functional.max_unpool3d", "linalg.eig", "linalg.eigvals", "linalg.svd", "svd", "linalg.eigh"),
}


def test_the_default_is_as_before():
    block = Block()
    x_dot = X_DOT.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"tangent 0 requires grad.*differentiable=True"):
        ik.jvp(block, (X,), (x_dot,))
    _, y_dot = ik.jvp(block, (X,), (X_DOT,))
    with pytest.raises(RuntimeError, match="differentiable=True"):
        y_dot.sum().backward()
    for differentiable in (False, True):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            ik.jvp(nn.Linear(16, 16), (X,), (X_DOT,), differentiable=differentiable)
        tangents = [t for t in saved if t.shape == X_DOT.shape and torch.equal(t, X_DOT)]
        assert len(tangents) == differentiable
    with torch.no_grad():
        y, y_dot = ik.jvp(block, (X,), (X_DOT,), differentiable=True)
    assert not y.requires_grad and not y_dot.requires_grad


def test_operations_inside():
    """Operations of this library inside `jvp` follow it; torch.func.jvp outside of it guards as before."""
    w = torch.randn(16, requires_grad=True)

    def function(x):
        return ik.gelu(ik.rms_norm(x, w), approximate="tanh")

    x = X.clone().requires_grad_()
    found = gradients(ik.jvp(function, (x,), (X_DOT,), differentiable=True), [x, w])
    plain = torch.func.jvp(
        lambda x: F.gelu(F.rms_norm(x, (16,), w, 1e-6), approximate="tanh"), (x,), (X_DOT,)
    )
    torch.testing.assert_close(found, gradients(plain, [x, w]), rtol=1e-4, atol=1e-5)
    _, y_dot = torch.func.jvp(function, (x,), (X_DOT,))
    with pytest.raises(RuntimeError, match="no gradient flows through tangents"):
        y_dot.sum().backward()


@pytest.mark.parametrize("of", [ik.checkpoint, torch.utils.checkpoint.checkpoint])
def test_checkpoint(of):
    block = Block()
    head = nn.Linear(16, 16)
    x, x_dot = X.clone().requires_grad_(), X_DOT.clone().requires_grad_()
    wanted = [x, x_dot, *block.parameters(), *head.parameters()]
    plain = gradients(ik.jvp(lambda x: head(block(x)), (x,), (x_dot,), differentiable=True), wanted)
    runs = []

    def counted(x):
        runs.append(1)
        return block(x)

    for reentrant in (False, True):
        pair = ik.jvp(
            lambda x, r=reentrant: head(of(counted, x, use_reentrant=r)), (x,), (x_dot,), differentiable=True
        )
        torch.testing.assert_close(gradients(pair, wanted), plain)
    assert len(runs) == 4
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        ik.jvp(lambda x: of(block, x, use_reentrant=False), (x,), (x_dot,), differentiable=True)
    assert len(saved) <= 4


def test_checkpoint_of_duals():
    w = torch.randn(16, 16, requires_grad=True)
    x, x_dot = X.clone().requires_grad_(), X_DOT.clone().requires_grad_()
    dual = ik.Dual(x, x_dot, differentiable=True)

    def function(x):
        return ik.silu(ik.linear(x, w)) * x

    y, again = function(dual), ik.checkpoint(function, dual)
    wanted = [x, x_dot, w]
    torch.testing.assert_close(
        gradients((again.primal, again.tangent), wanted), gradients((y.primal, y.tangent), wanted)
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(backend):
    torch._dynamo.reset()
    block = Block()
    x, x_dot = X.clone().requires_grad_(), X_DOT.clone().requires_grad_()
    wanted = [x, x_dot, *block.parameters()]

    def step(x, x_dot):
        return loss(*ik.jvp(block, (x,), (x_dot,), differentiable=True))

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x, x_dot), wanted), torch.autograd.grad(step(x, x_dot), wanted),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_compile_of_duals():
    torch._dynamo.reset()
    w = torch.randn(16, requires_grad=True)
    x, x_dot = X.clone().requires_grad_(), X_DOT.clone().requires_grad_()

    def step(x, x_dot):
        y = ik.rms_norm(ik.Dual(x, x_dot, differentiable=True), w)
        y = ik.gelu(y) * y + x
        return loss(y.primal, y.tangent)

    wanted = [x, x_dot, w]
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x, x_dot), wanted), torch.autograd.grad(step(x, x_dot), wanted)
    )


def test_autocast():
    block = Block()
    x, x_dot = X.clone().requires_grad_(), X_DOT.clone().requires_grad_()
    wanted = [x, x_dot, *block.parameters()]
    exact = gradients(ik.jvp(block, (x,), (x_dot,), differentiable=True), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        pair = ik.jvp(block, (x,), (x_dot,), differentiable=True)
    for got, right in zip(torch.autograd.grad(loss(*(t.float() for t in pair)), wanted), exact, strict=True):
        assert got.dtype == torch.float32
        assert (got - right).norm() < 0.05 * right.norm() + 1e-3

"""flash-attn: which calls reach it, what it refuses and why, and its results by the error rule.

Where flash-attn and a GPU are, the tests of results run on them too; elsewhere on a stand-in of the same
public function, on the CPU.
"""

import re
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import imf_kernels as ik
from imf_kernels import Dual, info
from imf_kernels.backends import flash, layout
from imf_kernels.backends.operators import OPERATIONS
from imf_kernels.ops import attention as operation
from imf_kernels.testing import errors
from imf_kernels.testing.cases import attention
from tests.helpers import flash_stand_in
from tests.helpers.backends import ON_GPU, CPUGenerators

SDPA = ik.scaled_dot_product_attention
BF16 = torch.bfloat16


def use_stand_in(monkeypatch):
    """Makes `import flash_attn` find the stand-in, and the backend take tensors on the CPU."""
    monkeypatch.setitem(sys.modules, "flash_attn", flash_stand_in)
    monkeypatch.setattr(flash, "missing", lambda: None)
    monkeypatch.setattr(flash, "unfit", lambda tensors, _, dtypes: layout.unfit(tensors, "cpu", dtypes))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    flash_stand_in.calls.clear()


@pytest.fixture
def stand_in(monkeypatch):
    choices = OPERATIONS[operation.NAME].choices
    choices.clear()
    use_stand_in(monkeypatch)
    yield flash_stand_in
    choices.clear()


@pytest.fixture(params=["stand-in", pytest.param("flash-attn", marks=pytest.mark.gpu)])
def package(request):
    """The stand-in on the CPU, then the package itself on a GPU."""
    if request.param == "stand-in":
        request.getfixturevalue("stand_in")
        yield request.param
        return
    if reason := flash.missing() or (None if ON_GPU else "there is no GPU"):
        pytest.skip(reason)
    with torch.device("cuda"), CPUGenerators():
        yield request.param


def heads(*shape, dtype=BF16, requires_grad=False):
    """A tensor [B, H, L, D] in the order of projections, [B, L, H, D]."""
    batch, count, length, width = shape
    x = torch.randn(batch, length, count, width, dtype=dtype).transpose(1, 2)
    return x.requires_grad_(requires_grad)


CASES = [
    attention("square", 2, 3, 40, 16, tangents=()),
    attention("digits", 2, 4, 36, 32, tangents=()),
    attention("head dim 72", 1, 2, 33, 72, tangents=()),
    attention("head dim 20, padded", 1, 2, 17, 20, tangents=(), positions_first=False),
    attention("fewer keys", 2, 2, 33, 64, keys=5, tangents=()),
    attention("grouped heads", 2, 4, 19, 32, kv_heads=2, tangents=()),
    attention("causal", 2, 2, 37, 32, tangents=(), is_causal=True),
    attention("one query", 2, 4, 1, 32, keys=7, kv_heads=2, tangents=()),
    attention("heads of 256", 1, 1, 70, 256, tangents=()),
]


@pytest.mark.parametrize("dtype", flash.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_by_the_error_rule(case, dtype, package):
    """Output and gradients, as accurate as every other backend's."""
    p = errors.problem(case, dtype)
    p.check(p.evaluate("flash"))


def test_gradients_repeat_bitwise(package):
    q, k, v = (heads(2, 4, 300, 64, requires_grad=True) for _ in range(3))

    def gradients():
        return torch.autograd.grad(SDPA(q, k, v, backend="flash"), (q, k, v), torch.ones_like(q))

    first = gradients()
    assert all(torch.equal(a, b) for _ in range(5) for a, b in zip(first, gradients(), strict=True))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_in_a_graph(package, compiler):
    """One graph, the same results; the call is found by its name and by `use_backend`."""
    q, k, v = (heads(2, 2, 24, 32, requires_grad=True) for _ in range(3))

    def by_name(q, k, v):
        return SDPA(q, k, v, is_causal=True, backend="flash").square()

    def by_block(q, k, v):
        with ik.use_backend("flash"):
            return SDPA(q, k, v, is_causal=True).square()

    wanted = by_name(q, k, v)
    gradients = torch.autograd.grad(wanted.sum(), (q, k, v))
    for call in (by_name, by_block):
        got = torch.compile(call, backend=compiler, fullgraph=True)(q, k, v)
        assert torch.equal(got, wanted)
        for a, b in zip(torch.autograd.grad(got.sum(), (q, k, v)), gradients, strict=True):
            assert torch.equal(a, b)
    torch._dynamo.reset()


def test_the_package_gets_the_call(stand_in):
    q = heads(2, 3, 8, 16, requires_grad=True)
    out = SDPA(q, q, q, is_causal=True, scale=0.3, backend="flash")
    assert stand_in.calls == [{"softmax_scale": 0.3, "causal": True, "deterministic": True}]
    assert out.shape == q.shape and out.transpose(1, 2).is_contiguous()
    wanted = SDPA(q, q, q, is_causal=True, scale=0.3, backend="reference")
    torch.testing.assert_close(out, wanted, rtol=0.02, atol=0.002)
    # By the default scale, and where nothing is to be differentiated.
    with torch.no_grad():
        assert not SDPA(q, q, q, backend="flash").requires_grad
    assert stand_in.calls[1]["softmax_scale"] == 0.25


def test_without_a_tangent_in_a_block_and_with_one_the_default(stand_in):
    q, k, v = (heads(2, 2, 8, 16) for _ in range(3))
    q_dot = torch.randn(2, 2, 8, 16, dtype=BF16)
    with ik.use_backend("flash"):
        plain, zero = SDPA(q, k, v), SDPA(Dual(q), k, v)
        assert len(stand_in.calls) == 2
        assert torch.equal(plain, zero.primal) and zero.tangent_rows is None
        dual = SDPA(Dual(q, q_dot), k, v)
        rows = SDPA(Dual(q, q_dot[1:]), k, v)
        assert len(stand_in.calls) == 2
    default = SDPA(Dual(q, q_dot), k, v)
    assert torch.equal(dual.primal, default.primal) and torch.equal(dual.tangent, default.tangent)
    assert torch.equal(rows.tangent_rows, default.tangent[1:])
    assert torch.equal(SDPA(q, k, v), default.primal) and len(stand_in.calls) == 2  # never the default


def test_a_named_call_with_a_tangent_is_refused(stand_in):
    q = heads(2, 2, 8, 16)
    moving = Dual(q, torch.randn(2, 2, 8, 16, dtype=BF16))
    refusal = r"backend 'flash' cannot run: it has no tangents.*use_backend\('flash'\)"
    for call in ((moving, q, q), (q, moving, q), (q, q, moving)):
        with pytest.raises(RuntimeError, match=refusal):
            SDPA(*call, backend="flash")
    with pytest.raises(RuntimeError, match=refusal):
        torch.func.jvp(lambda q: SDPA(q, q, q, backend="flash"), (q,), (q,))


def test_dual_tensors_of_pytorch_run_on_the_default(stand_in):
    q, q_dot = heads(2, 2, 8, 16), heads(2, 2, 8, 16)
    with ik.use_backend("flash"):
        out, out_dot = torch.func.jvp(lambda q: SDPA(q, q, q), (q,), (q_dot,))
        u, u_dot = ik.jvp(lambda x: x + F.scaled_dot_product_attention(x, x, x), (q,), (q_dot,))
        # What carries no tangent inside jvp.
        w, w_dot = ik.jvp(lambda x: x * SDPA(q, q, q), (q,), (q_dot,))
    assert len(stand_in.calls) == 1
    wanted = SDPA(*[Dual(q, q_dot)] * 3)
    assert torch.equal(out, wanted.primal) and torch.equal(out_dot, wanted.tangent)
    assert torch.equal(u, q + wanted.primal) and torch.equal(u_dot, q_dot + wanted.tangent)
    constant = SDPA(q, q, q, backend="flash")
    assert torch.equal(w, q * constant) and torch.equal(w_dot, q_dot * constant)


def test_other_operations_take_the_name_for_the_default():
    x, weight = torch.randn(2, 8), torch.ones(8)
    for call in (
        partial(ik.rms_norm, x, weight),
        partial(ik.gelu, x),
        partial(ik.linear, x, torch.ones(4, 8)),
        partial(ik.sinusoidal_embedding, torch.rand(3), 4),
    ):
        assert torch.equal(call(backend="flash"), call())
        with ik.use_backend("flash"):
            assert torch.equal(call(), call(backend="flash"))


REFUSED = {
    "float32": (lambda q: SDPA(q.float(), q.float(), q.float()), "takes bfloat16 and float16, got float32"),
    "a mask": (
        lambda q: SDPA(q, q, q, attn_mask=torch.ones(4, 4, dtype=torch.bool)),
        "it has no attn_mask",
    ),
    "a wide head": (lambda q: SDPA(*[heads(1, 1, 2, 264)] * 3), "one head dim of at most 256, got 264 and"),
    "two widths": (lambda q: SDPA(q, q, heads(2, 3, 4, 8)), "got 16 and 8 of the value"),
    "no key": (lambda q: SDPA(q, q[:, :, :0], q[:, :, :0]), "needs a sample, a head, a query and a key"),
    "no sample": (lambda q: SDPA(q[:0], q[:0], q[:0]), r"got \[0, 3, 4, 16\]"),
    "another corner": (
        lambda q: SDPA(q[:, :, :3], q, q, is_causal=True),
        "with is_causal it takes as many queries as keys, got 3 and 4",
    ),
    "a negative scale": (lambda q: SDPA(q, q, q, scale=-1.0), "a scale above 0, got -1"),
    "strides": (
        lambda q: SDPA(heads(2, 3, 4, 17)[..., :16], q, q),
        r"strides that are multiples of 8 elements, got \(204, 17, 51, 1\)",
    ),
    "an address": (
        lambda q: SDPA(q, q, heads(2, 3, 4, 24)[..., 4:20]),
        "addresses that are multiples of 16 bytes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_do_is_refused(case, stand_in):
    """By its name and in a block of it, never another backend in silence."""
    call, why = REFUSED[case]
    with ik.use_backend("flash"), pytest.raises(RuntimeError, match=f"backend 'flash' cannot run: .*{why}"):
        call(heads(2, 3, 4, 16))
    assert not stand_in.calls


def test_transforms_of_torch_func_are_refused(stand_in):
    q = heads(2, 3, 4, 16)
    with pytest.raises(RuntimeError, match=r"'flash' cannot run: .*inside a transform of torch\.func"):
        torch.func.grad(lambda q: SDPA(q, q, q, backend="flash").sum())(q)


def test_old_gpus_are_refused(stand_in, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(RuntimeError, match=r"it runs on compute capability 8\.0 and newer, got 7\.5"):
        SDPA(*[heads(2, 3, 4, 16)] * 3, backend="flash")


def test_second_derivatives_are_refused(stand_in):
    q = heads(2, 3, 4, 16, requires_grad=True)
    out = SDPA(q, q, q, backend="flash").float().square().sum()
    with pytest.raises(RuntimeError, match="create_graph=True asks for second derivatives, which flash-attn"):
        torch.autograd.grad(out, q, create_graph=True)


GRADIENTS = {
    "of a sum": lambda out: out.sum(),
    "of a part of wider rows": lambda out: (torch.cat([out, out[..., :3]], -1) * RANDOM).sum(),
    "at an odd address": lambda out: (torch.cat([out[..., :3], out], -1) * RANDOM).sum(),
}
RANDOM = torch.randn(2, 3, 1, 19, dtype=BF16)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_of_any_layout(gradient, stand_in):
    """The kernels read 16 bytes at a time; the stand-in refuses what lies otherwise."""
    q, k, v = (heads(2, 3, 4, 16, requires_grad=True) for _ in range(3))
    leaves = q, k, v
    got = torch.autograd.grad(GRADIENTS[gradient](SDPA(q, k, v, backend="flash")), leaves)
    wanted = torch.autograd.grad(GRADIENTS[gradient](SDPA(q, k, v, backend="reference")), leaves)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_checkpoints_recompute_on_it(stand_in):
    q = heads(2, 3, 4, 16, requires_grad=True)
    with ik.use_backend("flash"):
        out = ik.checkpoint(lambda q: SDPA(q, q, q), q)
    out.float().sum().backward()
    assert len(stand_in.calls) == 2


def test_why_not_here(monkeypatch):
    missing = flash.missing.__wrapped__
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert re.search(r"cannot be imported: .*pip install 'imf-kernels\[flash\]'", missing())
    monkeypatch.setitem(sys.modules, "flash_attn", flash_stand_in)
    if torch.version.hip is None:
        assert missing() is None
    monkeypatch.setattr(flash_stand_in, "__version__", "2.6.3.post1")
    assert torch.version.hip or missing() == "it needs flash-attn 2.7 or newer, got 2.6.3.post1"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "built for ROCm" in missing()


def test_info_tells_of_it(stand_in):
    assert re.search(r"^flash-attn +2\.8\.3, on request$", info.report(), re.MULTILINE)
    assert "flash (on request)" in info.report()


def test_tensors_elsewhere_are_refused():
    q = torch.zeros(1, 1, 2, 8, dtype=BF16)
    with pytest.raises(RuntimeError, match="'flash' cannot run: it takes CUDA tensors, got one on cpu"):
        SDPA(q, q, q, backend="flash")

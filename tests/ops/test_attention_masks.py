"""Attention with masks, causal, with grouped heads: as PyTorch does it; and what a mask must not do."""

import math
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F

import imf_kernels as ik
from imf_kernels import Dual
from imf_kernels.backends import triton_launch
from imf_kernels.testing import errors
from imf_kernels.testing.cases import BF16, FP32, SMALL, attention
from tests.helpers.backends import BACKENDS, same_numbers

pytestmark = pytest.mark.operation("scaled_dot_product_attention")
SDPA = ik.scaled_dot_product_attention
masking = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


MASKS = {
    "bool": lambda: draw(2, 4, 5, 7) > 0.5,
    "bool for heads": lambda: draw(4, 1, 7) > 0.5,
    "bool for keys": lambda: draw(7) > 0.0,
    "added": lambda: draw(2, 1, 5, 7),
    "added, -inf": lambda: draw(5, 7).masked_fill(draw(5, 7) > 0.3, -math.inf),
    "nothing seen": lambda: torch.zeros(5, 1, dtype=torch.bool),
}
CALLS = [
    *({"attn_mask": name} for name in MASKS),
    {"is_causal": True},
    {"enable_gqa": True},
    {"enable_gqa": True, "is_causal": True, "scale": -0.3},
    {"enable_gqa": True, "attn_mask": "bool"},
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("options", CALLS, ids=str)
def test_as_pytorch_derives_it(options):
    """In fp64: output, torch.func.jvp and gradients of PyTorch's own function, to 1e-13."""
    options = {n: MASKS[v]() if n == "attn_mask" else v for n, v in options.items()}
    heads = 2 if "enable_gqa" in options else 4
    primals = [draw(2, 4, 5, 8), draw(2, heads, 7, 8), draw(2, heads, 7, 6)]
    dots = [draw(*x.shape) + 1 for x in primals]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        wanted, wanted_dot = torch.func.jvp(
            lambda *x: F.scaled_dot_product_attention(*x, **options), tuple(primals), tuple(dots)
        )
        leaves = [x.clone().requires_grad_() for x in primals]
        dout = draw(*wanted.shape)
        gradients = torch.autograd.grad(F.scaled_dot_product_attention(*leaves, **options), leaves, dout)
    duals = [Dual(x, t) for x, t in zip(leaves, dots, strict=True)]
    got = SDPA(*duals, **options, backend="reference")
    close = {"rtol": 0, "atol": 1e-13}
    torch.testing.assert_close(got.primal, wanted, **close)
    # Where nothing is seen PyTorch's forward mode makes 0 / 0.
    torch.testing.assert_close(got.tangent.detach(), wanted_dot.nan_to_num(nan=0.0), **close)
    for ours, theirs in zip(torch.autograd.grad(got.primal, leaves, dout), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, **close)


@masking
def test_what_a_mask_hides_does_not_matter(backend):
    """However large the hidden keys and values are: the same bits."""
    q, k, v = (torch.randn(2, 2, 40, 16) for _ in range(3))
    mask = torch.arange(40) < 37
    spoiled_k, spoiled_v = k.clone(), v.clone()
    spoiled_k[..., 37:, :], spoiled_v[..., 37:, :] = 1e4, 1e30
    run = lambda k, v: SDPA(Dual(q, q), k, Dual(v, v), mask, backend=backend)  # noqa: E731
    got, wanted = run(spoiled_k, spoiled_v), run(k, v)
    assert torch.equal(got.primal, wanted.primal) and torch.equal(got.tangent, wanted.tangent)


@masking
def test_a_query_that_sees_nothing_gives_zeros(backend):
    q, k, v = (torch.randn(2, 2, 40, 16, requires_grad=True) for _ in range(3))
    mask = torch.ones(40, 40, dtype=torch.bool)
    mask[3] = False
    for hidden in (mask, torch.zeros(40, 40).masked_fill(~mask, -math.inf)):
        out = SDPA(*(Dual(x, torch.randn_like(x)) for x in (q, k, v)), hidden, backend=backend)
        assert not out.primal[:, :, 3].any() and not out.tangent[:, :, 3].any()
        dq, dk, dv = torch.autograd.grad(out.primal.sum(), (q, k, v))
        assert not dq[:, :, 3].any() and dk.isfinite().all() and dv.isfinite().all()


@masking
def test_a_mask_is_read_where_it_lies(backend):
    """Expanded, transposed, every other element: as its copy, and it is not written to."""
    q, k, v = (torch.randn(2, 3, n, 16) for n in (21, 40, 40))
    room = torch.randn(80, 42)
    for mask in (room[::2, ::2].T, room[:40, 0].expand(3, 21, 40), room[0, :21, None] > 0):
        before = mask.clone()
        got, wanted = (SDPA(q, k, v, m, backend=backend) for m in (mask, before.contiguous()))
        same_numbers(got, wanted)
        assert torch.equal(mask, before)


@masking
def test_the_primal_does_not_feel_the_tangent_behind_a_mask(backend):
    case = next(c for c in SMALL if str(c).endswith("fewer heads of keys, mask"))
    p = errors.problem(case, FP32)
    alone, whole = p.evaluate(backend, tangents=False), p.evaluate(backend)
    assert all(torch.equal(alone[name], whole[name]) for name in alone)


@masking
def test_a_scale_of_zero_averages_the_keys_that_are_seen(backend):
    q, k, v = (torch.randn(1, 2, 20, 8, requires_grad=True) for _ in range(3))
    mask = torch.rand(20, 20).fill_diagonal_(1.0) > 0.5
    weights = mask / mask.sum(1, keepdim=True)
    for hidden in (mask, torch.zeros(20, 20).masked_fill(~mask, -math.inf)):
        y = SDPA(Dual(q, q.detach()), k, v, hidden, scale=0.0, backend=backend)
        torch.testing.assert_close(y.primal, weights @ v)
        assert not y.tangent.any() and not torch.autograd.grad(y.primal.sum(), q)[0].any()


CPU = pytest.mark.parametrize("backend", [b for b in BACKENDS if b.startswith("cpu")], indirect=True)


@CPU
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_causal_is_the_mask_of_its_triangle(dtype, backend):
    """Fewer keys are multiplied, in blocks that end elsewhere: equal to rounding."""
    torch.manual_seed(0)
    for queries, keys in ((300, 300), (130, 270), (270, 130)):
        q, k, v = (torch.randn(1, 1, n, 24).to(dtype).requires_grad_() for n in (queries, keys, keys))
        triangle = torch.ones(queries, keys, dtype=torch.bool).tril()
        results = []
        for options in ({"is_causal": True}, {"attn_mask": triangle}):
            y = SDPA(Dual(q, q.detach()), Dual(k, q.detach()[:, :, :1] + k.detach()), v, **options)
            results.append((y.primal, y.tangent, *torch.autograd.grad(y.primal.square().sum(), (q, k, v))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_no_matrix_of_logits_is_made():
    """Peak memory at 8,192 positions, whose 2^26 weights in fp32 would take 256 MiB."""
    code = """
        import resource, torch, imf_kernels as ik
        torch.set_num_threads(1)
        q, k, v = (torch.randn(1, h, 8192, 4, requires_grad=True) for h in (2, 1, 1))
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = peak()
        for options in ({"is_causal": True}, {"attn_mask": torch.rand(8192) < 0.5}):
            y = ik.scaled_dot_product_attention(
                *(ik.Dual(x, x.detach()) for x in (q, k, v)), **options, enable_gqa=True, backend="cpu"
            )
            y.primal.sum().backward()
        print((peak() - before) // 1024)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 64


def test_tiles_of_another_size(monkeypatch):
    """Keys in whole tiles and in smaller ones at the end and along the diagonal, more than one of each."""
    tiles = pytest.importorskip("imf_kernels.backends.triton_kernels.attention_tiles")
    if not triton_launch.interpreted():
        pytest.skip("the tiles of a GPU are those of its table")
    monkeypatch.setitem(tiles.TABLE["interpreter"], "forward", {"64": (32, 64, 16, 4, 1)})
    monkeypatch.setitem(tiles.TABLE["interpreter"], "backward q", {"64": (32, 64, 16, 4, 1)})
    monkeypatch.setitem(tiles.TABLE["interpreter"], "backward kv", {"64": (64, 32, 0, 4, 1)})
    for causal in (False, True):
        p = errors.problem(attention("tiles", 1, 1, 50, 24, keys=101, is_causal=causal), torch.float16)
        p.check(p.evaluate("triton"))


@masking
@pytest.mark.parametrize(
    "value",
    [torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min, torch.finfo(torch.float32).max, -1e30],
)
def test_masks_of_the_largest_numbers(value, backend):
    """A row of them adds nothing that differs: its output is the mean of the values, its gradients finite."""
    torch.manual_seed(0)
    q, k, v, q_dot, k_dot, v_dot = torch.randn(6, 2, 3, 5, 8).unbind()
    mask = torch.zeros(5, 5)
    mask[2], mask[3, :2] = value, value
    seen = mask.double()
    names = ("output", "tangent", "gradient of q", "gradient of k", "gradient of v")

    def results(backend, dtype, mask):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        duals = [Dual(x, t.to(dtype)) for x, t in zip(leaves, (q_dot, k_dot, v_dot), strict=True)]
        y = SDPA(*duals, mask.to(dtype), backend=backend)
        return y.primal, y.tangent.detach(), *torch.autograd.grad(y.primal, leaves, v_dot.to(dtype))

    exact = results("reference", torch.float64, seen)
    plain = results("reference", torch.float32, mask)
    for name, got, wanted, fp32 in zip(
        names, results(backend, torch.float32, mask), exact, plain, strict=True
    ):
        errors.check(name, got, wanted, errors.Yardstick.of(fp32, wanted))
    if value < 0:
        torch.testing.assert_close(exact[0][:, :, 2], v.double().mean(2))


@masking
def test_masks_of_large_numbers_leave_gradients_finite(backend):
    """Of -1e9, as many networks write it, in all of a row: fp32 rounds what is added to it away."""
    torch.manual_seed(0)
    x = torch.randn(3, 1, 2, 4, 16, requires_grad=True)
    mask = torch.zeros(4, 4)
    mask[1], mask[2, 1:] = -1e9, -1e9
    y = SDPA(Dual(x[0], x[1].detach()), x[1], x[2], mask, backend=backend).primal
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.isfinite().all() and y.isfinite().all()
    torch.testing.assert_close(y[:, :, 2], x[2][:, :, 0].detach())

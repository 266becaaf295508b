"""csrc/cpu/vec.h, through the operations: the contracts of its functions, rounding to bf16, and vectors that
are not full."""

import math

import pytest
import torch

import imf_kernels as ik
from imf_kernels import _C, Dual
from imf_kernels.backends import cpu
from tests.helpers.backends import ISAS, running_on

ULP = 2.0**-23  # of a value just above a power of two: the largest relative size of one ulp
LOWEST, HIGHEST = -87.33654, 88.72283  # where exp stops being a normal fp32 number


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    with running_on(f"cpu-{request.param}"):
        yield request.param


def exp_by_attention(x):
    """e^x of x ≤ 0: the weights of keys with logits x beside one with logit 0, over their sum.

    16 keys each, so that all lanes of a vector take part; the values are the identity.
    """
    logits = torch.nn.functional.pad(x.view(-1, 16), (1, 0))
    q, k = torch.ones(1, len(logits), 1, 1), logits.view(1, len(logits), 17, 1)
    v = torch.eye(17).expand(1, len(logits), 17, 17)
    return ik.scaled_dot_product_attention(q, k, v, scale=1.0, backend="cpu")[0, :, 0, 1:].flatten()


def relative_error(got, exact):
    return ((got.double() - exact) / exact).abs().max().item()


def test_exp_of_negative_numbers():
    """Where the sum of the weights rounds to 1 they are e^x itself: at most 2 ulp."""
    x = torch.cat([torch.linspace(LOWEST, -22.0, 1 << 16), torch.arange(-87.0, -22.0).repeat(16)])
    assert relative_error(exp_by_attention(x), x.double().exp()) <= 2 * ULP


def test_exp_of_small_numbers():
    """Above that, sum, quotient and product add half an ulp each."""
    x = torch.linspace(-22.0, 0.0, 1 << 14)
    weights = torch.nn.functional.pad(x.double().view(-1, 16), (1, 0)).softmax(-1)[:, 1:]
    # The error of a sum of 17 is that of its terms, and 4 additions along the vectors and across one.
    assert relative_error(exp_by_attention(x), weights.flatten()) <= (2 + 2 + 4 * 0.5 + 2 * 0.5) * ULP


def test_exp_of_positive_numbers():
    """silu(−x) = −x / (1 + e^x): at most 2 ulp of e^x, and half of one each for +, / and ·."""
    x = -torch.linspace(0.5, 87.0, 1 << 16)
    exact = x.double() / (1 + (-x.double()).exp())
    assert relative_error(ik.silu(x, backend="cpu"), exact) <= (2 + 3 * 0.5) * ULP


def test_exp_at_its_ends():
    below = torch.tensor([-87.34, -88.0, -104.0, -1e4, -1e30, -math.inf]).repeat(16)
    assert not exp_by_attention(below).any()
    above = -torch.tensor([88.73, 100.0, 1e4, 1e30]).repeat(16)  # e^x is inf, its sigmoid 0
    assert not ik.silu(above, backend="cpu").any()
    assert ik.silu(torch.tensor([-88.72]), backend="cpu").item() < 0
    assert exp_by_attention(torch.full((16,), math.nan)).isnan().all()
    assert (exp_by_attention(torch.zeros(16)) == torch.tensor(1.0) / 17).all()


def test_the_normal_distribution():
    """gelu(x) = x Φ(x): 3 ulp, below 0 x² / 2 more, and half of one for the product; and the derivative."""
    size = torch.cat([torch.linspace(0, 13.19, 1 << 16), torch.logspace(-30, 1, 1 << 12)])
    for x, allowed in ((size, 3.5), (-size, 3.5 + size.double().square() / 2)):
        exact = torch.special.erfc(-x.double() / math.sqrt(2)) / 2
        y = ik.gelu(Dual(x, torch.ones_like(x)), backend="cpu")
        ulps = (y.primal.double() - x.double() * exact).abs() / (size.double() * exact * ULP)
        assert (ulps <= allowed)[x != 0].all() and not y.primal[x == 0].any()
        slope = exact + x.double() * (-x.double().square() / 2).exp() / math.sqrt(2 * math.pi)
        assert (y.tangent - slope).abs().max() <= 2 * ULP


def test_the_normal_distribution_at_its_ends():
    far = torch.tensor([13.3, 40.0, 1e4, 3e38]).repeat(5)
    for x, wanted, slope in ((far, far, 1.0), (-far, 0 * far, 0.0)):
        y = ik.gelu(Dual(x, torch.ones_like(x)), backend="cpu")
        assert torch.equal(y.primal, wanted) and (y.tangent == slope).all()
    assert ik.gelu(torch.full((16,), -13.1), backend="cpu").all()
    assert ik.gelu(torch.full((16,), math.nan), backend="cpu").isnan().all()


def test_sines():
    """Through frequencies of 1: at most 2 ulp of 1 up to 8192, from where on they are the C library's."""
    t = torch.cat([torch.linspace(-8192, 8192, 1 << 16), torch.linspace(-7, 7, 1 << 14), torch.tensor([0.0])])
    got = ik.sinusoidal_embedding(t, 32, max_period=1.0, backend="cpu").double()
    assert (got[:, :16] - t.double().cos()[:, None]).abs().max() <= 2 * ULP / 2
    assert (got[:, 16:] - t.double().sin()[:, None]).abs().max() <= 2 * ULP / 2
    far = torch.tensor([8193.0, -1e5, 1e30, math.inf, math.nan])
    got = ik.sinusoidal_embedding(far, 8, max_period=1.0, backend="cpu")
    exact = torch.stack([far.double().cos(), far.double().sin()], 1).repeat_interleave(4, 1)
    torch.testing.assert_close(got, exact.float(), equal_nan=True, rtol=0, atol=1e-7)


def test_rounding_to_bf16_is_that_of_pytorch(isa):
    """Sums of any two of all bf16 values, infinities, denormals and NaN among them, bit by bit; the
    instruction of the sets with bf16 takes denormals for zero."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    x = bits.view(torch.bfloat16).repeat(8)
    near = (x.view(torch.int16).int() - 256 * torch.randint(0, 12, x.shape, generator=generator)).short()
    for other in (
        x[torch.randperm(len(x), generator=generator)],
        near.view(torch.bfloat16),
        torch.zeros_like(x),
    ):
        got = ik.gated_residual(x, other, torch.ones(len(x)), backend="cpu")
        exact = x.float() + other.float()
        if isa in ("avx512_bf16", "amx_bf16"):
            exact = exact.where(exact.abs() >= torch.finfo(torch.float32).tiny, exact * 0)
        wanted = exact.bfloat16()
        nan = wanted.isnan()
        assert torch.equal(got.isnan(), nan)
        assert torch.equal(got[~nan].view(torch.int16), wanted[~nan].view(torch.int16))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_partial_vectors_stay_inside(dtype, shift):
    """Counts × misalignments: the values before and after what is to be written are left alone."""
    for n in (*range(36), 63, 64, 65):
        room = n + shift + 33
        x, x_dot, y, y_dot = (torch.full((room,), 7.0, dtype=dtype) for _ in range(4))
        inside = slice(shift, shift + n)
        x[inside], x_dot[inside] = torch.linspace(-3, 3, n).to(dtype), torch.linspace(1, 2, n).to(dtype)
        _C.silu_forward(*(t[inside] for t in (x, x_dot, y, y_dot)))
        primal, tangent = torch.func.jvp(
            torch.nn.functional.silu, (x[inside].double(),), (x_dot[inside].double(),)
        )
        for got, wanted in ((y, primal), (y_dot, tangent)):
            torch.testing.assert_close(got[inside], wanted.to(dtype))
            assert (got[:shift] == 7).all() and (got[shift + n :] == 7).all()


@pytest.mark.parametrize("width", [*range(1, 36), 63, 65])
def test_rows_of_any_width(width):
    """Reductions over whole and partial vectors, from rows that begin anywhere."""
    room = torch.randn(5, width + 3, generator=torch.Generator().manual_seed(width))
    x, w = room[:, 1 : 1 + width], torch.linspace(0.5, 1.5, width)
    exact = torch.nn.functional.rms_norm(x.double(), (width,), w.double(), eps=1e-6)
    torch.testing.assert_close(ik.rms_norm(x, w, backend="cpu"), exact.float(), rtol=1e-6, atol=1e-6)

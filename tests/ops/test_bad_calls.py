"""Calls that must be refused: the type of error, and a message with operation, argument, wanted and got."""

import re

import pytest
import torch

import imf_kernels as ik
from imf_kernels import Dual
from imf_kernels.backends import operators
from imf_kernels.testing import errors
from imf_kernels.testing.cases import OPERATIONS, SMALL

SDPA = ik.scaled_dot_product_attention


def x(*shape):
    """Ones of a shape, then perhaps a dtype or a device."""
    *sizes, kind = (*shape, torch.float32) if not shape or isinstance(shape[-1], int) else shape
    return torch.ones(sizes).to(kind)


def transposed(*shape):
    return x(*shape).mT


HEADS = x(2, 3, 5, 8)
_fused = ik.gated_residual_rms_norm
BF16, FP64, INT, META = torch.bfloat16, torch.float64, torch.int64, "meta"
V, T, N = ValueError, TypeError, NotImplementedError

# (call, error, what the message says, with … for what stands between)
BAD_CALLS = {
    "linear": [
        (lambda: ik.linear(x(2, 4), x(3, 5)), V, "weight must be [out, in] with in = 4 … got [3, 5]"),
        (lambda: ik.linear(x(2, 4), x(4)), V, "weight must be [out, in] … got [4]"),
        (lambda: ik.linear(x(), x(3, 1)), V, "weight must be [out, in] … x []"),
        (lambda: ik.linear(x(2, 4), x(3, 4), x(4)), V, "bias must be [3] … got [4]"),
        (lambda: ik.linear(x(2, 4), x(3, 4, BF16)), T, "weight must be torch.float32 … bfloat16"),
        (lambda: ik.linear(x(2, 4, INT), x(3, 4)), T, "x must be of a floating-point … torch.int64"),
        (lambda: ik.linear(x(2, 4), x(3, 4, INT)), T, "weight must be of a floating-point … int64"),
        (lambda: ik.linear(x(2, 4), Dual(x(3, 4))), T, "weight carries no tangent … got a Dual"),
        (lambda: ik.linear(x(2, 4), x(3, 4), Dual(x(3))), T, "bias carries no tangent … got a Dual"),
        (lambda: ik.linear(x(2, 4), x(3, 4, META)), V, "weight must be on cpu … got meta"),
        (lambda: ik.linear([1.0], x(3, 4)), T, "x must be a tensor or a Dual … got list"),
        (lambda: ik.linear(x(2, 4), None), T, "weight must be a tensor … got NoneType"),
        (lambda: ik.linear(Dual(x(4), x(3)), x(3, 4)), V, "x is a single row … [4] … got [3]"),
    ],
    "rms_norm": [
        (lambda: ik.rms_norm(x(2, 4), x(5)), V, "weight must be [4] … x of shape [2, 4] … got [5]"),
        (lambda: ik.rms_norm(x(), x()), V, "x must have at least one dimension … got a scalar"),
        (lambda: ik.rms_norm(transposed(4, 2), x(4)), V, "last dimension of x … got [2, 4] … [1, 2]"),
        (lambda: ik.rms_norm(Dual(x(2, 4), transposed(4, 2)), x(4)), V, "last dimension of x_dot"),
        (lambda: ik.rms_norm(x(2, 4), x(4), dtype=FP64), T, "dtype must be that of x … got torch.float64"),
        (lambda: ik.rms_norm(x(2, 4, BF16), x(4), dtype=torch.float32), T, "dtype must be that of x"),
        (lambda: ik.rms_norm(x(2, 4, INT), x(4)), T, "x must be of a floating-point … torch.int64"),
        (lambda: ik.rms_norm(x(2, 4), x(4, INT)), T, "weight must be of a floating-point … torch.int64"),
        (lambda: ik.rms_norm(x(2, 4), Dual(x(4))), T, "weight carries no tangent … got a Dual"),
        (lambda: ik.rms_norm(x(2, 4), x(4, META)), V, "weight must be on cpu … got meta"),
        (lambda: ik.rms_norm(x(2, 4), x(4), -5), V, "eps must be finite and at least 0, got -5"),
        (lambda: ik.rms_norm(x(2, 4), x(4), "a"), T, "eps must be a number, got str"),
        (lambda: ik.rms_norm(Dual(x(4), x(3)), x(4)), V, "x is a single row … [4] … got [3]"),
    ],
    "layer_norm": [
        (lambda: ik.layer_norm(x(2, 4), [5]), V, "normalized_shape must be [4] … x of shape [2, 4], got [5]"),
        (lambda: ik.layer_norm(x(2, 4), (2, 4)), V, "normalized_shape must be [4] … got (2, 4); flatten x"),
        (lambda: ik.layer_norm(x(2, 4), 4), V, "normalized_shape must be [4] … got 4"),
        (lambda: ik.layer_norm(x(2, 4), x(4)), V, "normalized_shape must be [4] … got tensor"),
        (lambda: ik.layer_norm(x(), []), V, "x must have at least one dimension … got a scalar"),
        (lambda: ik.layer_norm(x(2, 4), [4], x(5)), V, "weight must be [4] … x of shape [2, 4] … got [5]"),
        (lambda: ik.layer_norm(x(2, 4), [4], x(4), x(2, 4)), V, "bias must be [4] … got [2, 4]"),
        (lambda: ik.layer_norm(x(2, 4), [4], Dual(x(4))), T, "weight carries no tangent … got a Dual"),
        (lambda: ik.layer_norm(x(2, 4), [4], None, Dual(x(4))), T, "bias carries no tangent … got a Dual"),
        (lambda: ik.layer_norm(x(2, 4), [4], x(4, INT)), T, "weight must be of a floating-point … int64"),
        (lambda: ik.layer_norm(x(2, 4), [4], x(4), x(4, META)), V, "bias must be on cpu … got meta"),
        (lambda: ik.layer_norm(x(2, 4, INT), [4]), T, "x must be of a floating-point … torch.int64"),
        (lambda: ik.layer_norm(transposed(4, 2), [4]), V, "last dimension of x … got [2, 4] … [1, 2]"),
        (lambda: ik.layer_norm(Dual(x(2, 4), transposed(4, 2)), [4]), V, "last dimension of x_dot"),
        (lambda: ik.layer_norm(Dual(x(4), x(3)), [4]), V, "x is a single row … [4] … got [3]"),
        (lambda: ik.layer_norm(x(2, 4), [4], eps=-5), V, "eps must be finite and at least 0, got -5"),
        (lambda: ik.layer_norm(x(2, 4), [4], dtype=FP64), T, "dtype must be that of x … got torch.float64"),
    ],
    "group_norm": [
        (lambda: ik.group_norm(x(4), 2), V, "input must be [N, C, ...], got [4]"),
        (lambda: ik.group_norm(x(2, 4, 3), 3), V, "num_groups must divide the 4 channels … [2, 4, 3], got 3"),
        (lambda: ik.group_norm(x(2, 4, 3), 0), V, "num_groups must divide the 4 channels … got 0"),
        (lambda: ik.group_norm(x(2, 4, 3), 2.0), T, "num_groups must be an integer, got float"),
        (lambda: ik.group_norm(x(2, 4, 3), 2, x(3)), V, "weight must be [4] … shape [2, 4, 3] … [3]"),
        (lambda: ik.group_norm(x(2, 4, 3), 2, x(4), x(4, 1)), V, "bias must be [4] … got [4, 1]"),
        (lambda: ik.group_norm(x(2, 4), 2, Dual(x(4))), T, "weight carries no tangent … got a Dual"),
        (lambda: ik.group_norm(x(2, 4), 2, None, x(4, INT)), T, "bias must be of a floating-point … int64"),
        (lambda: ik.group_norm(x(2, 4), 2, x(4, META)), V, "weight must be on cpu … got meta"),
        (lambda: ik.group_norm(x(2, 4, INT), 2), T, "input must be of a floating-point … torch.int64"),
        (lambda: ik.group_norm(x(2, 4), 2, eps=-1), V, "eps must be finite and at least 0, got -1"),
        (lambda: ik.group_norm(x(2, 4), 2, activation="gelu"), V, "activation must be None or 'silu'"),
    ],
    "layer_norm_modulate": [
        (lambda: modulate(x(4)), V, "x must be [B, ..., d], got [4]"),
        (lambda: modulate(shift=x(4)), V, "shift must be [3, 4] … x of shape [3, 2, 4], got [4]"),
        (lambda: modulate(scale=x(3, 2, 4)), V, "scale must be [3, 4], a row per sample … got [3, 2, 4]"),
        (lambda: modulate(scale=Dual(x(2, 4))), V, "scale must be [3, 4] … got [2, 4]"),
        (lambda: modulate(scale=1.0), T, "scale must be a tensor or a Dual, got float"),
        (lambda: modulate(shift=x(3, 4, INT)), T, "shift must be of a floating-point … int64"),
        (lambda: modulate(shift=x(3, 4, META)), V, "shift must be on cpu … got meta"),
        (lambda: modulate(x(3, 2, 4, INT)), T, "x must be of a floating-point … torch.int64"),
        (lambda: modulate(transposed(3, 4, 2)), V, "last dimension of x … got [3, 2, 4]"),
        (lambda: modulate(Dual(x(3, 2, 4), transposed(3, 4, 2))), V, "last dimension of x_dot"),
        (lambda: modulate(eps="a"), T, "eps must be a number, got str"),
        (lambda: modulate(x(3, 2, 4, BF16), dtype=torch.float32), T, "dtype must be that of x"),
    ],
    "qk_norm_rope": [
        (lambda: rope(qkv=x(2, 5, 8)), V, "qkv must be … third of them of keys … got [2, 5, 8]"),
        (lambda: rope(qkv=x(2, 6, 72)), V, "qkv must be [B, L, N D] … with L = 5 … got [2, 6, 72]"),
        (lambda: rope(qkv=x(12, 72)), V, "or [B · L, N D] with L = 5 … got [12, 72]"),
        (lambda: rope(qkv=x(2, 5, 9, 8)), V, "qkv must be … got [2, 5, 9, 8]"),
        (lambda: rope(kv_heads=5), V, "of queries, then 5 of keys … got [2, 5, 72]"),
        (lambda: rope(kv_heads=0), V, "of queries, then 0 of keys … got [2, 5, 72]"),
        (lambda: rope(qkv=Dual(x(10, 72), x(3, 72))), V, "tangent of qkv … of 5 rows each, got [3, 72]"),
        (lambda: rope(q_weight=x(7)), V, "q_weight must be [D] with an even D, got [7]"),
        (lambda: rope(k_weight=x(4)), V, "k_weight must be [8] … got [4]"),
        (lambda: rope(cos=x(4)), V, "cos must be [L, D / 2], got [4]"),
        (lambda: rope(sin=x(5, 8)), V, "sin must be [5, 4] … got [5, 8]"),
        (lambda: rope(qkv=x(2, 5, 72).long()), T, "qkv must be of a floating-point … torch.int64"),
        (lambda: rope(cos=x(5, 4, INT)), T, "cos must be of a floating-point … torch.int64"),
        (lambda: rope(q_weight=Dual(x(8))), T, "q_weight carries no tangent … got a Dual"),
        (lambda: rope(cos=x(5, 4, META)), V, "cos must be on cpu … got meta"),
    ],
    "scaled_dot_product_attention": [
        (lambda: SDPA(x(2, 5, 8), HEADS, HEADS), V, "query must be [B, H, L, D] … got [2, 5, 8]"),
        (lambda: SDPA(HEADS, x(2, 5, 3, 8), x(2, 5, 3, 8)), V,
         "key must be [2, 3, L, 8] … query of shape … got [2, 5, 3, 8]; did you pass [B, L, H, D]?"),
        (lambda: SDPA(HEADS, HEADS, HEADS, x(1, 2, 3, 5, 5)), V,
         "attn_mask must broadcast to … [2, 3, 5, 5], got [1, 2, 3, 5, 5]"),
        (lambda: SDPA(HEADS, x(2, 3, 5, 4), HEADS), V, "key must be [2, 3, L, 8] … got [2, 3, 5, 4]"),
        (lambda: SDPA(HEADS, x(1, 3, 5, 8), HEADS), V, "key must be [2, 3, L, 8] … got [1, 3, 5, 8]"),
        (lambda: SDPA(HEADS, HEADS, x(2, 3, 6, 8)), V, "value must be [2, 3, 5, D] … got [2, 3, 6, 8]"),
        (lambda: SDPA(HEADS, HEADS.bfloat16(), HEADS), T, "key must be torch.float32 … torch.bfloat16"),
        (lambda: SDPA(HEADS, HEADS, HEADS.double()), T, "value must be torch.float32 … torch.float64"),
        (lambda: SDPA(HEADS, HEADS, HEADS.long()), T, "value must be of a floating-point … torch.int64"),
        (lambda: SDPA(HEADS, HEADS, HEADS.to("meta")), V, "value must be on cpu … got meta"),
        (lambda: SDPA(transposed(2, 3, 8, 5), HEADS, HEADS), V, "last dimension of query … strides"),
        (lambda: SDPA(HEADS, Dual(HEADS, transposed(2, 3, 8, 5)), HEADS), V, "dimension of key_dot"),
        (lambda: SDPA(HEADS, HEADS, HEADS, [1.0]), T, "attn_mask must be a tensor, got list"),
        (lambda: SDPA(HEADS, HEADS, HEADS, Dual(x(5, 5))), T, "attn_mask carries no tangent … got a Dual"),
        (lambda: SDPA(HEADS, HEADS, HEADS, x(5, 5, INT)), T, "attn_mask must be bool … got torch.int64"),
        (lambda: SDPA(HEADS, HEADS, HEADS, x(5, 5, BF16)), T, "attn_mask must be bool … got torch.bfloat16"),
        (lambda: SDPA(HEADS, HEADS, HEADS, x(5, 5).requires_grad_()), V,
         "attn_mask requires grad … .detach()"),
        (lambda: SDPA(HEADS, HEADS, HEADS, x(5, 4)), V,
         "attn_mask must broadcast to … [2, 3, 5, 5], got [5, 4]"),
        (lambda: SDPA(HEADS, HEADS, HEADS, x(5, 5, META)), V, "attn_mask must be on cpu … got meta"),
        (lambda: SDPA(HEADS, HEADS, HEADS, x(5, 5), is_causal=True), V, "is_causal is a mask already"),
        (lambda: SDPA(HEADS, HEADS, HEADS, None, 0.1), N, "dropout_p is not supported"),
        (lambda: SDPA(HEADS, HEADS, HEADS, scale=x()), T, "scale must be a number, got Tensor"),
        (lambda: SDPA(HEADS, HEADS, HEADS, scale=float("nan")), V, "scale must be finite, got nan"),
        (lambda: SDPA(HEADS, x(2, 1, 5, 8), x(2, 1, 5, 8)), V, "key must be [2, 3, L, 8] … got [2, 1, 5, 8]"),
        (lambda: SDPA(HEADS, x(2, 2, 5, 8), x(2, 2, 5, 8), enable_gqa=True), V,
         "key must be … got [2, 2, 5, 8]; with enable_gqa H must divide 3"),
        (lambda: SDPA(HEADS, x(2, 1, 5, 8), HEADS, enable_gqa=True), V,
         "value must be [2, 1, 5, D] … got [2, 3, 5, 8]"),
    ],
    "swiglu": [
        (lambda: ik.swiglu(x(2, 5)), V, "the last dimension of x … must be even … got [2, 5]"),
        (lambda: ik.swiglu(x()), V, "the last dimension of x … got []"),
        (lambda: ik.swiglu(transposed(4, 2)), V, "last dimension of x must be contiguous … got [2, 4]"),
        (lambda: ik.swiglu(x(2, 4, INT)), T, "x must be of a floating-point … torch.int64"),
        (lambda: ik.swiglu(Dual(x(4), x(3))), V, "x is a single row … [4] … got [3]"),
    ],
    "gated_residual": [
        (lambda: ik.gated_residual(x(2, 4), x(4), x(4)), V, "branch must be [2, 4] … got [4]"),
        (lambda: ik.gated_residual(x(2, 4), x(2, 4), x(3, 4)), V,
         "gate must be [4] or, a row per sample, [2, 4], … x of shape [2, 4]; got [3, 4]"),
        (lambda: ik.gated_residual(x(4), x(4), x(4, 4)), V, "gate must be [4], … got [4, 4]"),
        (lambda: ik.gated_residual(HEADS, HEADS, Dual(HEADS)), V, "gate must be [8] … got [2, 3, 5, 8]"),
        (lambda: ik.gated_residual(x(), x(), x()), V, "x must have at least one dimension"),
        (lambda: ik.gated_residual(x(2, 4, BF16), x(2, 4), x(4)), T,
         "branch must be of x's dtype … got torch.float32 for torch.bfloat16"),
        (lambda: ik.gated_residual(x(2, 4), x(2, 4), Dual(x(4))), T, "gate [d] carries no tangent"),
        (lambda: ik.gated_residual(x(2, 4), x(2, 4), x(4, INT)), T, "gate must be of a floating-point"),
        (lambda: ik.gated_residual(x(2, 4), transposed(4, 2), x(4)), V, "last dimension of branch"),
        (lambda: ik.gated_residual(x(2, 4), x(2, 4, META), x(4)), V, "branch must be on cpu"),
        (lambda: ik.gated_residual(x(4), Dual(x(4), x(1)), x(4)), V, "branch is a single row … got [1]"),
    ],
    "gated_residual_rms_norm": [
        (lambda: _fused(x(2, 4), x(4), x(4), x(4)), V, "branch must be [2, 4] … got [4]"),
        (lambda: _fused(x(2, 4), x(2, 4), x(2, 4), x(4)), V, "gate must be [4] … got [2, 4]"),
        (lambda: _fused(x(2, 4), x(2, 4), x(4), x(3)), V, "weight must be [4] … got [3]"),
        (lambda: _fused(x(2, 4), x(2, 4), Dual(x(4)), x(4)), T, "gate carries no tangent"),
        (lambda: _fused(x(2, 4), x(2, 4), x(4), x(4, INT)), T, "weight must be of a floating-point"),
        (lambda: _fused(x(), x(), x(), x()), V, "x must have at least one dimension"),
        (lambda: _fused(x(2, 4, BF16), x(2, 4), x(4), x(4)), T,
         "branch must be of x's dtype … got torch.float32 for torch.bfloat16"),
        (lambda: _fused(x(2, 4), x(2, 4), x(4), x(4), -1.0), V, "eps must be finite and at least 0"),
        (lambda: _fused(x(2, 4), transposed(4, 2), x(4), x(4)), V, "last dimension of branch"),
    ],
    "gelu": [
        (lambda: ik.gelu(x(4, INT)), T, "x must be of a floating-point … torch.int64"),
        (lambda: ik.gelu([1.0]), T, "x must be a tensor or a Dual … got list"),
        (lambda: ik.gelu(x(4), approximate="erf"), V, "approximate must be 'none' or 'tanh', got 'erf'"),
        (lambda: ik.gelu(x(4), approximate=True), V, "approximate must be 'none' or 'tanh', got True"),
    ],
    "silu": [
        (lambda: ik.silu(x(4, INT)), T, "x must be of a floating-point … torch.int64"),
        (lambda: ik.silu(x(4, torch.complex64)), T, "x must be of a floating-point … complex"),
        (lambda: ik.silu(3.0), T, "x must be a tensor or a Dual … got float"),
    ],
    "sinusoidal_embedding": [
        (lambda: ik.sinusoidal_embedding(x(2, 1), 8), V, "t must be [B] … got [2, 1]"),
        (lambda: ik.sinusoidal_embedding(x(2), 7), V, "dim must be an even int … got 7"),
        (lambda: ik.sinusoidal_embedding(x(2), 0), V, "dim must be an even int … got 0"),
        (lambda: ik.sinusoidal_embedding(x(2), "8"), V, "dim must be an even int … got '8'"),
        (lambda: ik.sinusoidal_embedding(x(2), 8, 0), V, "max_period must be finite and at least 1, got 0"),
        (lambda: ik.sinusoidal_embedding(torch.arange(2), 8), T, "t must be of a floating-point … int64"),
    ],
    "prepend_tokens": [
        (lambda: prepend(x(4, 8)), V, "x must be [B, N, d] … got [4, 8]"),
        (lambda: prepend(tokens=x(2, 7)), V, "tokens of group 0 must be [n, 8] … got [2, 7]"),
        (lambda: prepend(embedding=x(2, 8)), V, "embedding of group 0 must be [3, 8] … got [2, 8]"),
        (lambda: prepend(tokens=x(2, 8, BF16)), T, "tokens of group 0 must be torch.float32 … bfloat16"),
        (lambda: prepend(embedding=x(3, 8, FP64)), T, "embedding of group 0 must be … float64"),
        (lambda: prepend(tokens=Dual(x(2, 8))), T, "tokens of group 0 carries no tangent … got a Dual"),
        (lambda: prepend(embedding=x(3, 8, META)), V, "embedding of group 0 must be on cpu"),
        (lambda: prepend(x(3, 4, 8, INT)), T, "x must be of a floating-point … torch.int64"),
    ],
}  # fmt: skip


def modulate(sequence=None, shift=None, scale=None, **options):
    rows = (x(3, 4) if row is None else row for row in (shift, scale))
    return ik.layer_norm_modulate(x(3, 2, 4) if sequence is None else sequence, *rows, **options)


def rope(**arguments):
    weights = {"q_weight": x(8), "k_weight": x(8), "cos": x(5, 4), "sin": x(5, 4)}
    good = {"qkv": x(2, 5, 72), **weights}
    return ik.qk_norm_rope(**good | arguments)


def prepend(sequence=None, tokens=None, embedding=None):
    given = (x(2, 8) if tokens is None else tokens, x(3, 8) if embedding is None else embedding)
    return ik.prepend_tokens(x(3, 4, 8) if sequence is None else sequence, [given])


def test_the_calls_above_are_good_but_for_one_thing():
    assert set(BAD_CALLS) == set(OPERATIONS)
    rope(), prepend(), modulate(), SDPA(HEADS, HEADS, HEADS)


@pytest.mark.parametrize(
    ("operation", "call", "error", "said"),
    [
        pytest.param(operation, call, error, said.split(" … "), id=f"{operation}: {said.replace(' …', ',')}")
        for operation, calls in BAD_CALLS.items()
        for call, error, said in calls
    ],
)
def test_refused(operation, call, error, said):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(f"{operation}: ")
    for part in said:
        assert part in message
        message = message.partition(part)[2]


@pytest.mark.parametrize("case", {case.operation: case for case in SMALL}.values(), ids=str)
def test_backends_that_cannot(case):
    """An unknown backend, and the kernels on types and devices that they do not have, say so by name."""
    p = errors.problem(case, case.dtypes[0])
    start = re.escape(case.operation)
    with pytest.raises(ValueError, match=f"{start}: backend must be one of 'cpu',.* 'reference', got 'gpu'"):
        case.run(p.primals, "gpu")
    if operators.OPERATIONS[case.operation].backends[0].name != "cpu":
        return  # plain PyTorch, which runs everywhere
    doubles = {n: t.double() for n, t in p.primals.items()}
    with pytest.raises(RuntimeError, match=f"{start}: backend 'cpu' cannot run: it takes float32 .* float64"):
        case.run(doubles, "cpu")
    for y in case.run(doubles, None):
        assert y.dtype == torch.float64
    meta = {n: t.to("meta") for n, t in p.primals.items()}
    with pytest.raises(
        RuntimeError, match=f"{start}: backend 'cpu' cannot run: it takes CPU tensors, .* meta"
    ):
        case.run(meta, "cpu")
    assert [y.shape for y in case.run(meta, None)] == [torch.Size(shape) for shape in case.outputs]

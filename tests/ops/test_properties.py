"""What holds for any data: zero, linear, short and missing tangents, the adjoint, repeatability."""

import pytest
import torch

from imf_kernels import Dual
from imf_kernels.testing import errors
from imf_kernels.testing.cases import FP32, SMALL
from tests.helpers.backends import BACKENDS

# One case an operation and data type, with a batch of several rows.
NAMES = {
    "linear square", "rms_norm width 33", "rms_norm fp32 stream", "rms_norm fp32 stream to fp16",
    "layer_norm width 33", "layer_norm_modulate width 33", "layer_norm_modulate fp32 stream",
    "group_norm channels last with silu",
    "qk_norm_rope digits", "swiglu width 37",
    "scaled_dot_product_attention other value width", "scaled_dot_product_attention offset 4",
    "gated_residual width 45", "gated_residual fp32 stream", "gated_residual a gate a sample",
    "gated_residual_rms_norm width 45", "gelu matrix",
    "gelu tanh", "silu matrix", "sinusoidal_embedding dim 256",
    "prepend_tokens four groups",
}  # fmt: skip
CHOSEN = [case for case in SMALL if str(case) in NAMES]
assert len(CHOSEN) == len(NAMES)
each = pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(case, dtype, id=f"{case}, {str(dtype)[6:]}") for case in CHOSEN for dtype in case.dtypes],
)
on_each_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


def run(p, backend, tangents, gradients=True):
    return errors.evaluate(p.case, p.primals, tangents, p.cotangents if gradients else None, backend)


def split(results):
    """Tangents, and everything else."""
    tangents = {name: x for name, x in results.items() if name.startswith("tangent")}
    return tangents, {name: x for name, x in results.items() if name not in tangents}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@on_each_backend
@each
def test_the_primal_does_not_feel_the_tangent(case, dtype, backend):
    """Outputs and gradients are bitwise equal with all tangents, with some rows' or none; and again."""
    p = errors.problem(case, dtype)
    _, alone = split(run(p, backend, {}))
    for rows in (None, 0, 1, case.batch):
        tangents = {n: t if rows is None else t[t.shape[0] - rows :] for n, t in p.tangents.items()}
        first, second = run(p, backend, tangents), run(p, backend, tangents)
        assert_equal(first, second)
        assert_equal(split(first)[1], alone)


@on_each_backend
@each
def test_a_zero_tangent_gives_exact_zeros(case, dtype, backend):
    p = errors.problem(case, dtype)
    tangents, _ = split(run(p, backend, {n: torch.zeros_like(t) for n, t in p.tangents.items()}, False))
    assert tangents and not any(t.any() for t in tangents.values())


@on_each_backend
@each
def test_tangents_of_the_last_rows_are_the_last_rows_of_the_tangents(case, dtype, backend):
    """n rows stored (0, 1, all, and different ones of two arguments) against zeros stored for the others."""
    p = errors.problem(case, dtype)
    batch, first = case.batch, next(iter(p.tangents))
    for rows in (0, 1, batch - 1, batch):
        short = {n: t[batch - rows :] for n, t in p.tangents.items()}
        for stored in (short, short | {first: p.tangents[first]}):
            padded = {
                n: torch.cat([torch.zeros_like(p.tangents[n][: batch - len(t)]), t])
                for n, t in stored.items()
            }
            got, _ = split(run(p, backend, stored, False))
            expected, _ = split(run(p, backend, padded, False))
            assert got.keys() == expected.keys()
            for name, t in got.items():
                n = t.shape[0]
                assert n == max(len(x) for x in stored.values())
                assert not expected[name][: batch - n].any()
                # PyTorch's products and sums of other sizes may add in another order.
                others = case.operation == "linear" or (
                    case.operation in ("scaled_dot_product_attention", "group_norm")
                    and backend == "reference"
                )
                tolerance = 4 * torch.finfo(dtype).eps if others else 0
                tail = expected[name][batch - n :]
                torch.testing.assert_close(t, tail, rtol=tolerance, atol=tolerance)


@on_each_backend
@each
def test_no_tangent_at_all(case, dtype, backend):
    """A Dual without a tangent gives a Dual without one; tensors give tensors."""
    p = errors.problem(case, dtype)
    duals = {n: Dual(x) if n in p.tangents else x for n, x in p.primals.items()}
    for y, alone in zip(
        case.run(duals, backend, **case.output_options),
        case.run(p.primals, backend, **case.output_options),
        strict=True,
    ):
        assert isinstance(y, Dual) and y.tangent is None and y.tangent_rows is None
        assert isinstance(alone, torch.Tensor) and torch.equal(y.primal, alone)


@on_each_backend
@each
def test_linear_in_the_tangent(case, dtype, backend):
    """J(2 x − z / 2) = 2 J x − J z / 2, up to the rounding of the results."""
    p, other = errors.problem(case, dtype), errors.problem(case, dtype, 1)
    x, z = p.tangents, other.tangents
    # Values cut to few bits, so that the sum of the tangents itself is not rounded.
    cut = {n: (t * 8).round() / 8 for n, t in x.items()}, {n: (t * 8).round() / 8 for n, t in z.items()}
    both = {n: 2 * cut[0][n] - cut[1][n] / 2 for n in x}
    combined = split(run(p, backend, both, False))[0]
    parts = [split(run(p, backend, c, False))[0] for c in cut]
    for name, got in combined.items():
        expected = 2 * parts[0][name].double() - parts[1][name].double() / 2
        scale = max(errors.rms(part[name]) for part in parts)
        assert errors.rms(got.double() - expected) <= 8 * torch.finfo(got.dtype).eps * scale * offset_loss(
            case
        )


@on_each_backend
@each
def test_backward_is_the_adjoint_of_forward(case, dtype, backend):
    """⟨dy, J ẋ⟩ = ⟨Jᵀ dy, ẋ⟩, up to the rounding of the terms."""
    p = errors.problem(case, dtype)
    results = run(p, backend, p.tangents)
    forward = [results[f"tangent {i}"].double() * c.double() for i, c in enumerate(p.cotangents)]
    backward = [results[f"gradient of {n}"].double() * t.double() for n, t in p.tangents.items()]
    terms = sum(t.square().sum() for t in (*forward, *backward)).sqrt()
    coarsest = max(torch.finfo(x.dtype).eps for x in results.values())
    difference = sum(t.sum() for t in forward) - sum(t.sum() for t in backward)
    assert difference.abs() <= 4 * coarsest * terms * offset_loss(case)


def offset_loss(case):
    """By how much an offset of the keys makes fp32 sums lose: the values cancel to 1/offset² of the terms."""
    return max(1.0, *(x.offset**2 for x in case.inputs.values()))


@pytest.mark.operation("scaled_dot_product_attention")
@pytest.mark.parametrize("name", ["length 276", "offset 4"])
def test_tangents_of_the_arguments_add_up(name, kernels):
    """The paths with fewer products than all three tangents take: their results sum to the whole."""
    case = next(c for c in SMALL if str(c) == f"scaled_dot_product_attention {name}")
    p = errors.problem(case, FP32)
    whole = split(run(p, kernels, p.tangents, False))[0]["tangent 0"]
    parts = [split(run(p, kernels, {n: t}, False))[0]["tangent 0"] for n, t in p.tangents.items()]
    torch.testing.assert_close(sum(parts), whole, rtol=0, atol=2e-6 * offset_loss(case))

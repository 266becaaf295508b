"""Every operation with each of its dimensions 0 and 1: nothing in, nothing out; a sum of nothing is zero."""

import pytest

from imf_kernels.testing import cases, errors
from imf_kernels.testing.cases import FP32

# By operation: a case of its dimensions, and dimensions that are neither 0 nor 1.
DIMENSIONS = {
    "linear": (lambda b, n, d, out: cases.linear("", b, n, width=d, out=out), (3, 2, 7, 5)),
    "rms_norm": (lambda b, n, d: cases.rms_norm("", b, n, width=d), (3, 2, 7)),
    "layer_norm": (lambda b, n, d: cases.layer_norm("", b, n, width=d), (3, 2, 7)),
    "group_norm": (
        lambda n, groups, width, h, w: cases.group_norm("", n, groups * width, h, w, groups=max(groups, 1)),
        (3, 2, 3, 4, 5),
    ),
    "group_norm, channels last": (
        lambda n, groups, width, h, w: cases.group_norm(
            "", n, groups * width, h, w, groups=max(groups, 1), silu=True, x={"channels_last": True}
        ),
        (3, 2, 3, 4, 5),
    ),
    "layer_norm_modulate": (lambda b, n, d: cases.layer_norm_modulate("", b, n, width=d), (3, 2, 7)),
    "qk_norm_rope": (
        # The row of a projection without heads, or of heads without width, does not tell which it is.
        lambda b, h, kv_heads, n, pairs: cases.qk_norm_rope(
            "", b, max(h, 1), n, 2 * max(pairs, 1), max(kv_heads, 1)
        ),
        (3, 4, 2, 5, 9),
    ),
    "scaled_dot_product_attention": (
        lambda b, h, n, keys, d, value: cases.attention("", b, h, n, d, keys, value),
        (3, 2, 4, 5, 7, 6),
    ),
    "scaled_dot_product_attention, causal": (
        lambda b, h, n, keys, d, value: cases.attention("", b, h, n, d, keys, value, is_causal=True),
        (3, 2, 4, 5, 7, 6),
    ),
    "swiglu": (lambda b, n, d: cases.swiglu("", b, n, width=d), (3, 2, 7)),
    "gated_residual": (lambda b, n, d: cases.gated_residual("", b, n, width=d), (3, 2, 7)),
    "gated_residual, a gate a sample": (
        lambda b, n, d: cases.gated_residual(
            "", b, n, width=d, gate_a_sample=True, tangents=("x", "branch", "gate")
        ),
        (3, 2, 7),
    ),
    "gated_residual_rms_norm": (lambda b, n, d: cases.gated_residual_rms_norm("", b, n, width=d), (3, 2, 7)),
    "gelu": (lambda b, n, d: cases.gelu("", b, n, d), (3, 2, 7)),
    "gelu, tanh": (lambda b, n, d: cases.gelu("", b, n, d, approximate="tanh"), (3, 2, 7)),
    "silu": (lambda b, n, d: cases.silu("", b, n, d), (3, 2, 7)),
    "sinusoidal_embedding": (lambda b: cases.sinusoidal_embedding("", b, 6), (3,)),
    "prepend_tokens": (
        lambda b, n, d, count, other: cases.prepend_tokens("", b, n, d, (count, other)),
        (3, 2, 7, 4, 5),
    ),
}


def _cases():
    for operation, (make, sizes) in DIMENSIONS.items():
        changed = {tuple(size for _ in sizes) for size in (0, 1)}
        changed |= {(*sizes[:i], size, *sizes[i + 1 :]) for i in range(len(sizes)) for size in (0, 1)}
        for dimensions in sorted(changed):
            yield pytest.param(make(*dimensions), id=f"{operation} {'x'.join(map(str, dimensions))}")


def test_every_operation_is_here():
    assert {name.partition(",")[0] for name in DIMENSIONS} == set(cases.OPERATIONS)


@pytest.mark.parametrize("case", list(_cases()))
def test_dimensions_of_0_and_1(case, backend):
    """Results, tangents of all samples and of the last, and gradients, against the reference in float64."""
    for rows in {None, min(1, case.batch)}:
        errors.check_case(case.with_rows(rows), FP32, backend)

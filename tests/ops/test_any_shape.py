"""The error rule on shapes that nobody chose."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from imf_kernels.backends import cpu
from imf_kernels.testing import cases, errors
from imf_kernels.testing.cases import BF16

few, many = st.integers(1, 4), st.integers(1, 70)


@st.composite
def any_case(draw):
    b, h, n, width, other = (draw(s) for s in (few, few, many, many, many))
    make = draw(
        st.sampled_from(
            [
                lambda: cases.linear("any", b, n, width=width, out=other),
                lambda: cases.rms_norm("any", b, n, width=width),
                lambda: cases.layer_norm("any", b, n, width=width),
                lambda: cases.layer_norm_modulate("any", b, n, width=width),
                lambda: cases.group_norm(
                    *("any", b, h * other, n, width),
                    groups=h,
                    silu=draw(st.booleans()),
                    x={"channels_last": draw(st.booleans())},
                ),
                lambda: cases.swiglu("any", b, n, width=width),
                lambda: cases.gated_residual("any", b, n, width=width),
                lambda: cases.gated_residual(
                    *("any", b, n), width=width, gate_a_sample=True, tangents=("x", "branch", "gate")
                ),
                lambda: cases.gated_residual_rms_norm("any", b, n, width=width),
                lambda: cases.gelu("any", b, n, width),
                lambda: cases.silu("any", b, n, width),
                lambda: cases.qk_norm_rope("any", b, h, n, 2 * width),
                lambda: cases.attention(
                    *("any", b, h, n, width, draw(st.integers(1, 300)), other),
                    tangents=draw(st.lists(st.sampled_from(["query", "key", "value"]), unique=True)),
                ),
            ]
        )
    )
    return dataclasses.replace(make(), tangent_rows=draw(st.integers(0, b)))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(case=any_case())
def test_any_shape(case):
    """Shapes nobody thought of, in bf16, where rounding outweighs what luck PyTorch's fp32 has."""
    p = errors.Problem.draw(case, BF16, seed=0)
    for isa in cpu.instruction_sets():
        with cpu.use_instruction_set(isa):
            p.check(p.evaluate("cpu"))

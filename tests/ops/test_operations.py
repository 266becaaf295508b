"""Every operation keeps the error rule on every backend; the reference is tied to PyTorch's own functions."""

import math

import pytest
import torch
import torch.nn.functional as F

import imf_kernels as ik
from imf_kernels.testing import errors, plain
from imf_kernels.testing.cases import LARGE, LONG, OPERATIONS, SMALL
from tests.helpers.backends import BACKENDS, KERNELS, NO_OPERATIONS, dtypes_of

CASES = [pytest.param(case, dtype, id=f"{case}, {str(dtype)[6:]}") for case in SMALL for dtype in case.dtypes]
SDPA = "scaled_dot_product_attention"


def check_or_refuse(case, dtype, backend):
    if backend in case.refused_by:
        with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot run"):
            errors.check_case(case, dtype, backend)
        return
    errors.check_case(case, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_error_rule(case, dtype, backend):
    check_or_refuse(case, dtype, backend)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", KERNELS, indirect=True)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_error_rule_in_the_shapes_of_training(case, kernels):
    check_or_refuse(case, dtypes_of(case, kernels)[-1], kernels)


def _long():
    for case in LONG:
        marks = () if "4,096" in case.name else pytest.mark.slow
        for dtype in case.dtypes:
            yield pytest.param(case, dtype, id=f"{case}, {str(dtype)[6:]}", marks=marks)


@pytest.mark.parametrize("kernels", KERNELS, indirect=True)
@pytest.mark.parametrize(("case", "dtype"), list(_long()))
def test_error_rule_of_long_sums(case, dtype, kernels):
    check_or_refuse(case, dtype, kernels)


def test_the_plain_formulas_are_pytorchs():
    x, w, b = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 5, 8), (8,), (8,)))
    torch.testing.assert_close(plain.rms_norm(x, w), F.rms_norm(x, (8,), w, 1e-6))
    torch.testing.assert_close(plain.layer_norm(x, w, b, (8,)), F.layer_norm(x, (8,), w, b))
    torch.testing.assert_close(
        plain.group_norm(x.mT, w, b, 2, activation="silu"), F.silu(F.group_norm(x.mT.contiguous(), 2, w, b))
    )
    shift, scale = torch.randn(2, 3, 1, 8, dtype=torch.float64)
    modulated = F.layer_norm(x, (8,), eps=1e-6) * (1 + scale) + shift
    torch.testing.assert_close(plain.layer_norm_modulate(x, shift[:, 0], scale[:, 0]), modulated)
    qkv, angles = torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    q, _, v = qkv[:, None].chunk(3, -1)
    n = F.rms_norm(q, (8,), w, 1e-6)
    turned = torch.view_as_complex(n.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    rotated, _, values = plain.qk_norm_rope(qkv, w, w, angles.cos(), angles.sin())
    torch.testing.assert_close(rotated, torch.view_as_real(turned).flatten(-2))
    torch.testing.assert_close(values, v)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_reference_is_what_pytorch_derives(case):
    """In fp64: output, torch.func.jvp of plain functions, and autograd through them, to 1e-12."""
    p = errors.problem(case, case.dtypes[0])
    constants = {n: x for n, x in p.primals.items() if not x.is_floating_point()}
    names = [n for n in p.primals if n not in constants]
    primals = [p.primals[n].double().requires_grad_(n in case.differentiable) for n in names]
    directions = [p.tangents[n].double() if n in p.tangents else torch.zeros_like(p.primals[n]).double()
                  for n in names]  # fmt: skip

    formula = plain.formula(case, rounded=False)

    def of(*arguments):
        named = dict(zip(names, arguments, strict=True)) | constants
        return formula({n: named[n] for n in p.primals})

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        outputs, tangents = torch.func.jvp(of, tuple(x.detach() for x in primals), tuple(directions))
        wanted = [x for x in primals if x.requires_grad]
        gradients = torch.autograd.grad(
            of(*primals), wanted, [c.double() for c in p.cotangents], materialize_grads=True
        )
    expected = {f"output {i}": y for i, y in enumerate(outputs)}
    expected |= {f"tangent {i}": t for i, t in enumerate(tangents)}
    expected |= {f"gradient of {n}": g for n, g in zip(case.differentiable, gradients, strict=True)}
    for name, value in expected.items():
        if name not in p.exact or not value.numel():  # a structural zero, or nothing
            assert not value.any()
            continue
        # The reference of the tangent takes sums in another order: relative to the largest term of them.
        size = max(1.0, value.abs().max().item(), 1e4 * (case.name == "logits of 1e4"))
        torch.testing.assert_close(
            p.exact[name], value, rtol=0, atol=1e-12 * size, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_every_public_operation_has_cases():
    assert set(OPERATIONS) == set(ik.__all__) - NO_OPERATIONS <= set(vars(plain))
    assert {case.operation for case in LARGE} == set(OPERATIONS)


def test_rope_tables_are_rotations():
    cos, sin = ik.rope_tables(36, 64)
    assert cos.shape == sin.shape == (36, 32) and cos.dtype == torch.float32
    angles = torch.arange(36).double()[:, None] * 10000.0 ** (-torch.arange(32).double() / 32)
    torch.testing.assert_close(cos.double(), angles.cos(), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin.double(), angles.sin(), rtol=0, atol=1e-7)


def test_work_is_counted_by_the_tangents():
    """What benchmarks divide by: 2, 4 and 6 products in attention, nothing for structural zeros."""
    by_name = {case.name: case for case in SMALL if case.operation == SDPA}
    case, q_only = by_name["digits"], by_name["offset 4 of keys, tangents of q"]
    product = 2 * math.prod((2, 2, 36, 36, 64))
    assert case.count_flops(dual=False) == 2 * product and case.count_flops(dual=True) == 6 * product
    assert q_only.count_flops(dual=True) == 2 * q_only.count_flops(dual=False)
    assert case.with_rows(0).count_flops(dual=True) == case.count_flops(dual=False)
    assert case.count_bytes(torch.bfloat16, dual=False) == 4 * 2 * 2 * 2 * 36 * 64
    assert case.count_bytes(torch.float32, dual=True) == 2 * case.count_bytes(torch.float32, dual=False)


def test_the_error_rule_finds_errors():
    """A wrong row, element or NaN, a result as coarse as bf16, anything where zero is exact: all are seen."""
    case = next(c for c in SMALL if str(c) == "rms_norm width 128")
    p = errors.problem(case, torch.float32)
    good = p.evaluate("reference")
    p.check(good)

    def spoiled(change, name="output 0"):
        return good | {name: change(good[name].clone())}

    def wrong_row(x):
        x[1, 2] *= 1.000001
        return x

    def wrong_element(x):
        x[0, 0, 5] += 1e-4
        return x

    for name in good:
        with pytest.raises(AssertionError, match=f"{name}: RMS error"):
            p.check(spoiled(lambda x: x.bfloat16().float(), name))
    with pytest.raises(AssertionError, match=r"output 0: row \[1, 2\] has RMS error"):
        p.check(spoiled(wrong_row))
    with pytest.raises(AssertionError, match=r"output 0: (RMS error|row \[0, 0\])"):
        p.check(spoiled(wrong_element))
    with pytest.raises(AssertionError, match=r"tangent 0: 1 of 18432 values are not finite, .* \[0, 0, 0\]"):
        p.check(spoiled(lambda x: x.index_put((torch.tensor(0),) * 3, torch.tensor(math.nan)), "tangent 0"))
    with pytest.raises(AssertionError, match=r"only one side has: .'tangent 0'"):
        p.check({n: x for n, x in good.items() if n != "tangent 0"})
    zero = torch.zeros(4, 4, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"at most 0\.000e"):
        errors.check("zero", torch.full((4, 4), 1e-30), zero, errors.Yardstick(0.0, 0.0))

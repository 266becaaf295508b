"""Gradients through the result and the tangent of every operation: `Dual(..., differentiable=True)`."""

import pytest
import torch

import imf_kernels as ik
from imf_kernels import Dual
from imf_kernels.testing import errors
from imf_kernels.testing.cases import FP32, SMALL
from tests.helpers.backends import BACKENDS, KERNELS, dtypes_of
from tests.ops.test_autograd import NAMES

MOVING = [case for case in SMALL if case.tangents]
NAMED = [case for case in MOVING if str(case) in NAMES]
# Gradients beyond the range of the dtype: of r = 1 / |x|, to the third power.
TOO_LARGE = {("rms_norm small values", torch.float16), ("qk_norm_rope small values", torch.float16)}


def _cases():
    for case in MOVING:
        for dtype in case.dtypes:
            if (str(case), dtype) not in TOO_LARGE:
                marks = () if str(case) in NAMES else pytest.mark.slow
                yield pytest.param(case, dtype, id=f"{case}, {str(dtype)[6:]}", marks=marks)


def check(case, dtype, backend):
    p = errors.problem(case, dtype, differentiable=True)
    p.check(p.evaluate(backend))


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
@pytest.mark.parametrize(("case", "dtype"), list(_cases()))
def test_error_rule(case, dtype, backend):
    """Of outputs, tangents, and gradients of primals, weights and tangents, for cotangents of both."""
    if backend in case.refused_by:
        pytest.skip("the backend refuses the case")
    check(case, dtype, backend)


@pytest.mark.parametrize("kernels", KERNELS, indirect=True)
@pytest.mark.parametrize("case", NAMED, ids=str)
def test_tangents_of_the_last_samples(case, kernels):
    check(case.with_rows(1), dtypes_of(case, kernels)[0], kernels)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c in NAMED else pytest.mark.slow) for c in MOVING], ids=str
)
def test_the_reference_is_what_pytorch_derives(case):
    """In fp64 it equals autograd through torch.func.jvp of the plain formula, to 1e-11."""
    if "mask of bool" in case.name or case.name.endswith("heads of keys, mask"):
        pytest.skip("PyTorch's gradient of a row without keys is NaN")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        p = errors.problem(case, FP32, definition=errors.PLAIN, differentiable=True)
    ours = p.evaluate("reference", dtype=torch.float64)
    for name, got in ours.items():
        if not got.numel():
            continue
        size = max(1.0, p.exact[name].abs().max().item(), 1e4 * (case.name == "logits of 1e4"))
        torch.testing.assert_close(
            got, p.exact[name], rtol=0, atol=1e-11 * size, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("case", [c for c in NAMED if c.operation != "scaled_dot_product_attention"], ids=str)
def test_the_forward_is_the_same(case, backend):
    """To the bit; and nothing is kept where nothing requires grad."""
    p = errors.problem(case, dtypes_of(case, backend)[0])

    def run(differentiable, grad):
        leaves = {
            n: x.clone().requires_grad_(grad and n in case.differentiable) for n, x in p.primals.items()
        }
        duals = {
            n: Dual(x, p.tangents[n], differentiable=differentiable) if n in p.tangents else x
            for n, x in leaves.items()
        }
        return [y for y in case.run(duals, backend, **case.output_options) if isinstance(y, Dual)]

    for y, same, without in zip(run(True, True), run(False, True), run(True, False), strict=True):
        assert y.differentiable and not same.differentiable
        assert torch.equal(y.primal, same.primal) and torch.equal(y.primal, without.primal)
        assert torch.equal(y.tangent_rows, same.tangent_rows)
        assert torch.equal(y.tangent_rows, without.tangent_rows)
        assert not without.primal.requires_grad and not without.tangent.requires_grad


@pytest.mark.parametrize("case", list({c.operation: c for c in NAMED}.values()), ids=str)
def test_gradcheck_of_the_pair(case):
    p = errors.problem(case, FP32)
    names = [n for n in p.primals if n in case.differentiable]
    given = [p.primals[n].double()[..., :6].requires_grad_() for n in names]
    if any(x.shape != p.primals[n].shape for x, n in zip(given, names, strict=True)):
        given = [p.primals[n].double().requires_grad_() for n in names]
    tangents = [p.tangents[n].double().requires_grad_() for n in p.tangents]

    def pair(*values):
        primals = p.primals | dict(zip(names, values, strict=False))
        moving = dict(zip(p.tangents, values[len(names) :], strict=True))
        arguments = {
            n: Dual(x, moving[n], differentiable=True) if n in moving else x for n, x in primals.items()
        }
        return [
            part
            for y in case.run(arguments, "reference")
            for part in (y.primal, y.tangent_rows)
            if part is not None
        ]

    assert torch.autograd.gradcheck(pair, (*given, *tangents), fast_mode=True)


@pytest.mark.parametrize("kernels", KERNELS, indirect=True)
def test_one_cotangent_alone(kernels):
    """Of the tangent, and of the primal: the other is zero."""
    x, x_dot, w = (torch.randn(shape) for shape in ((4, 33), (4, 33), (33,)))
    for name, options in (
        ("rms_norm", {"weight": w}),
        ("gelu", {}),
        ("linear", {"weight": torch.ones(7, 33)}),
    ):
        gradients = []
        for part in ("both", "primal", "tangent"):
            leaves = [t.clone().requires_grad_() for t in (x, x_dot)]
            y = getattr(ik, name)(Dual(*leaves, differentiable=True), **options, backend=kernels)
            total = (part != "tangent") * y.primal.sum() + (part != "primal") * y.tangent.square().sum()
            gradients.append(torch.autograd.grad(total, leaves))
        for whole, *parts in zip(*gradients, strict=True):
            torch.testing.assert_close(whole, sum(parts), rtol=1e-5, atol=1e-5)


def test_calls_that_have_none_are_refused():
    x = torch.randn(2, 3, 4, 8)
    dual = Dual(x.requires_grad_(), x.detach(), differentiable=True)
    with pytest.raises(RuntimeError, match=r"backend 'cuda' cannot run.*'triton' and 'reference'"):
        ik.scaled_dot_product_attention(dual, dual, dual, backend="cuda")
    y = ik.silu(dual, backend="cpu")
    with pytest.raises(RuntimeError, match="create_graph=True asks for second derivatives"):
        torch.autograd.grad(y.tangent.sum(), x, create_graph=True)
    for other in (Dual(x.detach(), x.detach()), 2.0 * Dual(x.detach(), x.detach())):
        for call in (
            lambda other=other: dual + other,
            lambda other=other: ik.cat([dual, other]),
            lambda other=other: ik.scaled_dot_product_attention(dual, other, dual),
        ):
            with pytest.raises(ValueError, match="made with differentiable=True, or none of them"):
                call()
    assert (dual + Dual(x.detach(), None)).differentiable
    with pytest.raises(ValueError, match=r"requires grad.*differentiable=True"):
        Dual(x.detach(), x)


def test_arithmetic_keeps_gradients():
    """Of `Dual`s, against torch.func.jvp of the same lines."""
    x, x_dot, w = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def lines(x, cat, mapped):
        parts = (x * w + 2 / (x * x + 3.0)).chunk(2, dim=-1)
        y = cat([parts[1], -parts[0] * parts[0] ** 3], 0).reshape(2, 3, 2).transpose(1, 2).unsqueeze(1)
        y = mapped(lambda t: t.flip(-1), y)[:, 0]
        return (
            (y - y.mean((1, 2))[:, None, None]).expand(2, 2, 3).permute(1, 0, 2).flatten(1).to(torch.float64)
        )

    y = lines(Dual(x, x_dot, differentiable=True), ik.cat, ik.linear_map)
    assert y.differentiable and "differentiable=True" in repr(y)
    other, other_dot = torch.func.jvp(lambda x: lines(x, torch.cat, lambda f, x: f(x)), (x,), (x_dot,))
    wanted = [x, x_dot, w]
    ours = torch.autograd.grad((y.primal * y.tangent).sum() + y.tangent.square().sum(), wanted)
    theirs = torch.autograd.grad((other * other_dot).sum() + other_dot.square().sum(), wanted)
    torch.testing.assert_close(ours, theirs)


def test_pytrees_keep_it():
    x = torch.randn(3, 4)
    dual = Dual(x, x[:2], differentiable=True)
    leaves, structure = torch.utils._pytree.tree_flatten(dual)
    assert torch.utils._pytree.tree_unflatten(leaves, structure).differentiable
    assert not torch.utils._pytree.tree_map(lambda t: t, Dual(x, x)).differentiable

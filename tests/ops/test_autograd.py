"""Inside PyTorch's autograd: what backward keeps; no transform gets a silent zero or a wrong result."""

import pytest
import torch

import imf_kernels as ik
from imf_kernels import Dual
from imf_kernels.backends.operators import OPERATIONS
from imf_kernels.testing import errors
from imf_kernels.testing.cases import FP32, SMALL
from tests.helpers.backends import dtypes_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")

NAMES = (
    "linear square", "rms_norm width 33", "rms_norm fp32 stream", "rms_norm fp32 stream to fp16",
    "layer_norm width 33", "layer_norm_modulate width 33", "layer_norm_modulate fp32 stream",
    "group_norm image with silu", "qk_norm_rope digits", "swiglu width 37",
    "scaled_dot_product_attention other value width", "gated_residual width 45", "gated_residual fp32 stream",
    "gated_residual a gate a sample", "gated_residual_rms_norm fp32 stream", "gelu matrix",
    "silu matrix", "sinusoidal_embedding dim 256", "prepend_tokens four groups",
)  # fmt: skip
each_case = pytest.mark.parametrize("case", [next(c for c in SMALL if str(c) == n) for n in NAMES], ids=str)
one_an_operation = pytest.mark.parametrize(
    "case", list({case.operation: case for case in reversed(SMALL) if str(case) in NAMES}.values()), ids=str
)


def leaves_of(p):
    """The primals of a problem, requiring grad where they may."""
    return {n: x.clone().requires_grad_(n in p.case.differentiable) for n, x in p.primals.items()}


@each_case
def test_backward_keeps_nothing_of_the_tangent(case, kernels):
    """The tensors saved with a tangent are those saved without, each of a primal's memory or new."""
    p = errors.problem(case, dtypes_of(case, kernels)[-1])

    def saved(tangents):
        kept = []
        leaves = leaves_of(p)
        duals = {n: Dual(x, tangents[n]) if n in tangents else x for n, x in leaves.items()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.detach()), lambda t: t):
            case.run(duals, kernels, **case.output_options)
        return kept

    with_tangent, without = saved(p.tangents), saved({})
    assert len(with_tangent) == len(without)
    for a, b in zip(with_tangent, without, strict=True):
        assert a.shape == b.shape and torch.equal(a, b)
    memory = {t.untyped_storage().data_ptr() for t in p.tangents.values()}
    assert not memory & {t.untyped_storage().data_ptr() for t in with_tangent}


@each_case
def test_differentiating_a_tangent_is_loud(case, backend):
    p = errors.problem(case, dtypes_of(case, backend)[0])
    leaves = leaves_of(p)
    duals = {n: Dual(x, p.tangents[n]) if n in p.tangents else x for n, x in leaves.items()}
    for y in case.run(duals, backend, **case.output_options):
        assert not y.tangent_rows.requires_grad
        with pytest.raises(RuntimeError, match="no gradient flows through tangents"):
            (y.primal.float().sum() + y.tangent.float().square().sum()).backward()


@one_an_operation
def test_only_what_is_asked_for_gets_a_gradient(case, backend):
    """Inputs that do not require grad get none, and the others the same as when all do."""
    p = errors.problem(case, FP32)
    for name in case.differentiable:
        leaves = {n: x.clone().requires_grad_(n == name) for n, x in p.primals.items()}
        outputs = case.run(leaves, backend)
        wanted = [(y, c) for y, c in zip(outputs, p.cotangents, strict=True) if y.requires_grad]
        torch.autograd.backward([y for y, _ in wanted], [c for _, c in wanted])
        pytorch = errors.yardsticks(case, FP32)[f"gradient of {name}"]
        errors.check(f"{case} {name}", leaves[name].grad, p.exact[f"gradient of {name}"], pytorch)
        assert all(x.grad is None for n, x in leaves.items() if n != name)
    assert not any(y.requires_grad for y in case.run(p.primals, backend))


@one_an_operation
def test_second_derivatives_are_refused_by_the_kernels(case, kernels):
    """Also for cotangents without grad, where PyTorch's once_differentiable leaves terms out in silence."""
    p = errors.problem(case, FP32)
    for cotangent_requires_grad in (False, True):
        leaves = leaves_of(p)
        outputs = case.run(leaves, kernels)
        cotangents = [c.clone().requires_grad_(cotangent_requires_grad) for c in p.cotangents]
        inputs = [leaves[n] for n in case.differentiable]
        with pytest.raises(RuntimeError, match=rf"{case.operation}: create_graph=True asks"):
            torch.autograd.grad(outputs, inputs, cotangents, create_graph=True)


@one_an_operation
@pytest.mark.parametrize("backend", ["reference", "kernels"])
def test_a_batch_of_cotangents(case, backend, kernels):
    """By PyTorch's formulas and for products, as for one cotangent after the other; kernels refuse them."""
    p = errors.problem(case, FP32)
    leaves = leaves_of(p)
    outputs = case.run(leaves, kernels if backend == "kernels" else backend)
    inputs = [leaves[n] for n in case.differentiable]
    batch = [torch.stack([c, -2 * c]) for c in p.cotangents]

    def gradients(cotangents, **named):
        return torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, **named)

    try:
        batched = gradients(batch, is_grads_batched=True)
    except RuntimeError as error:
        assert backend == "kernels"
        assert f"{case.operation}: kernels cannot read a batch of cotangents" in str(error)
        return
    for i in range(2):
        for found, one in zip(batched, gradients([c[i] for c in batch]), strict=True):
            torch.testing.assert_close(found[i], one)


@one_an_operation
def test_a_batch_of_tangents(case):
    """By PyTorch's formulas, as for one tangent after the other; a backend that is named refuses them."""
    generator = torch.Generator().manual_seed(0)
    primals, _ = case.draw(generator, FP32)
    primals = {name: x.double() if x.is_floating_point() else x for name, x in primals.items()}
    name = (case.tangents or case.differentiable)[0]
    directions = torch.randn(2, *primals[name].shape, generator=generator, dtype=primals[name].dtype)

    def function(steps, backend=None):
        x = primals[name] + torch.tensordot(steps, directions, 1)
        return case.run({**primals, name: x}, backend)

    origin = torch.zeros(2, dtype=directions.dtype)
    options = {"strategy": "forward-mode", "vectorize": True}
    batched = torch.autograd.functional.jacobian(function, origin, **options)
    for i, step in enumerate(torch.eye(2, dtype=origin.dtype)):
        _, one = torch.func.jvp(function, (origin,), (step,))
        torch.testing.assert_close(tuple(part[..., i] for part in batched), one)
    if "cpu" in (backend.name for backend in OPERATIONS[case.operation].backends):
        with pytest.raises(TypeError, match=f"{case.operation}: kernels cannot read a batch of tangents"):
            torch.autograd.functional.jacobian(lambda steps: function(steps, "cpu"), origin, **options)


def test_second_derivatives_of_the_reference():
    x, w = (torch.randn(n, 5, dtype=torch.float64) for n in (3, 1))
    assert torch.autograd.gradgradcheck(
        lambda t: ik.rms_norm(t, w[0], backend="reference"), x.requires_grad_()
    )


# The kernels must not answer with a zero tangent. tests/ops/test_forward_ad.py has what they can do.
@one_an_operation
@pytest.mark.parametrize("transform", ["vmap", "grad", "vjp", "jvp of vmap"])
def test_transforms_are_refused_by_the_kernels(case, transform, kernels):
    p = errors.problem(case, FP32)
    name = next(iter(p.tangents))
    x, x_dot = p.primals[name], p.tangents[name]

    def call(x):
        return case.run(p.primals | {name: x}, kernels)[0]

    with pytest.raises(RuntimeError, match=r"cannot run: it takes .* inside a transform of torch.func"):
        match transform:
            case "jvp of vmap":
                torch.func.jvp(torch.func.vmap(call), (x[None],), (x_dot[None],))
            case "vmap":
                torch.func.vmap(call)(x[None])
            case "grad":
                torch.func.grad(lambda x: call(x).sum())(x)
            case "vjp":
                torch.func.vjp(call, x)


@one_an_operation
@pytest.mark.parametrize("backend", ["reference", None])
def test_forward_mode_through_the_reference_is_right(case, backend):
    """torch.func.jvp of the primal, and of the primal of a Dual call, is the tangent; so by default."""
    p = errors.problem(case, FP32)
    names = list(p.tangents)
    primals, tangents = ([d[n].double() for n in names] for d in (p.primals, p.tangents))
    rest = {n: x.double() for n, x in p.primals.items()}

    def plain(*xs):
        return case.run(rest | dict(zip(names, xs, strict=True)), backend)

    def dual(*xs):
        duals = {n: Dual(x, t) for n, x, t in zip(names, xs, tangents, strict=True)}
        return tuple(y.primal for y in case.run(rest | duals, backend))

    for function in (plain, dual):
        _, got = torch.func.jvp(function, tuple(primals), tuple(tangents))
        for i, t in enumerate(got):
            torch.testing.assert_close(t, p.exact[f"tangent {i}"], rtol=1e-10, atol=1e-10)

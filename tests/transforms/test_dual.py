"""`Dual`: what it accepts, short and missing tangents, the guard on the way out, pytrees, linear maps."""

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from imf_kernels import Dual, linear_map, primal
from imf_kernels.dual import align, last_rows, pad_with_zeros


def ones(*shape, **options):
    return torch.ones(shape, **options)


BAD = {
    "integers": (lambda: Dual(ones(2).long()), TypeError, "complex tensor, got torch.int64"),
    "no tensor": (lambda: Dual([1.0]), TypeError, "floating-point or complex tensor, got list"),
    "a Dual": (lambda: Dual(Dual(ones(2))), TypeError, "floating-point or complex tensor, got Dual"),
    "tangent no tensor": (lambda: Dual(ones(2), 1.0), TypeError, "must be a tensor or None, got float"),
    "other width": (lambda: Dual(ones(2, 3), ones(2, 4)), ValueError,
                    "the shape of its primal, [2, 3], or fewer rows of it, [n, 3]; got [2, 4]"),
    "too many rows": (lambda: Dual(ones(2, 3), ones(3, 3)), ValueError, "[2, 3], or fewer rows of it"),
    "other rank": (lambda: Dual(ones(2, 3), ones(3)), ValueError, "got [3]"),
    "scalar": (lambda: Dual(ones(), ones(1)), ValueError, "the shape of its primal, []; got [1]"),
    "other dtype": (lambda: Dual(ones(2), ones(2).bfloat16()), ValueError,
                    "must be torch.float32 on cpu like its primal, got torch.bfloat16 on cpu"),
    "integer tangent": (lambda: Dual(ones(2), ones(2).long()), ValueError, "got torch.int64 on cpu"),
    "other device": (lambda: Dual(ones(2), ones(2, device="meta")), ValueError, "got torch.float32 on meta"),
    "differentiable": (lambda: Dual(ones(2), ones(2), differentiable="no"), TypeError,
                       "differentiable must be True or False, got 'no'"),
    "requires grad": (lambda: Dual(ones(2), ones(2, requires_grad=True)), ValueError,
                      "tangent requires grad, but no gradient flows through tangents; pass tangent.detach()"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "error", "said"), BAD.values(), ids=BAD)
def test_what_is_no_dual(make, error, said):
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value).startswith("Dual: ") and said in str(caught.value)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_short_tangents_are_completed_to_the_outside(rows):
    x, t = torch.randn(3, 4), torch.randn(rows, 4)
    d = Dual(x, t)
    assert d.tangent_rows is t and d.tangent.shape == d.shape == x.shape
    assert torch.equal(d.tangent[3 - rows :], t) and not d.tangent[: 3 - rows].any()
    assert d.dtype == x.dtype and d.device == x.device and primal(d) is x and primal(x) is x
    assert repr(d) == f"Dual(primal=[3, 4], tangent=[{rows}, 4], dtype=torch.float32, device='cpu')"


def test_a_missing_tangent_stays_missing():
    d = Dual(ones(2, 3))
    assert d.tangent is None and d.tangent_rows is None and "tangent=None" in repr(d)


def test_the_helpers_of_the_operations():
    x, t = torch.arange(6.0).view(3, 2), torch.ones(1, 2)
    assert torch.equal(last_rows(x, t), x[2:]) and torch.equal(
        pad_with_zeros(t, 3), torch.tensor([[0.0, 0], [0, 0], [1, 1]])
    )
    a, b, c = align(t, None, ones(2, 5))
    assert torch.equal(a, torch.tensor([[0.0, 0], [1, 1]])) and b is None and c.shape == (2, 5)
    scalar = torch.tensor(2.0)
    assert (
        pad_with_zeros(scalar, 1) is scalar
        and last_rows(scalar, scalar) is scalar
        and align(scalar) == [scalar]
    )


def test_differentiating_a_tangent_is_loud():
    """In a loss, alone or beside the primal; detached, or where no gradient is wanted, it is data."""
    x = torch.randn(3, requires_grad=True)
    d = Dual(x * 2, torch.randn(3))
    for loss in (d.tangent.sum(), (d.primal * d.tangent).sum(), d.primal.sum() + d.tangent.square().sum()):
        with pytest.raises(RuntimeError, match=r"no gradient flows through tangents. Call \.detach\(\)"):
            loss.backward()
    x.grad = None
    (d.primal * d.tangent.detach()).sum().backward()
    assert torch.equal(x.grad, 2 * d.tangent.detach())
    with torch.no_grad():
        assert not d.tangent.requires_grad
    assert not Dual(torch.randn(3), torch.randn(3)).tangent.requires_grad


@pytest.mark.parametrize(
    "call", [torch.sin, lambda d: torch.maximum(ones(3), d), lambda d: torch.cat([d, d])]
)
def test_pytorch_functions_refuse_a_dual(call):
    with pytest.raises(TypeError, match=r"got a Dual. Use the operation of that name in imf_kernels"):
        call(Dual(ones(3)))


def test_layers_take_a_dual():
    """By the functions that they call: hooks and subclasses work too. Dropout does if it drops nothing."""
    layers = nn.Sequential(nn.Linear(3, 4), nn.GELU("tanh"), nn.Dropout(0.5).eval(), nn.SiLU())
    x, x_dot = torch.randn(2, 3), torch.randn(2, 3)
    want = torch.func.jvp(layers, (x,), (x_dot,))
    y = layers(Dual(x, x_dot))
    torch.testing.assert_close((y.primal, y.tangent), want)
    with pytest.raises(TypeError, match=r"dropout of a Dual .* p must be 0 in training, got 0.5"):
        layers.train()(Dual(x, x_dot))
    with pytest.raises(TypeError, match="silu of a Dual takes inplace=False alone"):
        nn.SiLU(inplace=True)(Dual(x, x_dot))


def test_pytrees_see_through_a_dual():
    d = Dual(ones(3, 2), ones(1, 2))
    moved = pytree.tree_map(lambda t: t.double() * 2, {"x": [d]})["x"][0]
    assert isinstance(moved, Dual) and moved.dtype == torch.float64 and moved.tangent_rows.shape == (1, 2)
    names = pytree.tree_map(lambda t: str(t.dtype), d)
    assert pytree.tree_leaves(names) == ["torch.float32"] * 2
    leaves, spec = pytree.tree_flatten(Dual(ones(2)))
    assert leaves[1] is None and pytree.tree_unflatten(leaves, spec).tangent is None


def test_the_primal_stays_what_the_tangent_belongs_to():
    d = Dual(ones(4, 2), ones(4, 2))
    with pytest.raises(AttributeError):
        d.primal = d.primal[:2]


def test_pytrees_do_not_pair_rows_that_do_not_belong_together():
    """A slice of both parts is a slice of the whole only where the tangent is stored whole."""
    whole, short = Dual(ones(8, 2), ones(8, 2)), Dual(ones(8, 2), ones(4, 2))
    assert pytree.tree_map(lambda t: t[2:4], whole).tangent_rows.shape == (2, 2)
    with pytest.raises(ValueError, match="stored for the last 4 of 8 rows; complete it first"):
        pytree.tree_map(lambda t: t[4:], short)
    completed = Dual(short.primal, short.tangent)
    assert pytree.tree_map(lambda t: t[4:], completed).tangent_rows.all()


class TestLinearMap:
    def test_tensors_pass_through(self):
        assert torch.equal(linear_map(lambda t: t.flip(-1), torch.arange(3.0)), torch.tensor([2.0, 1, 0]))

    @pytest.mark.parametrize("rows", [0, 2, 3])
    def test_primal_and_tangent_alike(self, rows):
        x, t = torch.randn(3, 4, 5, requires_grad=True), torch.randn(rows, 4, 5)
        d = linear_map(lambda a: a.transpose(1, 2)[:, 1:], Dual(x, t))
        assert torch.equal(d.primal, x.transpose(1, 2)[:, 1:])
        assert torch.equal(d.tangent_rows, t.transpose(1, 2)[:, 1:])
        (gradient,) = torch.autograd.grad(d.primal.sum(), x)
        assert gradient[..., 1:].all() and not gradient[..., 0].any() and not d.tangent_rows.requires_grad

    def test_several_results(self):
        a, b = linear_map(lambda t: t.chunk(2, -1), Dual(ones(2, 6), ones(2, 6)))
        assert a.shape == b.shape == (2, 3) and a.tangent.shape == (2, 3)
        (only,) = linear_map(lambda t: [t * 2], Dual(ones(2, 6)))
        assert only.tangent is None and torch.equal(only.primal, 2 * ones(2, 6))

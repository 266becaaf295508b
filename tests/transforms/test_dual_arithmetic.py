"""What `Dual`s share with tensors, on whole tangents and on those stored for the last rows; and three
networks written with them."""

import math
import operator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import imf_kernels as ik
from imf_kernels import Dual

B, L, D = 5, 4, 6
G = torch.Generator().manual_seed(0)
X, X_DOT, Z, Z_DOT = torch.randn(4, B, L, D, generator=G, dtype=torch.float64).unbind(0)
ROW, SAMPLES, ONE = (torch.randn(*s, generator=G, dtype=torch.float64) for s in ((D,), (B, 1, D), (1, L, 1)))


def _cat(tensors, dim):
    return (ik.cat if any(isinstance(x, Dual) for x in tensors) else torch.cat)(tensors, dim)


# Functions of x and z, tensors or Duals; each keeps the meaning that it has for tensors.
EXPRESSIONS = {
    "x + z": lambda x, z: x + z,
    "x - z": lambda x, z: x - z,
    "x * z": lambda x, z: x * z,
    "x / z": lambda x, z: x / z,
    "x * x": lambda x, z: x * x,
    "-x": lambda x, z: -x,
    "numbers": lambda x, z: 2 - (x * 3 + 1) / 4 + 1 / x - (x - 0.5),
    "a row": lambda x, z: ROW + x * ROW - x / ROW,
    "a row on the left": lambda x, z: ROW - x + ROW * x + ROW / x,
    "samples": lambda x, z: SAMPLES + x * SAMPLES - SAMPLES / x,
    "one for all": lambda x, z: ONE * x + x * ONE - ONE,
    "integers": lambda x, z: x * torch.arange(D),
    "a row of z": lambda x, z: x[:, :1] * z + z[:, 0, None] / x,
    "the first sample for all": lambda x, z: x[:1] * z + x,
    "batch from none": lambda x, z: x[0] + z,
    "x[0]": lambda x, z: x[0],
    "x[1:3]": lambda x, z: x[1:3] * 2,
    "x[:, 1]": lambda x, z: x[:, 1],
    "x[:, :, ::2]": lambda x, z: x[:, :, ::2],
    "x[..., -1]": lambda x, z: x[..., -1] * ROW[0],
    "x[..., None]": lambda x, z: x[..., None],
    "x[None]": lambda x, z: x[None],
    "x[:, None]": lambda x, z: x[:, None] * z[:, :, None],
    "x[..., 0, 1, 2]": lambda x, z: x[..., 2, 1, 2],
    "by a mask": lambda x, z: x[ROW.expand(B, L, D) > 0],
    "by numbers": lambda x, z: x[torch.tensor([4, 0])][:, :3] + x[:, torch.tensor([1, 1, 0])][:2],
    "reshape": lambda x, z: x.reshape(B, L * D) * 2,
    "reshape, batch given": lambda x, z: x.reshape(x.shape[0], -1),
    "reshape, batch too": lambda x, z: x.reshape(-1, D) + ROW,
    "reshape, -1 of the batch": lambda x, z: x.reshape(-1, L * D),
    "view": lambda x, z: x.view(B, 2, 2, D),
    "flatten": lambda x, z: x.flatten(1) * 2,
    "flatten all": lambda x, z: x.flatten(),
    "unflatten": lambda x, z: x.unflatten(-1, (2, 3)),
    "transpose": lambda x, z: x.transpose(1, 2),
    "transpose the batch": lambda x, z: x.transpose(0, 1),
    "permute": lambda x, z: x.permute(0, 2, 1),
    "permute the batch": lambda x, z: x.permute(2, 0, 1),
    "movedim": lambda x, z: x.movedim(1, -1) + x.movedim(0, 2).movedim(2, 0).movedim(-1, 1),
    "squeeze": lambda x, z: x[:, :1].squeeze(1),
    "unsqueeze": lambda x, z: x.unsqueeze(1) * z.unsqueeze(-2),
    "unsqueeze the batch": lambda x, z: x.unsqueeze(0),
    "unsqueeze the last": lambda x, z: x.unsqueeze(-1),
    "chunk": lambda x, z: x.chunk(3, dim=-1)[1],
    "chunk the batch": lambda x, z: x.chunk(2)[1],
    "split": lambda x, z: x.split([1, 5], dim=2)[1],
    "unbind": lambda x, z: x.unbind(1)[2],
    "unbind the batch": lambda x, z: x.unbind()[B - 1],
    "expand": lambda x, z: x[:, :, :1].expand(-1, -1, 3),
    "expand the batch": lambda x, z: x[0].expand(2, -1, -1),
    "repeat": lambda x, z: x.repeat(1, 2, 1) + x.repeat(1, 1, 1)[:, [0] * (2 * L)],
    "repeat the batch": lambda x, z: x.repeat(2, 1, 1),
    "flip": lambda x, z: x.flip(1) + x.flip(0, 1),
    "roll": lambda x, z: x.roll(1, 2) + x.roll(1, 0),
    "sum": lambda x, z: x.sum(-1) + x.sum(dim=(1, 2), keepdim=True)[:, 0],
    "sum of all": lambda x, z: x.sum() * 2,
    "mean": lambda x, z: x - x.mean(-1, keepdim=True),
    "mean of the batch": lambda x, z: x - x.mean(0),
    "cat": lambda x, z: _cat([x, z, ROW.expand(B, 2, D)], 1),
    "cat of the batch": lambda x, z: _cat([z, x, SAMPLES.expand(B, L, D)], 0),
    "to": lambda x, z: x.float().to(torch.float64) + z.double(),
    "contiguous": lambda x, z: x.transpose(1, 2).contiguous().clone(),
    "+x": lambda x, z: +x - (+z),
    "x**2": lambda x, z: x**2 + z**1,
    "x**-1.5": lambda x, z: (x * x + 1) ** -1.5 - (z * z + 1) ** np.float32(0.5),
    "x**0": lambda x, z: x**0 + z * (x - x) ** 2,
    "numbers of NumPy": lambda x, z: np.sqrt(0.5) * x + np.float32(3) / (z * np.int64(2)) - x / np.float16(4),
}  # fmt: skip

_ADVANCED, _MASK = torch.tensor([1, 3]), torch.arange(B * L * D).view(B, L, D) % 3 == 0
INDICES = {
    "separated": lambda x: x[:, [0, 1], :, None][:, :, [2, 5], 0],
    "separated by a slice": lambda x: x.unflatten(2, (2, 3))[:, _ADVANCED, :, [0, 2]],
    "separated by None": lambda x: x[:, _ADVANCED, None, _ADVANCED],
    "separated after an ellipsis": lambda x: x.unflatten(2, (2, 3))[..., _ADVANCED, :, _ADVANCED - 1],
    "separated, as many as the batch": lambda x: x[:, [0, 1, 2, 3, 0], None, [0, 1, 2, 3, 4]],
    "separated by an ellipsis": lambda x: x[:, _ADVANCED, ..., _ADVANCED],
    "separated masks": lambda x: x[:, None].unflatten(3, (2, 3))[:, :, _MASK[0, :, 0], :, [0, 1, 2, 0]],
    "adjacent": lambda x: x[:, _ADVANCED, _ADVANCED] + x[..., _ADVANCED, [1, 3]],
    "two dimensions": lambda x: x[:, _ADVANCED.expand(3, 2), 1:],
    "a number and a tensor": lambda x: x.unflatten(2, (2, 3))[:, 1, :, _ADVANCED - 1],
    "tensors of no dimension": lambda x: x.unflatten(2, (2, 3))[:, torch.tensor(1), :, torch.tensor(0)],
    "all by a mask": lambda x: x[..., _MASK],
    "two dimensions by a mask": lambda x: x[..., _MASK[0]] * x[:, _MASK[0]],
    "the batch by a mask": lambda x: x[_MASK[:, 0, 1]] + x[[False, True, False, False, True], ...][:1],
    "the batch and rows by a mask": lambda x: x[_MASK[:, :, 0]],
    "a list as mask": lambda x: x[..., [True, False, True, False, False, True]],
    "an array of NumPy": lambda x: x[..., np.array([0, 2])] + x[:, :, np.array([1, 1])],
    "a number of NumPy": lambda x: x[:, np.int64(1)] + x[..., np.int64(1)][:, :1],
    "true": lambda x: x[:, True] + x[True].transpose(0, 1) + x[..., True].movedim(-1, 1),
    "a true tensor": lambda x: x[..., torch.tensor(True)] + x[:, :, torch.tensor(True)].movedim(2, -1),
    "the batch by a tensor": lambda x: x[torch.tensor([4, 0, 0]), :, 1] + x[[1, 2, 4], 1, [0, 1, 2], None],
    "the batch by two dimensions": lambda x: x[torch.tensor([[4, 0], [0, 3]])],
    "the batch by its own order": lambda x: x[torch.arange(B)] + x[list(range(B))[::-1]],
    "None first": lambda x: x[None, :, 1].sum(-1) + x[None, ..., 2, None][..., 1, 0],
    "None after": lambda x: x[:, None, ..., None],
    "ellipsis alone": lambda x: x[...] + x[()] + x[:] + x[..., :],
    "ellipsis of nothing": lambda x: x[..., 1:4, :, 2] + x[..., :3, ::2, 1][:, [0, 1, 0, 1]],
    "ellipsis behind": lambda x: x[2:, ...] + x[-3:, ...],
    "the last rows": lambda x: x[-1] + x[B - 1 :],
    "every second": lambda x: x[::2] + x[::2, :, :],
    "from 0": lambda x: x[0:, 1] + x[0:B, 2],
    "beyond": lambda x: x[:100] + x[-100:],
    "none of them": lambda x: x[:, :0].sum((1, 2)) + x[:0].sum(),
}
KEYWORDS = {
    "split": lambda x: x.split(split_size=2, dim=1)[1] + x.split(2, dim=-2)[0],
    "split into sizes": lambda x: x.split(dim=2, split_size=[1, 2, 3])[2] + x.split(split_size=4)[1][..., :3],
    "chunk": lambda x: x.chunk(chunks=2, dim=1)[1] + x.chunk(2, axis=1)[0],
    "chunk the batch": lambda x: x.chunk(chunks=2)[1],
    "tensor_split": lambda x: x.tensor_split(sections=3, dim=2)[1] + x.tensor_split(indices=(2, 4), dim=2)[1],
    "permute": lambda x: x.permute(dims=(0, 2, 1)) + x.permute(dims=[0, -1, 1]) + x.permute([0, 2, 1]),
    "permute the batch": lambda x: x.permute(dims=(1, 0, 2)) + x.permute(dims=(-2, 0, 2)),
    "flip": lambda x: x.flip(dims=(1,)) + x.flip(dims=[-1, 0]) + x.flip((1, 2)) + x.flip(dims=()),
    "movedim": lambda x: x.movedim(source=1, destination=2) + x.movedim(source=(2, 1), destination=(1, 2)),
    "movedim the batch": lambda x: x.movedim(1, destination=0) + x.movedim(source=[0], destination=[1]),
    "repeat": lambda x: x.repeat(repeats=(1, 2, 1)) + x.repeat([1, 2, 1]) + x.repeat(torch.Size([1, 2, 1])),
    "repeat the batch": lambda x: x.repeat(repeats=(2, 1, 1)) + x.repeat(repeats=(1, 2, 1, 1))[0, [0, 1] * B],
    "expand": lambda x: x[:, :, None].expand(size=(B, L, 3, D)) + x[:, :, None].expand(size=(-1, -1, 3, -1)),
    "expand the batch": lambda x: x.expand(size=(2, -1, L, D), implicit=False),
    "expand a number": lambda x: x[0, 0, 0].expand(()) + x.sum().expand(size=()) + x.sum().expand(2),
    "reshape": lambda x: x.reshape(shape=(B, -1)) + x.flatten(start_dim=1) + x.view(size=(B, L * D)),
    "reshape the batch": lambda x: x.reshape(shape=(-1, D)) + x.flatten(start_dim=0, end_dim=1)
        + x.view(size=(-1, D)) + x.flatten(end_dim=1),
    "unflatten": lambda x: x.unflatten(dim=-1, sizes=(2, 3)) + x.unflatten(2, sizes=(2, -1)),
    "unflatten the batch": lambda x: x.unflatten(sizes=(5, 1), dim=0),
    "transpose": lambda x: x.transpose(dim0=1, dim1=2) + x.swapaxes(axis0=1, axis1=-1) + x.swapdims(1, 2),
    "transpose the batch": lambda x: x.transpose(dim0=1, dim1=0) + x.swapaxes(axis0=-3, axis1=1),
    "squeeze": lambda x: x[:, :1].squeeze(dim=1) + x[:, :, None, :1].squeeze(dim=(2, 3))[:, :1]
        + x[:, :1].squeeze(axis=1) + x[:, :1].squeeze(),
    "squeeze the batch": lambda x: x[3:4].squeeze(dim=0) + x[3:4].squeeze(dim=(0, 1)),
    "unsqueeze": lambda x: x.unsqueeze(dim=1) + x.unsqueeze(axis=-3),
    "unsqueeze the batch": lambda x: x.unsqueeze(dim=0) + x.unsqueeze(axis=-4),
    "unbind": lambda x: x.unbind(dim=1)[1] + x.unbind(axis=1)[0] + x.unbind(dim=0)[B - 1][:1],
    "roll": lambda x: x.roll(shifts=1, dims=1) + x.roll(shifts=(1, 2), dims=(1, -1)),
    "roll the batch": lambda x: x.roll(shifts=1) + x.roll(1, dims=()) + x.roll(shifts=(1, 2), dims=(2, 0)),
    "sum": lambda x: x.sum(dim=1) + x.sum(axis=1) + x.sum(dim=(1,), keepdim=True)[:, 0]
        + x.sum(dim=[1], keepdims=True, dtype=torch.float64).squeeze(1) + x.sum(1, True).squeeze(1),
    "sum of all": lambda x: x.sum(dim=()) + x.sum(dim=None) + x.sum(dtype=torch.float64) + x.sum(dim=0),
    "mean": lambda x: x.mean(dim=-1) + x.mean(axis=(2,)),
    "mean of all": lambda x: x.mean(dim=()) + x.mean(dim=[]) + x.mean(()) + x.mean(axis=0) + x.mean(dim=None),
    "casts": lambda x: x.to(dtype=torch.float64, copy=True) + x.clone(memory_format=torch.preserve_format)
        + x.contiguous(memory_format=torch.contiguous_format) + x.to(x),
    "size": lambda x: x * x.size(dim=1) + x.size(-1) + x.size()[0] + x.size(dim=None)[1],
}  # fmt: skip
EXPRESSIONS |= {
    f"{kind} {name}": lambda x, z, f=function: f(x)
    for kind, functions in (("index", INDICES), ("keyword", KEYWORDS))
    for name, function in functions.items()
}


@pytest.mark.parametrize("rows", [(B, B), (2, B), (B, 3), (2, 3), (2, None), (None, 3), (0, 2)], ids=str)
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions(name, rows):
    function = EXPRESSIONS[name]
    stored = [None if n is None else t[B - n :] for n, t in zip(rows, (X_DOT, Z_DOT), strict=True)]
    whole = [
        torch.zeros_like(X) if t is None else torch.cat([X.new_zeros(B - len(t), L, D), t]) for t in stored
    ]
    wanted, wanted_dot = torch.func.jvp(function, (X, Z), tuple(whole))
    x, z = (v.clone().requires_grad_() for v in (X, Z))
    y = function(Dual(x, stored[0]), Dual(z, stored[1]))
    assert y.dtype == wanted.dtype and y.shape == wanted.shape
    torch.testing.assert_close(y.primal, wanted)
    torch.testing.assert_close(y.tangent if y.tangent is not None else torch.zeros_like(wanted), wanted_dot)
    grads = torch.autograd.grad(y.primal.sum(), (x, z), allow_unused=True)
    a, b = (v.clone().requires_grad_() for v in (X, Z))
    for got, want in zip(
        grads, torch.autograd.grad(function(a, b).sum(), (a, b), allow_unused=True), strict=True
    ):
        assert (got is None) == (want is None) and (got is None or torch.allclose(got, want))


def test_rows_stay_stored_where_they_stay_apart():
    x = Dual(X, X_DOT[3:])
    for y in (
        x + 1,
        x * SAMPLES,
        x.reshape(B, -1),
        x[:, 1:],
        x.chunk(2, -1)[0],
        x.transpose(1, -1),
        x.mean(-1),
    ):
        assert y.tangent_rows.shape[0] == 2
    assert ik.cat([x, X], 1).tangent_rows.shape[0] == 2 and (x.flip(0)).tangent_rows.shape[0] == B


def test_mixed_dtypes():
    y = Dual(X.bfloat16(), X_DOT.bfloat16()) * torch.ones(D)
    assert y.dtype == y.tangent_rows.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: x.relu(), "Dual has no relu. Use the operation of that name in imf_kernels"),
        (lambda x: x @ x.transpose(1, 2), "for the product of two Duals, imf_kernels.jvp"),
        (lambda x: x @ ROW, r"@ is not defined for a Dual. imf_kernels.linear\(x, w\) is x @ w.mT"),
        (lambda x: X.mT @ x, "imf_kernels.linear_map"),
        (lambda x: np.ones((L, L)) @ x, "imf_kernels.linear_map"),
        (abs, r"abs\(\) is not defined for a Dual. imf_kernels.jvp"),
        (lambda x: x**x, "takes a number as its exponent. imf_kernels.jvp"),
        (lambda x: x**ROW, "takes a number as its exponent. imf_kernels.jvp"),
        (lambda x: 2**x, "a Dual as exponent"),
        (lambda x: X**x, "a Dual as exponent"),
        *(
            (f, "compare x.primal")
            for f in (
                lambda x: x > 0,
                lambda x: 0 < x,  # noqa: SIM300
                lambda x: x <= X,
                lambda x: X >= x,  # noqa: SIM300
                lambda x: x == 0,
                lambda x: x != x,
                lambda x: np.ones(D) == x,
            )
        ),
        *(
            (f, "is not defined for a Dual. imf_kernels.jvp")
            for f in (
                lambda x: x // 2,
                lambda x: 2 // x,
                lambda x: X % x,
                lambda x: divmod(x, 2),
                round,
                math.floor,
            )
        ),
        *((f, r"x.primal.item\(\)") for f in (float, int, complex)),
        (lambda x: operator.setitem(x, (slice(None), 0), 1), "join its parts with imf_kernels.cat"),
        (lambda x: operator.delitem(x, 0), "join its parts with imf_kernels.cat"),
        (lambda x: 1 if x else 0, r"bool\(x.primal\)"),
        (lambda x: ~x, "x.primal > 0"),
        (lambda x: x & x, "x.primal > 0"),
        (np.asarray, r"x.primal.detach\(\).numpy\(\)"),
        (np.sin, "does not support ufuncs"),
        (lambda x: np.add(np.ones(D), x), "does not support ufuncs"),
        *(
            (f, r"unsupported operand type\(s\) for .*ndarray.*torch.from_numpy")
            for f in (
                lambda x: np.ones(D) * x,
                lambda x: x * np.ones(D),
                lambda x: np.ones(D) + x,
                lambda x: x - np.array(1.0),
                lambda x: np.ones(D) / x,
            )
        ),
        (lambda x: x + "1", r"unsupported operand type\(s\) for \+: 'Dual' and 'str'"),
        (lambda x: x.chunk(), "chunk"),
        (lambda x: x.chunk(parts=2), "chunk"),
        (lambda x: x.roll(shifts=1, axis=1), "roll"),
        (lambda x: torch.cat([x, x]), "torch.cat got a Dual"),
        (lambda x: x.never, "Dual has no attribute 'never'"),
        (lambda x: X.add_(x), "add_ got a Dual"),
        (lambda x: x.view(torch.int64), "takes a shape"),
    ],
)
def test_what_is_not_there(call, says):
    with pytest.raises((TypeError, AttributeError), match=says):
        call(Dual(X, X_DOT))


def test_linear_map_asks_whether_its_function_is_linear():
    x = Dual(X, X_DOT)
    for function in (lambda a: a + ROW, lambda a: (a, a.exp()), lambda a: F.pad(a, (0, 1), value=2.0)):
        for _ in range(2):
            with pytest.raises(ValueError, match="must be linear, but maps zeros to"):
                ik.linear_map(function, x)
    ik.linear_map(lambda a: a.flip(1) * ROW, x)


NOT_LINEAR = {
    **{f.__name__: f for f in (torch.relu, torch.sin, torch.square, torch.abs, torch.tanh, torch.sqrt)},
    **{f.__name__: f for f in (F.gelu, F.leaky_relu, F.relu6, F.softshrink, F.normalize)},
    "largest": lambda a: a.amax(-1),
    "sorted": lambda a: a.sort(-1).values,
    "clamped in place": lambda a: a.clamp_(-3, 3),
    "what is positive": lambda a: a[a > 0],
    "dropout": lambda a: F.dropout(a, 0.5),
    "the second of two": lambda a: (a.mT, a * a),
    "deep in a tree": lambda a: {"a": a, "b": [a.mT, (a.log1p(),)]},
}
LINEAR = {
    "convolution": lambda a: F.conv1d(a, SAMPLES[:4].expand(4, L, D)[..., :3].to(a.dtype), padding=1),
    "product": lambda a: a @ X[0].mT.to(a.dtype),
    "differences": lambda a: a.diff(n=2, dim=-1) - a.diff(n=2, dim=-1).mean(-1, keepdim=True),
    "in place": lambda a: a.clone().mul_(3),
    "to infinity": lambda a: (a * 6e4).sum(-1),
    "to almost nothing": lambda a: a * 1e-7,
    "zeros": lambda a: a * 0,
    "empty": lambda a: a[..., :0],
    "no dropout": lambda a: F.dropout(a, 0.5, training=False),
    "trees": lambda a: {"a": a.mT, "b": [a, (a.cumsum(-1),)]},
}


@pytest.mark.parametrize("rows", [B, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear_map_asks_whether_its_function_scales(dtype, rows):
    x = Dual(X.to(dtype), X_DOT[B - rows :].to(dtype))
    state = torch.get_rng_state()
    for function in NOT_LINEAR.values():
        for _ in range(2):
            with pytest.raises(ValueError, match=r"must be linear, but maps (some x to .* and -2x|zeros) to"):
                ik.linear_map(function, x)
    for function in LINEAR.values():
        ik.linear_map(function, x)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_question_of_linear_map_does_not_depend_on_values_and_is_put_once():
    calls = []

    def function(a):
        calls.append(torch.is_grad_enabled())
        return a * 2

    for t in (X_DOT / 0, X_DOT * math.nan, X_DOT):
        ik.linear_map(function, Dual(X.clone().requires_grad_(), t))
    assert calls == [False] * 3 + [True, False] * 3  # zeros, x, -2x; then primal and tangent
    for t in (X_DOT[:0], X_DOT[:0, :0], torch.tensor(2.0)):
        ik.linear_map(function, Dual(t, t))
    with pytest.raises(ValueError, match="must be linear"):
        ik.linear_map(torch.abs, Dual(X[:3, :2], torch.full((3, 2, D), math.inf, dtype=X.dtype)))


@pytest.mark.parametrize("rows", [B, 2])
@pytest.mark.parametrize("order", [(0, 2, 1), (1, 0, 2), (2, 1, 0)])
def test_view_where_only_the_strides_of_the_tangent_do_not_allow_it(order, rows):
    t = X_DOT[B - rows :].permute(order).contiguous().permute(*map(order.index, range(3)))
    x, plain = Dual(X, t), Dual(X, t.contiguous())
    for size in ((B, -1), (-1, D), (L * D, B), (B, 2, 2, 3, 2), (-1,)):
        assert torch.equal(x.view(size).tangent, plain.tangent.view(size))
        assert torch.equal(x.view(size=size).primal, X.view(size))
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        Dual(X.mT, X_DOT.mT.contiguous()).view(-1)


def test_tensor_split_by_a_tensor():  # for which PyTorch has no forward mode
    at = torch.tensor([1, 3])
    for n in (B, 2):
        for dim in (0, 1, -1):
            y = Dual(X, X_DOT[B - n :]).tensor_split(tensor_indices_or_sections=at, dim=dim)
            whole = torch.cat([torch.zeros_like(X[n:]), X_DOT[B - n :]])
            for part, wanted in zip(y, whole.tensor_split(at, dim), strict=True):
                assert torch.equal(part.tangent, wanted)


def test_what_says_to_use_imf_kernels_jvp_can_use_it():
    x, w = Dual(X, X_DOT[2:]), Dual(Z.mT, Z_DOT.mT)
    got = ik.jvp(torch.matmul, (x.primal, w.primal), (x.tangent.detach(), w.tangent.detach()))
    wanted = torch.func.jvp(torch.matmul, (X, Z.mT), (x.tangent, Z_DOT.mT))
    torch.testing.assert_close(got, wanted)


# Three networks, each once as a module of PyTorch and once of operations that take Duals or tensors.


def _linear(x, m):
    return ik.linear(x, m.weight, m.bias)


def _attention(x, qkv, out, heads):
    b, length, d = x.shape
    q, k, v = _linear(x, qkv).view(b, length, 3, heads, d // heads).permute(0, 2, 3, 1, 4).unbind(1)
    y = ik.scaled_dot_product_attention(q, k, v)
    return _linear(y.transpose(1, 2).reshape(b, length, d), out)


def _mlp(x, up, down, approximate="none"):
    return _linear(ik.gelu(_linear(x, up), approximate=approximate), down)


def _patches(x, conv):
    of = ik.linear_map(lambda a: F.conv2d(a, conv.weight, stride=conv.stride, padding=conv.padding), x)
    return of + conv.bias.view(1, -1, 1, 1)


def _angles(t, width):
    return ik.sinusoidal_embedding(t, width)


class DiTBlock(nn.Module):
    """adaLN-zero, as DiT and SiT have it."""

    def __init__(self, d, heads):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.modulation = nn.Linear(d, 6 * d)

    def forward(self, x, c):
        s1, g1, a1, s2, g2, a2 = self.modulation(F.silu(c)).chunk(6, dim=1)
        b, length, d = x.shape
        y = self.norm(x) * (1 + g1.unsqueeze(1)) + s1.unsqueeze(1)
        q, k, v = self.qkv(y).view(b, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, length, d)
        x = x + a1.unsqueeze(1) * self.out(y)
        y = self.norm(x) * (1 + g2.unsqueeze(1)) + s2.unsqueeze(1)
        return x + a2.unsqueeze(1) * self.down(F.gelu(self.up(y), approximate="tanh"))

    def with_duals(self, x, c):
        s1, g1, a1, s2, g2, a2 = _linear(ik.silu(c), self.modulation).chunk(6, dim=1)
        y = ik.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + g1.unsqueeze(1)) + s1.unsqueeze(1)
        x = x + a1.unsqueeze(1) * _attention(y, self.qkv, self.out, self.heads)
        y = ik.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + g2.unsqueeze(1)) + s2.unsqueeze(1)
        return x + a2.unsqueeze(1) * _mlp(y, self.up, self.down, "tanh")


class DiT(nn.Module):
    def __init__(self, d=32, heads=2, depth=2, times=1, channels=4):
        super().__init__()
        self.patches = nn.Conv2d(4, d, 2, 2)
        self.register_buffer("positions", torch.randn(1, 16, d))
        self.times = nn.ModuleList(nn.Linear(16, d) for _ in range(times))
        self.labels = nn.Embedding(10, d)
        self.blocks = nn.ModuleList(DiTBlock(d, heads) for _ in range(depth))
        self.channels, self.modulation = channels, nn.Linear(d, 2 * d)
        self.final = nn.Linear(d, 4 * channels)

    def forward(self, z, *times):
        c = self.labels(torch.arange(z.shape[0]))
        for t, m in zip(times, self.times, strict=True):
            c = c + F.silu(m(ik.sinusoidal_embedding(t, 16, backend="reference")))
        x = self.patches(z).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.modulation(F.silu(c)).chunk(2, dim=-1)
        x = self.final(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None])
        x = x.view(-1, 4, 4, 2, 2, self.channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(-1, self.channels, 8, 8)

    def with_duals(self, z, *times):
        c = self.labels(torch.arange(z.shape[0]))
        for t, m in zip(times, self.times, strict=True):
            c = c + ik.silu(_linear(_angles(t, 16), m))
        x = (_patches(z, self.patches).flatten(2).transpose(1, 2) + self.positions).contiguous()
        for block in self.blocks:
            x = block.with_duals(x, c)
        shift, scale = _linear(ik.silu(c), self.modulation).chunk(2, dim=-1)
        x = ik.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        x = _linear(x, self.final)
        x = x.view(-1, 4, 4, 2, 2, self.channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(-1, self.channels, 8, 8)


class SiT(DiT):
    """As MeanFlow conditions it, on t and on t − r; twice the channels out, of which it leaves one half."""

    def __init__(self):
        super().__init__(times=2, channels=8)

    def forward(self, z, t, r):
        return super().forward(z, t, t - r).chunk(2, dim=1)[0]

    def with_duals(self, z, t, r):
        return super().with_duals(z, t, t - r).chunk(2, dim=1)[0]


class UViT(nn.Module):
    """Tokens of time and label in the sequence, long skips by concatenation, a convolution at the end."""

    def __init__(self, d=32, heads=2):
        super().__init__()
        self.heads, self.patches = heads, nn.Conv2d(4, d, 2, 2)
        self.positions = nn.Parameter(torch.randn(1, 18, d))
        self.labels, self.time = nn.Embedding(10, d), nn.Linear(16, d)
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(7))
        self.qkv = nn.ModuleList(nn.Linear(d, 3 * d) for _ in range(3))
        self.out = nn.ModuleList(nn.Linear(d, d) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(d, 2 * d) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(2 * d, d) for _ in range(3))
        self.skip, self.pixels = nn.Linear(2 * d, d), nn.Linear(d, 16)
        self.last = nn.Conv2d(4, 4, 3, padding=1)

    def _block(self, x, i):
        b, length, d = x.shape
        q, k, v = self.qkv[i](self.norms[2 * i](x)).view(b, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, length, d)
        x = x + self.out[i](y)
        return x + self.down[i](F.gelu(self.up[i](self.norms[2 * i + 1](x))))

    def forward(self, z, t):
        x = self.patches(z).flatten(2).transpose(1, 2)
        time = self.time(ik.sinusoidal_embedding(t, 16, backend="reference")).unsqueeze(1)
        label = self.labels(torch.arange(z.shape[0])).unsqueeze(1)
        x = torch.cat([time, label, x], dim=1) + self.positions
        x = skip = self._block(x, 0)
        x = self._block(x, 1)
        x = self._block(self.skip(torch.cat([x, skip], dim=-1)), 2)
        x = self.pixels(self.norms[6](x))[:, 2:]
        return self.last(x.view(-1, 4, 4, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(z.shape))

    def _norm(self, x, i):
        return ik.layer_norm(x, x.shape[-1:], self.norms[i].weight, self.norms[i].bias)

    def _dual_block(self, x, i):
        x = x + _attention(self._norm(x, 2 * i), self.qkv[i], self.out[i], self.heads)
        return x + _mlp(self._norm(x, 2 * i + 1), self.up[i], self.down[i])

    def with_duals(self, z, t):
        x = _patches(z, self.patches).flatten(2).transpose(1, 2)
        time = _linear(_angles(t, 16), self.time).unsqueeze(1)
        label = self.labels(torch.arange(z.shape[0])).unsqueeze(1)
        x = ik.cat([time, label, x], dim=1) + self.positions
        x = skip = self._dual_block(x, 0)
        x = self._dual_block(x, 1)
        x = self._dual_block(_linear(ik.cat([x, skip], dim=-1), self.skip), 2)
        x = _linear(self._norm(x, 6), self.pixels)[:, 2:]
        return _patches(x.view(-1, 4, 4, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(z.shape), self.last)


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize(("network", "times"), [(DiT, 1), (SiT, 2), (UViT, 1)])
def test_networks_written_with_duals(network, times, rows):
    torch.manual_seed(0)
    net, n = network(), rows or B
    z, z_dot, t, t_dot = torch.randn(B, 4, 8, 8), torch.randn(B, 4, 8, 8), torch.rand(2, B), torch.ones(2, B)
    z_dot[: B - n], t_dot[:, : B - n] = 0, 0
    math_attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with math_attention:
        wanted, wanted_dot = torch.func.jvp(net, (z, *t[:times]), (z_dot, *t_dot[:times]))
    duals = [Dual(x, x_dot[B - n :]) for x, x_dot in ((z, z_dot), *zip(t, t_dot, strict=True))][: 1 + times]
    y = net.with_duals(*duals)
    torch.testing.assert_close(y.primal, wanted, rtol=1e-4, atol=1e-4)
    assert (y.tangent - wanted_dot).norm() <= 1e-5 * wanted_dot.norm() * math.sqrt(10)
    grads = torch.autograd.grad(y.primal.square().mean(), list(net.parameters()))
    want = torch.autograd.grad(net(z, *t[:times]).square().mean(), list(net.parameters()))
    for got, wanted in zip(grads, want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)

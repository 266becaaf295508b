"""A tensor and its tangent, carried together through a network."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def _operator(name: str, sign: str, reflected: bool = False) -> Callable[[Dual, Any], Dual]:
    def operator(x: Dual, other: Any) -> Dual:
        value = arithmetic.operand(other)
        if value is not None:
            return arithmetic.FUNCTIONS[name](*((value, x) if reflected else (x, value)))
        if hasattr(other, "__array__"):
            left, right = (type(t).__name__ for t in ((other, x) if reflected else (x, other)))
            raise TypeError(
                f"unsupported operand type(s) for {sign}: {left!r} and {right!r}. "
                "torch.from_numpy(array) makes a tensor of an array"
            )
        return NotImplemented

    return operator


class Dual:
    """A primal `x` and its tangent `x_dot`: the pair that every operation of this library maps to a pair.

    Gradients flow through the primal; the tangent is data, unless the `Dual` is differentiable. Shape, dtype
    and device are those of the primal.
    In addition to the operations of this library there are + − × ÷ with tensors, numbers and `Dual`s, ** with
    a number, indexing, `cat`, and the methods of tensors that are linear: reshape, view, flatten, unflatten,
    expand, repeat, transpose, permute, movedim, squeeze, unsqueeze, chunk, split, unbind, flip, roll, sum,
    mean, to and other casts, contiguous, clone; and of `torch.nn.functional` linear, gelu, silu and dropout
    that drops nothing. Other operators raise a TypeError that names a replacement.

    Args:
        primal: any floating-point or complex tensor, [B, ...]; the operations take floating-point ones.
        tangent: of the primal's dtype and device, and either of its shape; or [n, ...] with n < B for the
            last n samples of the batch, the others being structural zeros; or `None`, a structural zero
            altogether. Operations skip the work that structural zeros make needless.
        differentiable: gradients flow through the tangent too, and through all that are computed from it: to
            weights, primals and tangents. Arguments of one operation must agree, except those whose tangent
            is `None`.

    Raises:
        ValueError: a tangent of another shape, dtype or device, or one that requires grad without
            `differentiable`; from an operation whose arguments do not agree.
        TypeError: a primal or tangent that is not a tensor, or one of integers; a `differentiable` that is
            neither True nor False.
    """

    __slots__ = ("_differentiable", "_primal", "_tangent")

    def __init__(
        self, primal: Tensor, tangent: Tensor | None = None, *, differentiable: bool = False
    ) -> None:
        if not isinstance(primal, Tensor) or not (primal.is_floating_point() or primal.is_complex()):
            got = primal.dtype if isinstance(primal, Tensor) else type(primal).__name__
            raise TypeError(f"Dual: primal must be a floating-point or complex tensor, got {got}")
        if not isinstance(differentiable, bool):
            raise TypeError(f"Dual: differentiable must be True or False, got {differentiable!r}")
        if tangent is not None:
            _check_tangent(primal, tangent, differentiable)
        self._primal = primal
        self._tangent = tangent
        self._differentiable = differentiable

    @property
    def primal(self) -> Tensor:
        """The tensor itself. Read-only: kernels rely on the tangent's samples being the primal's last."""
        return self._primal

    @property
    def tangent(self) -> Tensor | None:
        """The full tangent, of the primal's shape, or `None` for a structural zero.

        If the primal carries gradients and the `Dual` is not differentiable, differentiating the tangent
        raises an error instead of silently leaving out a gradient; `.tangent.detach()` is the plain tensor.
        """
        if self._tangent is None:
            return None
        tangent = pad_with_zeros(self._tangent, self.primal.shape[0] if self.primal.dim() else 1)
        return tangent if self._differentiable else guarded(tangent, self.primal)

    @property
    def tangent_rows(self) -> Tensor | None:
        """The tangent as stored: [n, ...] for the last n ≤ B samples, or `None`. No guard, no copy."""
        return self._tangent

    @property
    def differentiable(self) -> bool:
        """Whether gradients flow through the tangent."""
        return self._differentiable

    @property
    def shape(self) -> torch.Size:
        return self.primal.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.primal.dtype

    @property
    def device(self) -> torch.device:
        return self.primal.device

    @property
    def ndim(self) -> int:
        return self.primal.dim()

    def dim(self) -> int:
        return self.primal.dim()

    def size(self, dim: int | None = None) -> Any:
        return self.primal.size() if dim is None else self.primal.size(dim)

    def __len__(self) -> int:
        return len(self.primal)

    # NumPy leaves `number * dual` to the Dual, and refuses `array * dual`.
    __array_ufunc__ = None

    __add__ = __radd__ = _operator("add", "+")
    __sub__, __rsub__ = _operator("sub", "-"), _operator("sub", "-", reflected=True)
    __mul__ = __rmul__ = _operator("mul", "*")
    __truediv__, __rtruediv__ = _operator("div", "/"), _operator("div", "/", reflected=True)

    def __pow__(self, exponent: Any) -> Dual:
        exponent = arithmetic.operand(exponent)
        if exponent is None:
            return NotImplemented
        if isinstance(exponent, (Tensor, Dual)):
            raise TypeError(f"** of a Dual takes a number as its exponent. {_BY_JVP}")
        return arithmetic.power(self, exponent)

    def __neg__(self) -> Dual:
        return arithmetic.neg(self)

    def __pos__(self) -> Dual:
        return self

    def __getitem__(self, at: Any) -> Any:
        return arithmetic.index(self, at)

    def __getattr__(self, name: str) -> Any:
        method = arithmetic.METHODS.get(name)
        if method is not None:
            return partial(method, self)
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"Dual has no attribute {name!r}")
        raise AttributeError(f"Dual has no {name}. {_INSTEAD}")

    def __repr__(self) -> str:
        stored = "None" if self._tangent is None else f"{list(self._tangent.shape)}"
        kind = ", differentiable=True" if self._differentiable else ""
        return (
            f"Dual(primal={list(self.shape)}, tangent={stored}, dtype={self.dtype}, "
            f"device='{self.device}'{kind})"
        )

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in TAKING_DUALS:
            return TAKING_DUALS[func](*args, **(kwargs or {}))
        function = arithmetic.FUNCTIONS.get(_ARITHMETIC.get(func, ""))
        if function is not None and len(args) == 2 and not kwargs:  # a tensor on the left
            return function(*args)
        raise TypeError(f"{name_of(func)} got a Dual. {_INSTEAD}")


def name_of(func: Any) -> str:
    """Returns the public name of a function of PyTorch.

    PyTorch gives builtin functions of one implementation, such as torch.mm and torch.spmm, the last one's.
    """
    name = torch.overrides.resolve_name(func) or getattr(func, "__qualname__", repr(func))
    place, own = name.rpartition(".")[0], getattr(func, "__name__", "_")
    if place.startswith("torch") and not own.startswith("_"):
        owner = reduce(getattr, place.split(".")[1:], torch)
        if getattr(owner, own, None) == func:
            return f"{place}.{own}"
    return name


_INSTEAD = (
    "Use the operation of that name in imf_kernels where there is one; for a function that is linear and "
    "keeps batch rows apart, imf_kernels.linear_map(function, x); where no tangent is wanted, x.primal"
)
# Functions of PyTorch that layers call, and what computes them of `Dual`s, with the same arguments.
TAKING_DUALS: dict[Any, Callable[..., Any]] = {}
_ARITHMETIC = {
    **{getattr(torch, name): name for name in ("add", "sub", "mul", "div")},
    **{getattr(Tensor, name): name for name in ("add", "sub", "mul", "div")},
    **{getattr(Tensor, f"__{name}__"): name for name in ("add", "sub", "mul")},
    Tensor.__truediv__: "div",
}


_BY_JVP = (
    "imf_kernels.jvp(function, (x.primal,), (x.tangent.detach(),)) differentiates any function of tensors; "
    "where no tangent is wanted, x.primal"
)
_ONE_NUMBER = "A number has no tangent: x.primal.item()"
_BITS = "A Dual has no bits; for masks, x.primal > 0 or the like"
# Operators that a Dual does not have: their Python notation, and what to use instead.
_REFUSED: dict[tuple[str, ...], tuple[str, str]] = {
    ("matmul", "rmatmul"): (
        "@",
        "imf_kernels.linear(x, w) is x @ w.mT; with another constant matrix, which keeps batch rows apart, "
        "imf_kernels.linear_map(lambda a: a @ w, x); for the product of two Duals, imf_kernels.jvp("
        "torch.matmul, (a.primal, b.primal), (a.tangent.detach(), b.tangent.detach()))",
    ),
    ("rpow",): ("** with a Dual as exponent", _BY_JVP),
    ("abs",): ("abs()", _BY_JVP),
    ("floordiv", "rfloordiv"): ("//", _BY_JVP),
    ("mod", "rmod"): ("%", _BY_JVP),
    ("divmod", "rdivmod"): ("divmod()", _BY_JVP),
    ("lt", "le", "gt", "ge", "eq", "ne"): ("Comparison", "A comparison has no tangent: compare x.primal"),
    ("setitem", "delitem"): (
        "x[i] = value",
        "A Dual does not change: join its parts with imf_kernels.cat, or x * mask + values",
    ),
    ("bool",): ("bool()", "Its truth would be that of its values: bool(x.primal); or x is not None"),
    **{(name,): (f"{name}()", _ONE_NUMBER) for name in ("int", "float", "complex")},
    ("round",): ("round()", _BY_JVP),
    **{(name,): (f"math.{name}()", _BY_JVP) for name in ("floor", "ceil", "trunc")},
    ("invert",): ("~", _BITS),
    **{
        (name, f"r{name}"): (sign, _BITS)
        for name, sign in (("and", "&"), ("or", "|"), ("xor", "^"), ("lshift", "<<"), ("rshift", ">>"))
    },
    ("array",): (
        "Conversion to NumPy",
        "Take one array of each part: x.primal.detach().numpy(), x.tangent.detach().numpy()",
    ),
}


def _refusal(what: str, instead: str) -> Callable[..., Any]:
    def operator(*args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{what} is not defined for a Dual. {instead}")

    return operator


for _names, _texts in _REFUSED.items():
    for _name in _names:
        setattr(Dual, f"__{_name}__", _refusal(*_texts))


def not_a_view(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns x.view(shape) as a separate tensor: autograd forbids modifying a view made by a Function."""
    return torch.ops.aten._unsafe_view.default(x, shape)


class NoTangent(TypeError):
    """A `Dual` for an argument that carries no tangent, or a tangent that kernels cannot read."""


def _check_tangent(primal: Tensor, tangent: Tensor, differentiable: bool) -> None:
    if not isinstance(tangent, Tensor):
        raise TypeError(f"Dual: tangent must be a tensor or None, got {type(tangent).__name__}")
    rest_equal = tangent.dim() == primal.dim() and tangent.shape[1:] == primal.shape[1:]
    if not rest_equal or (primal.dim() > 0 and tangent.shape[0] > primal.shape[0]):
        wanted = list(primal.shape)
        rows = f", or fewer rows of it, [n, {str(wanted[1:])[1:]}" if len(wanted) > 1 else ""
        raise ValueError(
            f"Dual: tangent must have the shape of its primal, {wanted}{rows}; got {list(tangent.shape)}"
        )
    if tangent.dtype != primal.dtype or tangent.device != primal.device:
        raise ValueError(
            f"Dual: tangent must be {primal.dtype} on {primal.device} like its primal, "
            f"got {tangent.dtype} on {tangent.device}"
        )
    if tangent.requires_grad and not differentiable:
        raise ValueError(
            "Dual: tangent requires grad, but no gradient flows through tangents; pass tangent.detach(), or "
            "differentiable=True"
        )


_LOST = (
    "imf_kernels: backward reached a tangent, but no gradient flows through tangents. Call .detach() on it "
    "before it enters the loss, or ask for its gradients: jvp(…, differentiable=True), "
    "Dual(…, differentiable=True)"
)


class _TracedGuard(torch.autograd.Function):
    """Guard of a tangent in a graph of torch.compile, which traces backward even if it never runs.

    An output of the graph that nobody differentiates gets a gradient of zeros.
    """

    @staticmethod
    def forward(ctx: Any, tangent: Tensor, primal: Tensor) -> Tensor:
        return not_a_view(tangent, tangent.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return None, _only_zeros(dy)


@torch.library.custom_op("imf_kernels::only_zeros", mutates_args=())
def _only_zeros(gradient: Tensor) -> Tensor:
    if gradient.any():
        raise RuntimeError(_LOST)
    return torch.zeros_like(gradient)


@_only_zeros.register_fake
def _(gradient: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def guarded(tangent: Tensor, primal: Tensor, *others: Tensor) -> Tensor:
    """Returns a tangent for the caller: a backward through it to its primal, or to others, raises."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (primal, *others)):
        if torch.compiler.is_compiling() or type(tangent) is not Tensor:
            return _TracedGuard.apply(tangent, primal)
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(f"{_LOST}. A transform of torch.func would leave it out in silence")
        # PyTorch's node whose backward raises and that leads to the sources; its first output is the tangent.
        return torch._C._functions.DelayedError(_LOST, 2 + len(others))(tangent, primal, *others)[0]
    return tangent


# Type of an operation's argument and result: one or the other.
TensorOrDual = TypeVar("TensorOrDual", bound="Tensor | Dual")


def pad_with_zeros(tangent: Tensor, rows: int) -> Tensor:
    """Returns the tangent of all `rows` samples, with zeros where it was not stored."""
    if tangent.dim() == 0 or tangent.shape[0] == rows:
        return tangent
    whole = tangent.new_zeros((rows, *tangent.shape[1:]))
    whole[rows - tangent.shape[0] :] = tangent
    return whole


def last_rows(x: Tensor, like: Tensor) -> Tensor:
    """Returns the samples of `x` to which the stored tangent `like` belongs: the last ones."""
    rows = like.shape[0] if x.dim() else 0
    return x if x.dim() == 0 or x.shape[0] == rows else x[x.shape[0] - rows :]


def stored(*tangents: Tensor | None) -> Tensor | None:
    """Returns the first tangent that is not a structural zero."""
    for tangent in tangents:
        if tangent is not None:
            return tangent
    return None


def no_gradient(ctx: Any, *tangents: Tensor) -> None:
    """Marks the tangents that an `autograd.Function` returns as not differentiable, and keeps autograd from
    passing its backward zeros as the missing gradients."""
    ctx.mark_non_differentiable(*tangents)
    ctx.set_materialize_grads(False)


def align(*tangents: Tensor | None) -> list[Tensor | None]:
    """Pads the stored tangents of several arguments to the samples of the longest; `None` stays `None`."""
    rows = max([0, *(t.shape[0] for t in tangents if t is not None and t.dim())])
    return [None if t is None else pad_with_zeros(t, rows) for t in tangents]


def unpack(x: Tensor | Dual) -> tuple[Tensor, Tensor | None]:
    """Returns primal and stored tangent (`None` for a plain tensor)."""
    return (x._primal, x._tangent) if isinstance(x, Dual) else (x, None)


def is_dual(x: Any) -> bool:
    return isinstance(x, Dual)


def primal(x: Tensor | Dual) -> Tensor:
    """Returns the primal alone, from which on nothing carries a tangent."""
    return x.primal if isinstance(x, Dual) else x


def unchecked(primal: Any, tangent: Any, differentiable: bool = False) -> Dual:
    """Makes a Dual of parts that are known to fit."""
    x = Dual.__new__(Dual)
    x._primal, x._tangent, x._differentiable = primal, tangent, differentiable
    return x


def pack(y: Tensor, y_dot: Tensor | None, *inputs: object) -> Any:
    """Returns a `Dual` if any of the inputs is one, differentiable as they are, else the tensor."""
    for x in inputs:
        if isinstance(x, Dual):
            return unchecked(y, y_dot, is_differentiable(*inputs))
    return y


def is_differentiable(*inputs: object) -> bool:
    """Returns whether gradients flow through the tangents of these arguments.

    Raises:
        ValueError: through some, but not all.
    """
    found = {x._differentiable for x in inputs if isinstance(x, Dual) and x._tangent is not None}
    if len(found) == 2:
        raise ValueError(
            "imf_kernels: arguments must be Duals made with differentiable=True, or none of them, got both: "
            "the gradient through the tangent of the others would be left out. Where it is not wanted, "
            "Dual(x.primal, x.tangent.detach(), differentiable=True) says so"
        )
    return True in found


def tangent_graph(differentiable: bool) -> contextlib.AbstractContextManager[Any]:
    """Returns the context in which a tangent is computed: with a graph only if it is differentiable."""
    return contextlib.nullcontext() if differentiable else torch.no_grad()


def linear_map(function: Callable[[Tensor], Any], x: Tensor | Dual) -> Any:
    """Applies a linear function to a tensor, or to primal and tangent alike.

    It is for reshapes, transposes, slices and everything else that is its own derivative.

    Args:
        function: linear in its argument, keeping the samples of the batch (dimension 0) apart and in order;
            called with [B, ...] and, for the tangent, with [n, ...]. Returns a tensor or a sequence of them.
        x: a tensor or a `Dual`.

    Returns:
        The result of `function`, with a `Dual` instead of each tensor if `x` is one.

    Raises:
        ValueError: `function` is not linear: it does not map zeros to zeros, or f(−2x) is not −2 f(x) for an
            x of numbers between −4 and 6. Eager mode checks once per function and shape.
    """
    if isinstance(x, Dual) and x._tangent is not None and not torch.compiler.is_compiling():
        _check_linear(function, x._tangent)
    return map_both(function, x)


_LINEAR: set[Any] = set()  # (code, shape, dtype) of functions found linear


def _check_linear(function: Callable[[Tensor], Any], like: Tensor) -> None:
    asked = (getattr(function, "__code__", function), like.shape, like.dtype)
    if asked in _LINEAR:
        return
    # The check must not change the program's random numbers.
    with torch.no_grad(), torch.random.fork_rng([like.device] if like.is_cuda else []):
        for y in pytree.tree_leaves(function(torch.zeros_like(like))):
            if isinstance(y, Tensor) and y.any():
                raise ValueError(
                    f"linear_map: function must be linear, but maps zeros to {_first(y)} …; "
                    "what does not depend on the Dual is added to it with +"
                )
        x = _between_minus_4_and_6(like)
        scaled = -2 * x  # before `function`, which may write into x
        ys, of_scaled = (pytree.tree_leaves(function(v)) for v in (x, scaled))
        for y, y_of_scaled in zip(ys, of_scaled, strict=False):
            _check_scaled(y, y_of_scaled)
    _LINEAR.add(asked)


def _first(y: Tensor) -> list[float]:
    return y.flatten()[:4].tolist()


def _between_minus_4_and_6(like: Tensor) -> Tensor:
    """Returns numbers without a pattern that are not random: fractional parts of multiples of √2."""
    some = (torch.arange(1, 4100, device=like.device, dtype=torch.float32) * 2**0.5).frac_() * 10 - 4
    return some.to(like.dtype).repeat(like.numel() // 4099 + 1)[: like.numel()].view(like.shape)


def _check_scaled(y: Any, of_scaled: Any) -> None:
    """Raises unless f(−2x) is −2 f(x).

    Scaling by −2 is exact, so the tolerance is only for sums whose order changes between calls. Subnormal
    numbers are rounded and count as 0; infinities, where float16 overflows, as equal.
    """
    if not isinstance(y, Tensor) or not y.is_floating_point():
        return  # no Dual takes these
    tolerance, tiny = max(1e-3, 4 * torch.finfo(y.dtype).eps), torch.finfo(y.dtype).tiny
    if y.shape == of_scaled.shape:
        if not y.numel():
            return
        y, of_scaled = (v if v.dtype == torch.float64 else v.float() for v in (y, of_scaled))
        difference = (of_scaled + 2 * y).abs()
        compared = y.isfinite() & of_scaled.isfinite()
        largest = torch.where(compared, y.abs(), 0).max()
        wrong = compared & ~(difference <= tolerance * largest + tiny) | (y.isnan() != of_scaled.isnan())
        if not wrong.any():
            return
        y, of_scaled = y[wrong], of_scaled[wrong]
    raise ValueError(
        f"linear_map: function must be linear, but maps some x to {_first(y)} … and -2x to "
        f"{_first(of_scaled)} …; use the operation of that name in imf_kernels where there is one, "
        "imf_kernels.jvp for any function of tensors; draw random numbers outside of function"
    )


def map_both(function: Callable[[Tensor], Any], x: Tensor | Dual) -> Any:
    """Applies a function that is known to be linear, as `linear_map` does."""
    if not isinstance(x, Dual):
        return function(x)
    y, y_dot = function(x.primal), None
    if x._tangent is not None:
        with tangent_graph(x._differentiable):
            y_dot = function(x._tangent)
    if isinstance(y, Tensor):
        return Dual(y, y_dot, differentiable=x._differentiable)
    made = partial(Dual, differentiable=x._differentiable)
    if y_dot is None:
        return pytree.tree_map(made, y)
    if type(y) in (list, tuple) and all(isinstance(a, Tensor) for a in y):  # a tenth of the time of a pytree
        return type(y)([made(a, b) for a, b in zip(y, y_dot, strict=True)])
    return pytree.tree_map(made, y, y_dot)


# Whether it is differentiable; the rows of a primal whose tangent is stored for some, and how many.
_Context = tuple[bool, int, int]


def _flatten(x: Dual) -> tuple[list[Any], _Context]:
    primal, stored = x._primal, x._tangent
    # A pytree map may have replaced the tensors by anything.
    if not isinstance(primal, Tensor) or not isinstance(stored, Tensor) or primal.dim() == 0:
        return [primal, stored], (x._differentiable, 0, 0)
    rows, stored_rows = primal.shape[0], stored.shape[0]
    return [primal, stored], (x._differentiable, *((rows, stored_rows) if stored_rows < rows else (0, 0)))


def _unflatten(children: Any, context: _Context) -> Dual:
    primal, tangent = children
    differentiable, rows, stored_rows = context
    if not isinstance(primal, Tensor) or not isinstance(tangent, Tensor):
        return unchecked(primal, tangent, differentiable)
    if stored_rows < rows and (*primal.shape[:1], *tangent.shape[:1]) != (rows, stored_rows):
        # The same slice of both would pair samples that do not belong together.
        raise ValueError(
            f"Dual: a function of tensors cannot change the rows of a Dual whose tangent is stored for "
            f"the last {stored_rows} of {rows} rows; complete it first: Dual(x.primal, x.tangent.detach())"
        )
    return Dual(primal, tangent, differentiable=differentiable)


def _flatten_with_keys(x: Dual) -> tuple[list[tuple[Any, Any]], _Context]:
    children, context = _flatten(x)
    keys = pytree.GetAttrKey("primal"), pytree.GetAttrKey("tangent")
    return list(zip(keys, children, strict=True)), context


pytree.register_pytree_node(
    Dual,
    _flatten,
    _unflatten,
    serialized_type_name="imf_kernels.Dual",
    flatten_with_keys_fn=_flatten_with_keys,
)

from imf_kernels.ops import arithmetic  # noqa: E402  (it needs `Dual`)

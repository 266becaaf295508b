"""Arithmetic in several calls of PyTorch that one call computes, found by what the calls take and make."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imf_kernels.advice.record import Call, Value
from imf_kernels.nn.modules import Modulate


@dataclass(eq=False)
class Chain:
    """Calls of one run that one call could replace.

    Attributes:
        advice: what to call instead.
        computes: the formula.
        inputs: of the replacement, in shape, dtype and whether they have a tangent and require grad.
        replacement: a function of such inputs.
    """

    advice: str
    computes: str
    calls: list[Call]
    inputs: list[Value]
    replacement: Callable[..., Tensor]

    @property
    def key(self) -> Any:
        """Chains of one key take the same time."""
        return self.advice, *((x.shape, x.dtype, x.moves, x.requires_grad) for x in self.inputs)


Users = dict[Value, list[Call]]


def find(calls: list[Call]) -> list[Chain]:
    """Returns the chains among calls, none of whose tensors in between are used elsewhere."""
    users: Users = defaultdict(list)
    for call in calls:
        for x in call.tensors:
            if x not in call.made:  # as of a cast to the same dtype
                users[x].append(call)
    found = []
    for call in calls:
        for kind, match in _MATCHES:
            chain = match(call, users) if call.kind in kind and _is_plain(call) else None
            if chain is not None and _is_closed(chain.calls, users):
                found.append(chain)
    return found


def _is_plain(call: Call) -> bool:
    """Returns whether a call makes a tensor of its tensors, without a factor."""
    return len(call.made) == 1 and all(call.named.get(name, 1) == 1 for name in ("alpha", "value"))


def _is_closed(calls: list[Call], users: Users) -> bool:
    inside = [y for call in calls[:-1] for y in call.made]
    return all(user in calls for y in inside for user in users[y]) and any(
        x.moves for call in calls for x in call.tensors
    )


_CASTS = ("to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous")
_VIEWS = ("unsqueeze", "getitem", "view", "reshape")
_PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")


def _back(x: Value, kinds: tuple[str, ...]) -> tuple[Value, list[Call]]:
    """Follows a tensor back through calls of these kinds, which are returned too, the first first."""
    path: list[Call] = []
    while (maker := _maker(x, *kinds)) is not None:
        path.insert(0, maker)
        x = maker.tensors[0]
    return x, path


def _maker(x: Value, *kinds: str) -> Call | None:
    """Returns the call that made a tensor, if it is of these kinds."""
    maker = x.maker
    return maker if maker is not None and maker.kind in kinds and maker.tensors and _is_plain(maker) else None


def _orders(call: Call) -> Iterator[tuple[Value, Value]]:
    """Yields both orders of a call's two tensors."""
    if len(call.tensors) == 2:
        a, b = call.tensors
        yield a, b
        yield b, a


def _has(call: Call, number: float) -> bool:
    return any(isinstance(x, (int, float)) and x == number for x in call.given)


_SILU = "torch.nn.functional.silu(x)", "x · sigmoid(x)"


def _silu(call: Call, users: Users) -> Chain | None:
    for x, gate in _orders(call):
        sigmoid = _maker(gate, "sigmoid")
        if sigmoid is not None and sigmoid.tensors == [x]:
            return Chain(*_SILU, [sigmoid, call], [x], F.silu)
    return None


_RMS_NORM = "torch.nn.functional.rms_norm(x, …)", "x · rsqrt(mean(x²))"


def _rms_norm(call: Call, users: Users) -> Chain | None:
    for x, scale in _orders(call):
        x, casts = _back(x, _CASTS)
        norm = _mean_square(x, scale, call.kind == "div")
        if norm is None:
            continue
        calls, (d,) = [*casts, *norm, call], x.shape[-1:]
        weighted, weight = _weighted(call, users, d)
        inputs = [x] if weight is None else [x, weight]
        return Chain(
            *_RMS_NORM,
            list(dict.fromkeys([*calls, *weighted])),
            inputs,
            lambda x, weight=None: F.rms_norm(x, x.shape[-1:], weight, 1e-6),
        )
    return None


def _mean_square(x: Value, scale: Value, divides: bool) -> list[Call] | None:
    """Returns the calls by which a factor, or a divisor, is 1 / √(mean(x²) + eps), or its inverse."""
    if divides:
        root = _maker(scale, "sqrt", "pow")
        if root is None or (root.kind == "pow" and not _has(root, 0.5)):
            return None
    else:
        root = _maker(scale, "rsqrt", "pow")
        if root is None or (root.kind == "pow" and not _has(root, -0.5)):
            return None
    inner, between = _back(root.tensors[0], ("add", *_CASTS))
    mean = _maker(inner, "mean")
    if mean is None or mean.made[0].shape != (*x.shape[:-1], 1):
        return None
    square = _maker(mean.tensors[0], "pow", "square", "mul")
    if square is None or (square.kind == "pow" and not _has(square, 2)):
        return None
    if len({_back(y, _CASTS)[0] for y in square.tensors} | {x}) != 1:
        return None
    if square.kind == "mul" and len(square.tensors) != 2:
        return None
    return [*_back(square.tensors[0], _CASTS)[1], square, mean, *between, root]


def _weighted(call: Call, users: Users, d: int) -> tuple[list[Call], Value | None]:
    """Returns the calls that multiply a call's result by a weight [d], through casts, and the weight."""
    path: list[Call] = []
    y = call.made[0]
    while len(users[y]) == 1:
        (user,) = users[y]
        if user.kind == "mul":
            for normed, weight in _orders(user):
                if normed is y and weight.shape == (d,) and not weight.moves:
                    return [*path, user], weight
        if user.kind not in _CASTS:
            break
        path.append(user)
        y = user.made[0]
    return [], None


_MODULATED = "imf_kernels.nn.Modulate()(x, shift, scale)", "layer_norm(x) · (1 + scale) + shift"


def _modulated(call: Call, users: Users) -> Chain | None:
    if call.kind == "addcmul" and len(call.tensors) == 3:
        shift, *factors = call.tensors
        return _layer_norm_modulated(shift, factors, [call])
    for product, shift in _orders(call):
        mul = _maker(product, "mul")
        if mul is not None and len(mul.tensors) == 2:
            chain = _layer_norm_modulated(shift, mul.tensors, [mul, call])
            if chain is not None:
                return chain
    return None


def _layer_norm_modulated(shift: Value, factors: list[Value], calls: list[Call]) -> Chain | None:
    for normed, scale in (factors, factors[::-1]):
        normed, casts = _back(normed, _CASTS)
        scale, views = _back(scale, _VIEWS)
        norm, plus_one = _maker(normed, "layer_norm"), _maker(scale, "add")
        if norm is None or plus_one is None or len(norm.tensors) != 1 or len(plus_one.tensors) != 1:
            continue
        (x,), (scale,) = norm.tensors, plus_one.tensors
        over_last = sum(isinstance(n, int) for n in norm.given) == 1
        if not _has(plus_one, 1) or not over_last or len(x.shape) != 3:
            continue
        one_row = x.shape[0], x.shape[2]
        if shift.shape != (one_row[0], 1, one_row[1]) or math.prod(scale.shape) != math.prod(one_row):
            continue
        inputs = [x, replace(shift, shape=one_row), replace(scale, shape=one_row)]
        return Chain(*_MODULATED, [norm, *casts, plus_one, *views, *calls], inputs, Modulate())
    return None


_ATTENTION = "torch.nn.functional.scaled_dot_product_attention(q, k, v)", "softmax(q · kᵀ) · v"
_TO_LOGITS = ("mul", "div", "add", "sub", "masked_fill", *_CASTS)


def _attention(call: Call, users: Users) -> Chain | None:
    if len(call.tensors) != 1 or len(call.given) < 2:
        return None
    (logits,), dim = call.tensors, call.named.get("dim", call.given[1])
    if dim not in (-1, len(logits.shape) - 1) or len(logits.shape) < 2 or 0 in logits.shape:
        return None
    found = _product_behind(logits)
    output = _product_of(call.made[0], users)
    if found is None or output is None:
        return None
    product, path, mask = found
    last, between, weights = output
    q, k = product.tensors[-2:]
    (v,) = (x for x in last.tensors if x is not weights)
    (*lead, rows, columns), batch = logits.shape, math.prod(logits.shape[:-2])
    widths = [math.prod(x.shape) / (batch * n) for x, n in ((q, rows), (k, columns), (v, columns))]
    if widths[0] != widths[1] or not all(w == int(w) and w for w in widths):
        return None
    inputs = [
        replace(x, shape=(*lead, n, int(w)), dtype=last.made[0].dtype)
        for x, n, w in zip((q, k, v), (rows, columns, columns), widths, strict=True)
    ]
    calls = [product, *path, call, *between, last]
    return Chain(*_ATTENTION, calls, [*inputs, *mask], F.scaled_dot_product_attention)


def _product_behind(logits: Value) -> tuple[Call, list[Call], list[Value]] | None:
    """Returns the product that logits are made of, the calls after it, and the mask among them."""
    path: list[Call] = []
    mask: list[Value] = []
    x = logits
    while True:
        maker = _maker(x, *_PRODUCTS, *_TO_LOGITS)
        if maker is None:
            return None
        if maker.kind in _PRODUCTS:
            return (maker, path, mask) if len(maker.tensors) >= 2 else None
        path.insert(0, maker)
        large = [y for y in maker.tensors if math.prod(y.shape) > 1 and y.dtype != torch.bool]
        others = [y for y in maker.tensors if y.dtype == torch.bool]
        if maker.kind in ("add", "sub") and len(large) == 2:
            y = max(large, key=lambda y: y.moves)  # the mask has no tangent
            others += [z for z in large if z is not y]
            large = [y]
        if len(large) != 1 or len(others) + len(mask) > 1:
            return None
        if any(y.moves or y.requires_grad for y in others):
            return None
        x, mask = large[0], mask + others


def _product_of(weights: Value, users: Users) -> tuple[Call, list[Call], Value] | None:
    """Returns the product that takes attention's weights, the calls before it, and its operand."""
    path: list[Call] = []
    while len(users[weights]) == 1:
        (user,) = users[weights]
        if user.kind in _PRODUCTS:
            return (user, path, weights) if len(set(user.tensors)) == 2 == len(user.tensors) else None
        drops = user.kind == "dropout" and user.named.get("training") and user.named.get("p")
        if user.kind not in ("dropout", *_CASTS) or drops:
            return None
        path.append(user)
        weights = user.made[0]
    return None


_MATCHES: tuple[tuple[tuple[str, ...], Callable[[Call, Users], Chain | None]], ...] = (
    (("mul",), _silu),
    (("mul", "div"), _rms_norm),
    (("add", "addcmul"), _modulated),
    (("softmax",), _attention),
)

"""Dual numbers in kernels: tuples (value, tangent), or (value,) where the tangent is a structural zero.

A backward is written once for them. Of (x,) and (dy,) it is the primal's; of the duals (x, ẋ) and (dẏ, dy)
its value is dẋ and its tangent dx, see imf_kernels/backends/operators.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from imf_kernels.backends.triton_kernels.rows import sum_of_row


@triton.jit
def dual(value, tangent):
    """Returns (value, tangent); (value,) if the tangent is `None`."""
    if tangent is None:
        return (value,)
    else:
        return value, tangent


@triton.jit
def cotangents(of_primal, of_tangent):
    """Returns cotangents as a backward takes them: (of_tangent, of_primal), or (of_primal,)."""
    if of_tangent is None:
        return (of_primal,)
    else:
        return of_tangent, of_primal


@triton.jit
def chain(value, slope, x):
    """Returns f(x) of a dual x, from f and f′ at its value."""
    if len(x) > 1:
        return value, slope * x[1]
    else:
        return (value,)


@triton.jit
def load_dual(x, at, inside, x_dot, at_dot, moves):
    """Loads x at offsets, in float32, and x_dot where `moves`, zeros elsewhere; (x,) without x_dot."""
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if x_dot is None:
        return (values,)
    else:
        return values, tl.load(x_dot + at_dot, mask=moves, other=0.0).to(tl.float32)


@triton.jit
def load_cotangents(dy, at, inside, dy_dot, at_dot, moves):
    """Loads `cotangents` at offsets, in float32."""
    d = load_dual(dy, at, inside, dy_dot, at_dot, moves)
    if len(d) > 1:
        return d[1], d[0]
    else:
        return d


@triton.jit
def of_primal(d):
    """Returns the part of a backward that is the gradient of a primal, or of a weight without a tangent."""
    return d[len(d) - 1]


@triton.jit
def store_gradients(dx, at, inside, dx_dot, at_dot, moves, d):
    """Stores the gradients of x and, if that has one, of its tangent."""
    tl.store(dx + at, of_primal(d), mask=inside)
    if dx_dot is not None:
        tl.store(dx_dot + at_dot, d[0], mask=moves)


@triton.jit
def minus(a, b):
    if len(a) > 1:
        if len(b) > 1:
            return a[0] - b[0], a[1] - b[1]
        else:
            return a[0] - b[0], a[1]
    elif len(b) > 1:
        return a[0] - b[0], -b[1]
    else:
        return (a[0] - b[0],)


@triton.jit
def times(a, b):
    if len(a) > 1:
        if len(b) > 1:
            return a[0] * b[0], tl.fma(a[1], b[0], a[0] * b[1])
        else:
            return a[0] * b[0], a[1] * b[0]
    elif len(b) > 1:
        return a[0] * b[0], a[0] * b[1]
    else:
        return (a[0] * b[0],)


@triton.jit
def add_product(total, a, b):
    """Adds `of_primal(times(a, b))` to a sum."""
    if len(a) > 1 and len(b) > 1:
        total = tl.fma(a[0], b[1], total)
        return tl.fma(a[1], b[0], total)
    else:
        return tl.fma(of_primal(a), of_primal(b), total)


@triton.jit
def mean_of_row(a, WIDTH: tl.constexpr):
    if len(a) > 1:
        return sum_of_row(a[0]) * (1.0 / WIDTH), sum_of_row(a[1]) * (1.0 / WIDTH)
    else:
        return (sum_of_row(a[0]) * (1.0 / WIDTH),)


@triton.jit
def dual_rstd(c, r, WIDTH: tl.constexpr):
    """Returns r = (mean(c²) + ε)^(−½) with its tangent −r² mean(n ċ), n = c r, in an order in which only
    results can overflow."""
    if len(c) > 1:
        return r, -r * (r * (sum_of_row(c[0] * r * c[1]) * (1.0 / WIDTH)))
    else:
        return (r,)

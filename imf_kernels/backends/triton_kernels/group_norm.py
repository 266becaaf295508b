"""GroupNorm with its tangent, optionally followed by SiLU, its primal backward and that of the pair.

Formulas: imf_kernels/ops/group_norm.py. A group's values are counted in memory order, and cut into chunks of
BLOCK.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from imf_kernels.backends.triton_kernels.duals import (
    chain,
    cotangents,
    dual,
    load_cotangents,
    load_dual,
    minus,
    of_primal,
    store_gradients,
    times,
)
from imf_kernels.backends.triton_kernels.elementwise import dual_silu, sigmoid, silu_derivative
from imf_kernels.backends.triton_kernels.rows import sum_of_row
from imf_kernels.backends.triton_launch import Launcher, Tensors

_BLOCK = 4096
_TILE = 2048  # values of a tile of channels and positions
_TILES = 8  # per program
_MOST_PARTS = tl.constexpr(256)  # read at a time: of chunks' moments, and channels' sums


@triton.jit
def _center(x, inside, count):
    """Returns the mean of x [1, BLOCK], its correction, and x less both; 0 outside."""
    mean = tl.div_rn(sum_of_row(x), count)
    x = tl.where(inside, x - mean, 0.0)
    correction = tl.div_rn(sum_of_row(x), count)
    return mean, correction, tl.where(inside, x - correction, 0.0)


@triton.jit
def _values(
    chunk, positions, GROUPS: tl.constexpr, WIDTH: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr
):
    """Returns which values [1, BLOCK] of a chunk are inside, their channels in the group, their addresses."""
    i = chunk * BLOCK + tl.arange(0, BLOCK)[None, :]
    if LAST:
        channel, at = i % WIDTH, (i // WIDTH).to(tl.int64) * (GROUPS * WIDTH) + i % WIDTH
    else:
        channel, at = i // positions, i.to(tl.int64)
    return i < positions * WIDTH, channel, at


@triton.jit
def _first(sample, group, positions, GROUPS: tl.constexpr, WIDTH: tl.constexpr, LAST: tl.constexpr):
    """Returns the address of a group's first value."""
    if LAST:
        first = sample * positions * (GROUPS * WIDTH) + group * WIDTH
    else:
        first = (sample * GROUPS + group) * WIDTH * positions
    return first


@triton.jit
def _parameter(parameter, channel, inside, missing: tl.constexpr):
    """Loads a parameter of channels in float32."""
    if parameter is None:
        values = tl.full(channel.shape, missing, tl.float32)
    else:
        values = tl.load(parameter + channel, mask=inside, other=0.0)
    return values


@triton.jit(do_not_specialize=["first_tangent", "positions", "chunks"])
def group_norm_moments(
    x, x_dot, partial, first_tangent, positions, chunks,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes a chunk's mean, its correction, the sum of squares about both, and of the tangent the mean and
    the sum of products."""
    positions = positions * UNIT
    unit, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    sample, group = unit // GROUPS, unit % GROUPS
    inside, _, at = _values(chunk, positions, GROUPS, WIDTH, LAST, BLOCK)
    count = tl.minimum(positions * WIDTH - chunk * BLOCK, BLOCK).to(tl.float32)
    at += _first(sample, group, positions, GROUPS, WIDTH, LAST)
    xi = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    mean, correction, c = _center(xi, inside, count)
    out = partial + (unit * chunks + chunk) * 5 + tl.zeros((1, 1), tl.int32)
    tl.store(out, mean)
    tl.store(out + 1, correction)
    tl.store(out + 2, sum_of_row(c * c))
    if x_dot is not None:
        at -= first_tangent.to(tl.int64) * positions * (GROUPS * WIDTH)
        inside &= at >= 0
        ti = tl.load(x_dot + at, mask=inside, other=0.0).to(tl.float32)
        mean_dot, correction_dot, c_dot = _center(ti, inside, count)
        tl.store(out + 3, mean_dot + correction_dot)
        tl.store(out + 4, sum_of_row(c * c_dot))


@triton.jit
def _part(partial, k, chunks, size, BLOCK: tl.constexpr):
    """Loads moments of chunks k, and returns their shares of the group's values too."""
    inside = k < chunks
    count = tl.where(inside, tl.minimum(size - k * BLOCK, BLOCK), 0).to(tl.float32)
    mean = tl.load(partial + k * 5, mask=inside, other=0.0)
    correction = tl.load(partial + k * 5 + 1, mask=inside, other=0.0)
    return inside, count, tl.div_rn(count, size.to(tl.float32)), mean, correction


@triton.jit
def _merge(partial, chunks, size, BLOCK: tl.constexpr, DUAL: tl.constexpr):
    """Merges the moments of a group's chunks (Chan, Golub and LeVeque, 1983)."""
    k = tl.arange(0, _MOST_PARTS)[None, :]
    means = tl.zeros((1, _MOST_PARTS), tl.float32)
    for first in range(0, chunks, _MOST_PARTS):
        _, _, share, mean_k, _ = _part(partial, first + k, chunks, size, BLOCK)
        means = tl.fma(share, mean_k, means)
    mean = sum_of_row(means)
    corrections = tl.zeros((1, _MOST_PARTS), tl.float32)
    means_dot = tl.zeros((1, _MOST_PARTS), tl.float32)
    for first in range(0, chunks, _MOST_PARTS):
        inside, _, share, mean_k, correction_k = _part(partial, first + k, chunks, size, BLOCK)
        corrections = tl.fma(share, mean_k - mean + correction_k, corrections)
        if DUAL:
            mean_dot_k = tl.load(partial + (first + k) * 5 + 3, mask=inside, other=0.0)
            means_dot = tl.fma(share, mean_dot_k, means_dot)
    correction, mean_dot = sum_of_row(corrections), sum_of_row(means_dot)
    squares = tl.zeros((1, _MOST_PARTS), tl.float32)
    products = tl.zeros((1, _MOST_PARTS), tl.float32)
    for first in range(0, chunks, _MOST_PARTS):
        inside, count, _, mean_k, correction_k = _part(partial, first + k, chunks, size, BLOCK)
        delta = mean_k - mean + (correction_k - correction)
        squares += tl.load(partial + (first + k) * 5 + 2, mask=inside, other=0.0) + delta * delta * count
        if DUAL:
            delta_dot = tl.load(partial + (first + k) * 5 + 3, mask=inside, other=0.0) - mean_dot
            products_k = tl.load(partial + (first + k) * 5 + 4, mask=inside, other=0.0)
            products += products_k + delta * delta_dot * count
    return mean, correction, sum_of_row(squares), mean_dot, sum_of_row(products)


@triton.jit(do_not_specialize=["first_tangent", "positions", "chunks"])
def group_norm_forward(
    x, x_dot, weight, bias, y, y_dot, statistics, partial, first_tangent, positions, chunks, eps,
    SILU: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    positions = positions * UNIT
    unit, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    sample, group = unit // GROUPS, unit % GROUPS
    inside, channel, at = _values(chunk, positions, GROUPS, WIDTH, LAST, BLOCK)
    at += _first(sample, group, positions, GROUPS, WIDTH, LAST)
    at_dot = at - first_tangent.to(tl.int64) * positions * (GROUPS * WIDTH)
    moves = inside & (at_dot >= 0)
    xi = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    size = positions * WIDTH
    count = size.to(tl.float32)
    if partial is None:
        mean, correction, c = _center(xi, inside, count)
        squares = sum_of_row(c * c)
        if x_dot is not None:
            ti = tl.load(x_dot + at_dot, mask=moves, other=0.0).to(tl.float32)
            _, _, c_dot = _center(ti, moves, count)
            products = sum_of_row(c * c_dot)
    else:
        mean, correction, squares, mean_dot, products = _merge(
            partial + unit * chunks * 5, chunks, size, BLOCK, x_dot is not None
        )
        c = xi - mean - correction
        if x_dot is not None:
            c_dot = tl.load(x_dot + at_dot, mask=moves, other=0.0).to(tl.float32) - mean_dot
    r = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, count) + eps))
    out = statistics + unit * 3 + tl.zeros((1, 1), tl.int32)
    if chunk == 0:
        tl.store(out, mean)
        tl.store(out + 1, correction)
        tl.store(out + 2, r)
    channel += group * WIDTH
    w = _parameter(weight, channel, inside, 1.0)
    z = tl.fma(c, r * w, _parameter(bias, channel, inside, 0.0))
    yi = z
    if SILU:
        s = sigmoid(z)
        yi = z * s
    tl.store(y + at, yi, mask=inside)
    if x_dot is not None:
        r_dot = -r * r * r * tl.div_rn(products, count)
        z_dot = (c_dot * r + c * r_dot) * w
        if SILU:
            z_dot *= silu_derivative(z, s)
        tl.store(y_dot + at_dot, z_dot, mask=moves)


@triton.jit(do_not_specialize=["positions", "chunks"])
def group_norm_tangents(
    partial, statistics, tangents, positions, chunks,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the tangents of a group's mean and of r: ṙ = −r² mean(n ẋ), multiplied so that only it can
    overflow."""
    unit, size = tl.program_id(0).to(tl.int64), positions * UNIT * WIDTH
    _, _, _, mean_dot, products = _merge(partial + unit * chunks * 5, chunks, size, BLOCK, True)
    r = tl.load(statistics + unit * 3 + 2)
    out = tangents + unit * 2 + tl.zeros((1, 1), tl.int32)
    tl.store(out, mean_dot)
    tl.store(out + 1, -r * (r * (r * tl.div_rn(products, size.to(tl.float32)))))


@triton.jit
def _normalized(x, statistics, tangents, unit, t_unit, exists):
    """Returns n and r of values x, duals."""
    mean = tl.load(statistics + unit * 3, mask=exists, other=0.0)
    correction = tl.load(statistics + unit * 3 + 1, mask=exists, other=0.0)
    c_dot, r_dot = None, None
    if len(x) > 1:
        moves = exists & (t_unit >= 0)
        c_dot = x[1] - tl.load(tangents + t_unit * 2, mask=moves, other=0.0)
        r_dot = tl.load(tangents + t_unit * 2 + 1, mask=moves, other=0.0)
    r = dual(tl.load(statistics + unit * 3 + 2, mask=exists, other=0.0), r_dot)
    return times(dual(x[0] - mean - correction, c_dot), r), r


@triton.jit
def _cotangent(n, dy, weight, bias, channel, inside, SILU: tl.constexpr):
    """Returns the cotangent of z = n weight + bias, of duals, and the weight."""
    w = (_parameter(weight, channel, inside, 1.0),)
    dz = dy
    if SILU:
        z = tl.fma(n[0], w[0], _parameter(bias, channel, inside, 0.0))
        _, slope = dual_silu(chain(z, w[0], n))
        dz = times(dy, slope)
    return dz, w


@triton.jit(do_not_specialize=["first_tangent", "positions", "shares"])
def group_norm_sums(
    x, x_dot, dy, dy_dot, weight, bias, statistics, tangents, partial, first_tangent, positions, shares,
    SILU: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, LAST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Writes the sums of dz and of dz n of ROWS channels, over TILES tiles of BLOCK positions; of duals their
    tangents, which are the gradients of bias and weight, then their values."""
    positions = positions * UNIT
    channels = GROUPS * WIDTH
    blocks = tl.cdiv(channels, ROWS)
    share, block = tl.program_id(0) % shares, tl.program_id(0) // shares
    sample = (block // blocks).to(tl.int64)
    channel = block % blocks * ROWS + tl.arange(0, ROWS)[:, None]
    exists = channel < channels
    unit, first = sample * GROUPS + channel // WIDTH, first_tangent.to(tl.int64)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias_dot = tl.zeros((ROWS, BLOCK), tl.float32)
    dweight_dot = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(TILES):
        position = (share * TILES + tile) * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = exists & (position < positions)
        if LAST:
            of_value = (sample * positions + position) * channels + channel
        else:
            of_value = (sample * channels + channel) * positions + position
        of_dot = of_value - first * positions * channels
        moves = inside & (of_dot >= 0)
        xi = load_dual(x, of_value, inside, x_dot, of_dot, moves)
        d = load_cotangents(dy, of_value, inside, dy_dot, of_dot, moves)
        n, _ = _normalized(xi, statistics, tangents, unit, unit - first * GROUPS, exists)
        dz, _ = _cotangent(n, d, weight, bias, channel, exists, SILU)
        dzn = times(dz, n)
        dbias += tl.where(inside, of_primal(dz), 0.0)
        dweight += tl.where(inside, of_primal(dzn), 0.0)
        if dy_dot is not None:
            dbias_dot += tl.where(inside, dz[0], 0.0)
            dweight_dot += tl.where(inside, dzn[0], 0.0)
    at = sample * shares + share
    if dy_dot is None:
        _store_sums(partial, at, (dbias, dweight), channel, channels)
    else:
        _store_sums(partial, at, (dbias, dweight, dbias_dot, dweight_dot), channel, channels)


@triton.jit
def _store_sums(partial, at, sums, channel, channels):
    """Stores the sums over positions of tiles [ROWS, BLOCK] into partial [shares, sums, channels]."""
    out = partial + at * (len(sums) * channels) + channel
    for i in tl.static_range(len(sums)):
        total = tl.sum(sums[i], axis=1, keep_dims=True)
        tl.store(out + i * channels, total, mask=channel < channels)


@triton.jit
def _mean_over_group(sums, weight, channel, WIDTH: tl.constexpr, count):
    """Returns the mean of w times sums over positions, of the WIDTH channels of a group from `channel` on."""
    total = tl.zeros((1, _MOST_PARTS), tl.float32)
    for first in range(0, WIDTH, _MOST_PARTS):
        i = first + tl.arange(0, _MOST_PARTS)[None, :]
        w = _parameter(weight, channel + i, i < WIDTH, 1.0)
        total = tl.fma(w, tl.load(sums + channel + i, mask=i < WIDTH, other=0.0), total)
    return tl.div_rn(sum_of_row(total), count)


@triton.jit(do_not_specialize=["first_tangent", "positions", "chunks"])
def group_norm_backward(
    x, x_dot, dy, dy_dot, weight, bias, statistics, tangents, dx, dx_dot, sums,
    first_tangent, positions, chunks,
    SILU: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    positions = positions * UNIT
    unit, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    sample, group = unit // GROUPS, unit % GROUPS
    first, channels = first_tangent.to(tl.int64), GROUPS * WIDTH
    count = (positions * WIDTH).to(tl.float32)
    at = sums + sample * ((2 if dy_dot is None else 4) * channels)
    mean_g = _mean_over_group(at, weight, group * WIDTH, WIDTH, count)
    mean_gn = _mean_over_group(at + channels, weight, group * WIDTH, WIDTH, count)
    mean_g_dot, mean_gn_dot = None, None
    if dy_dot is not None:
        mean_g_dot = _mean_over_group(at + 2 * channels, weight, group * WIDTH, WIDTH, count)
        mean_gn_dot = _mean_over_group(at + 3 * channels, weight, group * WIDTH, WIDTH, count)
    inside, channel, at = _values(chunk, positions, GROUPS, WIDTH, LAST, BLOCK)
    at += _first(sample, group, positions, GROUPS, WIDTH, LAST)
    at_dot = at - first * positions * channels
    moves = inside & (at_dot >= 0)
    xi = load_dual(x, at, inside, x_dot, at_dot, moves)
    d = load_cotangents(dy, at, inside, dy_dot, at_dot, moves)
    n, r = _normalized(xi, statistics, tangents, unit, unit - first * GROUPS, unit >= 0)
    dz, w = _cotangent(n, d, weight, bias, channel + group * WIDTH, inside, SILU)
    of_n = minus(times(dz, w), cotangents(mean_g, mean_g_dot))
    dxi = times(r, minus(of_n, times(n, cotangents(mean_gn, mean_gn_dot))))
    store_gradients(dx, at, inside, dx_dot, at_dot, moves, dxi)


class _Kernel:
    """A kernel whose constants are made of the sizes of x, [samples, channels, ...].

    Positions are counted in units of the largest power of two up to 16 that divides their number: a constant,
    by which the compiler knows where channels begin and reads several values at once.
    """

    def __init__(self, kernel: Any) -> None:
        self._launcher = functools.lru_cache(maxsize=1024)(functools.partial(Launcher, kernel))

    def __call__(
        self, shape: _Shape, programs: int, tensors: Tensors, *numbers: float, **constants: object
    ) -> None:
        launcher = self._launcher(**shape.constants, **constants)
        launcher((programs, 1), tensors, *numbers)


class _Shape:
    def __init__(self, x: Tensor, statistics: Tensor, silu: bool, channels_last: bool) -> None:
        self.samples, self.channels = x.shape[:2]
        self.positions = math.prod(x.shape[2:])
        self.groups, unit = statistics.shape[1], math.gcd(16, self.positions)
        self.units = self.positions // unit
        width = self.channels // self.groups
        self.constants = {"GROUPS": self.groups, "WIDTH": width, "UNIT": unit, "LAST": channels_last}
        self.silu = {"SILU": silu}
        block = _power_of_two(width * self.positions, _BLOCK)
        self.chunks = -(-width * self.positions // block)
        self.chunk = {"BLOCK": block, "num_warps": max(1, block // 512)}
        self.programs = self.samples * self.groups * self.chunks


_MOMENTS, _FORWARD = _Kernel(group_norm_moments), _Kernel(group_norm_forward)
_TANGENTS, _SUMS, _BACKWARD = (
    _Kernel(kernel) for kernel in (group_norm_tangents, group_norm_sums, group_norm_backward)
)


def _power_of_two(n: int, most: int) -> int:
    """Returns the least power of two that n fits in, up to `most`, which is one."""
    return min(1 << max(n - 1, 0).bit_length(), most)


def forward(
    x: Tensor, x_dot: Tensor | None, weight: Tensor | None, bias: Tensor | None, y: Tensor,
    y_dot: Tensor | None, statistics: Tensor, eps: float, silu: bool, channels_last: bool,
) -> None:  # fmt: skip
    s = _Shape(x, statistics, silu, channels_last)
    first_tangent = s.samples - (0 if x_dot is None else x_dot.shape[0])
    numbers, partial = (first_tangent, s.units, s.chunks), None
    if s.chunks > 1:
        partial = x.new_empty((s.samples * s.groups, s.chunks, 5), dtype=torch.float32)
        _MOMENTS(s, s.programs, (x, x_dot, partial), *numbers, **s.chunk)
    tensors = x, x_dot, weight, bias, y, y_dot, statistics, partial
    _FORWARD(s, s.programs, tensors, *numbers, float(eps), **s.silu, **s.chunk)


def backward(
    x: Tensor, dy: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor, dx: Tensor,
    sums: Tensor, silu: bool, channels_last: bool,
) -> None:  # fmt: skip
    pair_backward(x, None, dy, None, weight, bias, statistics, dx, None, sums, silu, channels_last)


def _tangents(s: _Shape, x: Tensor, x_dot: Tensor, statistics: Tensor, first: int) -> Tensor:
    """Returns the tangents of mean and r of the groups of samples from `first` on, which have tangents."""
    units = x_dot.shape[0] * s.groups
    partial = statistics.new_empty((units, s.chunks, 5))
    tangents = statistics.new_empty((units, 2))
    _MOMENTS(s, units * s.chunks, (x[first:], x_dot, partial), 0, s.units, s.chunks, **s.chunk)
    tensors = partial, statistics[first:], tangents
    _TANGENTS(s, units if s.chunks else 0, tensors, s.units, s.chunks, **s.chunk)
    return tangents


def pair_backward(
    x: Tensor, x_dot: Tensor | None, dy: Tensor, dy_dot: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, statistics: Tensor, dx: Tensor, dx_dot: Tensor | None, sums: Tensor, silu: bool,
    channels_last: bool,
) -> None:  # fmt: skip
    s = _Shape(x, statistics, silu, channels_last)
    first, tangents, total = s.samples, None, sums
    if x_dot is not None:
        first -= x_dot.shape[0]
        tangents = _tangents(s, x, x_dot, statistics, first)
        total = sums.new_empty((s.samples, 4, s.channels))
    if channels_last:
        rows = _power_of_two(s.channels, 128)
        block = _power_of_two(s.positions, _TILE // rows)
    else:
        block = _power_of_two(s.positions, _TILE)
        rows = _power_of_two(s.channels, _TILE // block)
    tiles = max(1, -(-s.positions // block))
    shares = -(-tiles // _TILES)
    partial = total if shares == 1 else sums.new_empty((s.samples, shares, *total.shape[1:]))
    tile = {"ROWS": rows, "BLOCK": block, "TILES": min(_TILES, tiles), "num_warps": 4}
    programs = s.samples * -(-s.channels // rows) * shares
    tensors = x, x_dot, dy, dy_dot, weight, bias, statistics, tangents
    _SUMS(s, programs, (*tensors, partial), first, s.units, shares, **s.silu, **tile)
    if shares > 1:
        torch.sum(partial, 1, out=total)
    if total is not sums:
        sums.copy_(total[:, :2])
    _BACKWARD(s, s.programs, (*tensors, dx, dx_dot, total), first, s.units, s.chunks, **s.silu, **s.chunk)

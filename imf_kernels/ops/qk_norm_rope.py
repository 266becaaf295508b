"""Per-head RMSNorm of queries and keys, then rotary positions.

y = R_l n with n = x · r · w, r = (mean(x²) + ε)^(−½) over the head dimension, and R_l turning each pair
(2i, 2i+1) by the angle of position l:  y_2i = n_2i c − n_2i+1 s,  y_2i+1 = n_2i+1 c + n_2i s.
Tangent:  ẏ = R_l ṅ, ṅ as in rms_norm.
Backward: dn = R_lᵀ dy, then as in rms_norm.
Source: Su et al., "RoFormer" (2021), interleaved pairs; Dehghani et al., "Scaling Vision Transformers to 22
Billion Parameters" (2023), for the normalisation.
Kernels: csrc/cpu/qk_norm_rope.cpp, csrc/cuda/qk_norm_rope.cu, imf_kernels/_triton/qk_norm_rope.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imf_kernels import _C, cpu, cuda, triton_backend
from imf_kernels.dispatch import Backend, always, choose
from imf_kernels.dual import Dual, no_gradient, pack, tail, unpack
from imf_kernels.dual_tensors import takes_dual_tensors
from imf_kernels.layout import DTYPES, last_contiguous, pointer, positions_first
from imf_kernels.operators import Operation
from imf_kernels.ops import check
from imf_kernels.triton_backend import Kernels


def rope_tables(length: int, width: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [length, width / 2] in float32 on the CPU, of angles l · theta^(−2i / width).

    Raises:
        ValueError: a negative length, or a width that is not even and positive.
    """
    if length < 0 or width < 2 or width % 2:
        raise ValueError(
            f"rope_tables: length must be at least 0 and width even and positive, got {length}, {width}"
        )
    exact: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    frequencies = theta ** (-torch.arange(0, width, 2, **exact) / width)
    angles = torch.arange(length, **exact)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def _rotate(n: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = n[..., 0::2], n[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def _reference(
    x: Tensor, x_dot: Tensor | None, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor | None]:
    dtype, exact = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, w, cos, sin = x.to(exact), weight.to(exact), cos.to(exact), sin.to(exact)
    r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = _rotate(x * r * w, cos, sin).to(dtype)
    if x_dot is None:
        return y, None
    with torch.no_grad():
        x, r, x_dot = tail(x, x_dot), tail(r, x_dot), x_dot.to(exact)
        r_dot = -(r**3) * (x * x_dot).mean(-1, keepdim=True)
        return y, _rotate((x_dot * r + x * r_dot) * w, cos, sin).to(dtype)


def _check(argument: str, x: Tensor | Dual, weight: Tensor, cos: Tensor, sin: Tensor) -> None:
    name = "qk_norm_rope"
    check.is_tensor_or_dual(name, **{argument: x})
    check.is_tensor(name, **{f"{argument}_weight": weight, "cos": cos, "sin": sin})
    x, x_dot = unpack(x)
    if x.dim() != 4 or x.shape[-1] % 2:
        raise ValueError(f"{name}: {argument} must be [B, H, L, D] with an even D, got {list(x.shape)}")
    length, width = x.shape[2:]
    check.has_shape(name, f"{argument}_weight", weight, (width,), **{argument: x})
    for table, values in (("cos", cos), ("sin", sin)):
        check.has_shape(name, table, values, (length, width // 2), **{argument: x})
    check.same_device(name, x, **{f"{argument}_weight": weight, "cos": cos, "sin": sin})
    check.last_contiguous(name, **{argument: x, f"{argument}_dot": x_dot})


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Any,
        x: Tensor,
        x_dot: Tensor | None,
        weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor | None]:
        batch, heads, length, width = x.shape
        cos, sin = cos.float().contiguous(), sin.float().contiguous()
        y, y_dot = positions_first(x, batch, length, width), None
        rstd = x.new_empty((batch, length, heads), dtype=torch.float32)
        if x_dot is not None:
            y_dot = positions_first(x, x_dot.shape[0], length, width)
            no_gradient(ctx, y_dot)
        kernels.forward(x, x_dot, weight, cos, sin, y, y_dot, rstd, eps)
        ctx.save_for_backward(x, weight, cos, sin, rstd)
        ctx.kernels = kernels
        return y, y_dot

    @staticmethod
    @check.backward_of("qk_norm_rope")
    def backward(ctx: Any, dy: Tensor, dy_dot: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin, rstd = ctx.saved_tensors
        dx = positions_first(x, x.shape[0], x.shape[2], x.shape[3])
        dweight = ctx.kernels.backward(x, last_contiguous(dy), weight, cos, sin, rstd, dx)
        return None, dx, None, dweight.to(weight.dtype), None, None, None


class _CPU:
    call = staticmethod(cpu.call)

    @classmethod
    def forward(
        cls,
        x: Tensor,
        x_dot: Tensor | None,
        weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        y: Tensor,
        y_dot: Tensor | None,
        rstd: Tensor,
        eps: float,
    ) -> None:
        batch, heads, length, width = x.shape
        rows, t_strides = (0, (0, 0, 0)) if x_dot is None else (x_dot.shape[0], x_dot.stride()[:3])
        w = weight.float().contiguous()
        cls.call(
            *("qk_norm_rope_forward", x, DTYPES[x.dtype], pointer(x), pointer(x_dot), pointer(w)),
            *(pointer(cos), pointer(sin), pointer(y), pointer(y_dot), pointer(rstd)),
            *(batch, rows, heads, length, width, x.stride()[:3], t_strides, eps),
        )

    @staticmethod
    def backward(
        x: Tensor, dy: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, rstd: Tensor, dx: Tensor
    ) -> Tensor:
        (batch, heads, length, width), threads = x.shape, torch.get_num_threads()
        w = weight.float().contiguous()
        dweight = x.new_empty(width, dtype=torch.float32)
        _C.qk_norm_rope_backward(
            *(DTYPES[x.dtype], pointer(x), pointer(dy), pointer(w), pointer(cos), pointer(sin)),
            *(pointer(rstd), pointer(dx), pointer(dweight), batch, heads, length, width),
            *(x.stride()[:3], dy.stride()[:3], threads),
        )
        return dweight


class _CUDA(_CPU):
    call = staticmethod(cuda.call)

    @staticmethod
    def backward(
        x: Tensor, dy: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, rstd: Tensor, dx: Tensor
    ) -> Tensor:
        batch, heads, length, width = x.shape
        w = weight.float().contiguous()
        dweight, partial, shares = cuda.sums(x, 1, batch * heads * length, width)
        cuda.call(
            *("qk_norm_rope_backward", x, DTYPES[x.dtype], pointer(x), pointer(dy), pointer(w)),
            *(pointer(cos), pointer(sin), pointer(rstd), pointer(dx), pointer(partial), pointer(dweight)),
            *(batch, heads, length, width, x.stride()[:3], dy.stride()[:3], shares),
        )
        return dweight[0]


_OPERATION = Operation(
    "qk_norm_rope",
    _QKNormRope,
    "(Tensor x, Tensor? x_dot, Tensor weight, Tensor cos, Tensor sin, float eps)",
    {
        "forward": "(Tensor x, Tensor? x_dot, Tensor weight, Tensor cos, Tensor sin, Tensor(a!) y, "
        "Tensor(b!)? y_dot, Tensor(c!) rstd, float eps) -> ()",
        "backward": "(Tensor x, Tensor dy, Tensor weight, Tensor cos, Tensor sin, Tensor rstd, "
        "Tensor(a!) dx) -> Tensor",
    },
    {"backward": lambda x, dy, weight, *_: weight.new_empty(weight.shape, dtype=torch.float32)},
)
_BACKENDS = (
    _OPERATION.backend("cpu", _CPU, cpu.unavailable),
    _OPERATION.backend("cuda", _CUDA, cuda.unavailable_for_rows, on_request=cuda.on_request),
    _OPERATION.backend("triton", Kernels("qk_norm_rope"), triton_backend.unavailable),
    Backend("reference", _reference, always),
)


@takes_dual_tensors
def qk_norm_rope(
    q: Tensor | Dual,
    k: Tensor | Dual,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> tuple[Any, Any]:
    """RMSNorm over the head dimension, then rotary positions, of queries and of keys, with their tangents.

    Args:
        q, k: [B, H, L, D] of one length, D even, any strides with the last dimension contiguous; float32,
            bfloat16 or float16 (`reference`: any floating-point type; `cpu`: not float16). The numbers of
            heads may differ.
        q_weight, k_weight: [D], weights of the norms.
        cos, sin: [L, D / 2] in float32, from `rope_tables`; pair (2i, 2i + 1) is turned by angle i.
        eps: added to the mean square.
        backend: "cpu", "cuda", "triton", "reference", or the best one that can run.

    Returns:
        The new q and k, each a `Dual` if it came as one. From the kernels they come in the memory order
        [B, L, H, D]. Computed in fp32, rounded once.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
        RuntimeError: when an explicit `backend` cannot run.
    """
    check.number("qk_norm_rope", 0.0, eps=eps)
    results = []
    for argument, x, weight in (("q", q, q_weight), ("k", k, k_weight)):
        _check(argument, x, weight, cos, sin)
        primal, tangent = unpack(x)
        run = choose("qk_norm_rope", _BACKENDS, backend, primal).run
        results.append(pack(*run(primal, tangent, weight, cos, sin, eps), x))
    return results[0], results[1]

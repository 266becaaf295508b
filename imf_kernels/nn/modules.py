"""Modules whose forward is an operation of this library where there is one.

Their parameters, buffers and children have the names of the modules that they replace, so that state dicts
load strictly in both directions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from imf_kernels.backends.dispatch import autocasts
from imf_kernels.backends.layout import last_contiguous
from imf_kernels.dual import Dual, map_both, primal
from imf_kernels.nn.calls import Deferred, apply, check_skipped, computed, is_plain_linear, product
from imf_kernels.ops.arithmetic import cat
from imf_kernels.ops.group_norm import group_norm
from imf_kernels.ops.layer_norm import layer_norm
from imf_kernels.ops.layer_norm_modulate import LAYER_NORM_MODULATE, layer_norm_modulate
from imf_kernels.ops.rms_norm import rms_norm
from imf_kernels.ops.swiglu import SWIGLU, swiglu


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` in one pass; other networks' RMSNorm of a `weight` too.

    Args: those of `torch.nn.RMSNorm`. `eps=None` is that of float32, of float64 in float64.
    """

    def forward(self, x: Any) -> Any:
        """Normalises x [..., *normalized_shape], a tensor or a `Dual`, to the same shape and dtype."""
        weight, dims = self.weight, len(self.normalized_shape)
        if not isinstance(x, Dual) and (
            (weight is not None and weight.dtype != x.dtype)
            or autocasts(x.device)
            or x.shape[x.dim() - dims :] != self.normalized_shape
        ):
            return super().forward(x)
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if self.eps is None else self.eps
        if weight is None:
            weight = primal(x).new_ones(self.normalized_shape)
        y = rms_norm(_rows(x, dims), weight.reshape(-1), eps)
        return y if dims == 1 else y.reshape(x.shape)


def _rows(x: Any, dims: int) -> Any:
    """Returns x [..., *dims] as rows that lie together."""
    return map_both(last_contiguous, x if dims == 1 else x.reshape(*x.shape[: x.dim() - dims], -1))


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm`, which inside `imf_kernels.jvp` runs in one pass already; of `Dual`s too.

    Args: those of `torch.nn.LayerNorm`.
    """

    def forward(self, x: Any) -> Any:
        """Normalises x [..., *normalized_shape], a tensor or a `Dual`, to the same shape."""
        if not isinstance(x, Dual):
            return super().forward(x)
        dims = len(self.normalized_shape)
        rows = _rows(x, dims)
        weight, bias = (None if p is None else p.reshape(-1) for p in (self.weight, self.bias))
        y = layer_norm(rows, [rows.shape[-1]], weight, bias, self.eps)
        return y if dims == 1 else y.reshape(x.shape)


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm`, which inside `imf_kernels.jvp` runs in one pass already; of `Dual`s too.

    Args: those of `torch.nn.GroupNorm`.
    """

    def forward(self, x: Any) -> Any:
        """Normalises x [N, C, ...], a tensor or a `Dual`, to the same shape."""
        if not isinstance(x, Dual):
            return super().forward(x)
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class Modulate(nn.Module):
    """LayerNorm without parameters, modulated by its sample's condition: n · (1 + scale) + shift.

    Args:
        eps: added to the variance.
    """

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def extra_repr(self) -> str:
        return f"eps={self.eps}"

    def forward(self, x: Any, shift: Any, scale: Any) -> Any:
        """Computes x [B, ..., d] normalised and modulated by shift and scale, [B, d] or [B, 1, d].

        The result has the dtype that PyTorch's promotion gives it; each may be a tensor or a `Dual`.
        """
        return _modulated(x, shift, scale, self.eps)


def _modulated(x: Any, shift: Any, scale: Any, eps: float) -> Any:
    return deferred_modulated(x, shift, scale, eps).plain()


def deferred_modulated(x: Any, shift: Any, scale: Any, eps: float) -> Deferred:
    shift, scale = (p.squeeze(1) if p.dim() == 3 else p for p in (shift, scale))
    dtype = torch.promote_types(torch.promote_types(x.dtype, shift.dtype), scale.dtype)
    if autocasts(x.device):  # which may compute norms in float32
        dtype = torch.promote_types(dtype, F.layer_norm(primal(x).new_zeros(1), (1,)).dtype)
    x = map_both(last_contiguous, x)
    return Deferred(
        lambda: layer_norm_modulate(x, shift, scale, eps, dtype=dtype),
        *(dtype, LAYER_NORM_MODULATE, (x, shift, scale), 1.0, eps, dtype),
    )


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), with one product for gate and up.

    Args:
        in_features, hidden_features: widths d and h.
        out_features: of the result; d by default.
        bias: of all layers.
        names: of the layers: gate, up and down; or two, of a layer [2h, d] with gate before up, and down.
    """

    skipped: tuple[str, ...] = ()  # names of parts that are not called

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        bias: bool = False,
        *,
        names: tuple[str, ...] = ("w1", "w3", "w2"),
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(names) not in (2, 3):
            raise ValueError(f"SwiGLU: names must be three, gate, up and down, or two, got {names!r}")
        self.names = names
        made: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        for name in names[:-1]:
            self.add_module(name, nn.Linear(in_features, hidden_features * (4 - len(names)), **made))
        self.add_module(names[-1], nn.Linear(hidden_features, out_features or in_features, **made))

    def forward(self, x: Any) -> Any:
        """Computes x [..., d], a tensor or a `Dual`, to [..., out_features]."""
        check_skipped(self)
        *inner, down = (getattr(self, name) for name in self.names)
        if all(map(is_plain_linear, inner)) and len({layer.bias is None for layer in inner}) == 1:
            weight, bias = (
                parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts)
                for parts in zip(*((layer.weight, layer.bias) for layer in inner), strict=True)
            )
            h = product(x, weight, bias)
        else:
            x = computed(x)
            h = cat([apply(layer, x) for layer in inner], dim=-1)
        return apply(down, Deferred(lambda: swiglu(h), h.dtype, SWIGLU, (h,)))

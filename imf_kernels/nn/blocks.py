"""Blocks of transformers as modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from imf_kernels.backends.layout import last_contiguous
from imf_kernels.dual import map_both
from imf_kernels.nn.attention import Attention, RopeAttention
from imf_kernels.nn.calls import apply, apply_all, computed, is_as_made
from imf_kernels.nn.modules import LayerNorm, SwiGLU, deferred_modulated
from imf_kernels.ops.gated_residual import gated_residual


class AdaLNBlock(nn.Module):
    """DiT's block: attention and an MLP, each after a norm that is modulated, and added with a gate.

    Args:
        attn: maps x [B, L, d] to the same shape.
        mlp: likewise.
        dim: d.
        eps: of the norms, which have no parameters.
    """

    # An MLP's class that calls its layers one after the other, and their names.
    in_order: tuple[type, tuple[str, ...]] | None = None

    def __init__(self, attn: nn.Module, mlp: nn.Module, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1, self.norm2 = (LayerNorm(dim, eps=eps, elementwise_affine=False) for _ in range(2))
        self.attn, self.mlp = attn, mlp
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Any, c: Any, feat_rope: Any = None) -> Any:
        """Computes the block for x [B, L, d], the condition c [B, d] and the `rope` of its attention."""
        named = {} if feat_rope is None else {"rope": feat_rope}
        condition = apply(self.adaLN_modulation, c).chunk(6, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = condition
        n = _modulated(self.norm1, x, shift1, scale1)
        takes_deferred = type(self.attn) in (Attention, RopeAttention) and is_as_made(self.attn)
        x = _gated(x, self.attn(n if takes_deferred else computed(n), **named), gate1)
        return _gated(x, self._mapped(_modulated(self.norm2, x, shift2, scale2)), gate2)

    def _mapped(self, n: Any) -> Any:
        mlp = self.mlp
        if not is_as_made(mlp):
            return apply(mlp, n)
        if type(mlp) is SwiGLU:
            return mlp(n)
        if type(mlp) is nn.Sequential:
            return apply_all(mlp, n)
        if self.in_order is None or type(mlp) is not self.in_order[0]:
            return apply(mlp, n)
        return apply_all((getattr(mlp, name) for name in self.in_order[1]), n)


def _modulated(norm: Any, x: Any, shift: Any, scale: Any) -> Any:
    """Returns norm(x) · (1 + scale) + shift, deferred if the norm is one without parameters."""
    if type(norm) in (LayerNorm, nn.LayerNorm) and norm.weight is None and is_as_made(norm):
        return deferred_modulated(x, shift, scale, norm.eps)
    return norm(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _gated(x: Any, branch: Any, gate: Any) -> Any:
    """Computes x + gate · branch, with gate [B, d]."""
    if branch.dtype == x.dtype or (x.dtype == torch.float32 and branch.dtype.itemsize == 2):
        return gated_residual(map_both(last_contiguous, x), map_both(last_contiguous, branch), gate)
    return x + gate.unsqueeze(1) * branch

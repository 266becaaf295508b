"""Modules whose forward is an operation of this library where there is one.

Their parameters, buffers and children have the names of the modules that they replace, so that state dicts
load strictly in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imf_kernels.backends.dispatch import autocasts
from imf_kernels.backends.layout import last_contiguous
from imf_kernels.dual import Dual, map_both, primal
from imf_kernels.ops.arithmetic import cat
from imf_kernels.ops.elementwise import GELU, GELU_TANH, SILU, gelu, silu
from imf_kernels.ops.gated_residual import gated_residual
from imf_kernels.ops.group_norm import group_norm
from imf_kernels.ops.layer_norm import LAYER_NORM, layer_norm
from imf_kernels.ops.layer_norm_modulate import LAYER_NORM_MODULATE, layer_norm_modulate
from imf_kernels.ops.linear import linear
from imf_kernels.ops.qk_norm_rope import qk_norm_rope, rope_tables
from imf_kernels.ops.recomputed import recomputed
from imf_kernels.ops.rms_norm import rms_norm
from imf_kernels.ops.swiglu import SWIGLU, swiglu
from imf_kernels.transforms import packages
from imf_kernels.transforms.dual_tensors import takes_dual_tensors


class _Deferred:
    """The result of an operation that is not computed yet: a linear layer that takes it keeps its arguments.

    Args:
        operation, inputs, others: see `recomputed`.
        plain: computes it.
        dtype: of the result.
    """

    def __init__(
        self, plain: Callable[[], Any], dtype: torch.dtype, operation: Any, inputs: Any, *others: Any
    ) -> None:
        self.plain, self.dtype = plain, dtype
        self.operation, self.inputs, self.others = operation, inputs, others

    def into(self, weight: Tensor, bias: Tensor | None) -> Any:
        x = self.inputs[0]
        cast = autocasts(x.device) and not isinstance(x, Dual) and weight.dtype != torch.float64
        dtype = torch.get_autocast_dtype(x.device.type) if cast else self.dtype
        if torch.compiler.is_compiling() or not (cast or weight.dtype == dtype):
            return _product(self.plain(), weight, bias)
        return recomputed(self.operation, self.inputs, self.others, weight, bias, dtype)


def _product(x: Any, weight: Tensor, bias: Tensor | None) -> Any:
    if isinstance(x, _Deferred):
        return x.into(weight, bias)
    return (linear if isinstance(x, Dual) else F.linear)(x, weight, bias)


def _computed(x: Any) -> Any:
    return x.plain() if isinstance(x, _Deferred) else x


def apply(layer: Any, x: Any) -> Any:
    """Calls a layer of PyTorch; of a `Dual` by the operation of the same name."""
    if isinstance(x, _Deferred) and _plain_linear(layer):
        return x.into(layer.weight, layer.bias)
    x = _computed(x)
    if not isinstance(x, Dual):
        return layer(x)
    if isinstance(layer, nn.Sequential):
        return apply_all(layer, x)
    if type(layer) is nn.Linear:
        return linear(x, layer.weight, layer.bias)
    if isinstance(layer, nn.GELU):
        return gelu(x, approximate=layer.approximate)
    if isinstance(layer, nn.SiLU):
        return silu(x)
    return x if _is_identity(layer) else layer(x)


def _is_identity(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Identity) or (
        isinstance(layer, nn.Dropout) and not (layer.training and layer.p)
    )


def apply_all(layers: Iterable[nn.Module], x: Any) -> Any:
    """Calls layers one after the other; a linear one after an activation does not keep what it takes."""
    for layer in layers:
        if type(layer) in (nn.GELU, nn.SiLU) and _as_made(layer):
            x = _activated(layer, x)
        elif not (isinstance(x, _Deferred) and _is_identity(layer) and _as_made(layer)):
            x = apply(layer, x)
    return _computed(x)


def _activated(layer: Any, x: Any) -> _Deferred:
    approximate = getattr(layer, "approximate", None)
    function = SILU if approximate is None else GELU if approximate == "none" else GELU_TANH
    return _Deferred(lambda: apply(layer, x), x.dtype, function.operation, (x,))


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
    return _deferred_modulated(x, shift, scale, eps).plain()


def _deferred_modulated(x: Any, shift: Any, scale: Any, eps: float) -> _Deferred:
    shift, scale = (p.squeeze(1) if p.dim() == 3 else p for p in (shift, scale))
    dtype = torch.promote_types(torch.promote_types(x.dtype, shift.dtype), scale.dtype)
    if autocasts(x.device):  # which may compute norms in float32
        dtype = torch.promote_types(dtype, F.layer_norm(primal(x).new_zeros(1), (1,)).dtype)
    x = map_both(last_contiguous, x)
    return _Deferred(
        lambda: layer_norm_modulate(x, shift, scale, eps, dtype=dtype),
        *(dtype, LAYER_NORM_MODULATE, (x, shift, scale), 1.0, eps, dtype),
    )


def _gated(x: Any, branch: Any, gate: Any) -> Any:
    """Computes x + gate · branch, with gate [B, d]."""
    if branch.dtype == x.dtype or (x.dtype == torch.float32 and branch.dtype.itemsize == 2):
        return gated_residual(map_both(last_contiguous, x), map_both(last_contiguous, branch), gate)
    return x + gate.unsqueeze(1) * branch


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), with one product for gate and up.

    Args:
        in_features, hidden_features: widths d and h.
        out_features: of the result; d by default.
        bias: of all layers.
        names: of the layers: gate, up and down; or two, of a layer [2h, d] with gate before up, and down.
    """

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
        *inner, down = (getattr(self, name) for name in self.names)
        if all(map(_plain_linear, inner)) and len({layer.bias is None for layer in inner}) == 1:
            weight, bias = (
                parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts)
                for parts in zip(*((layer.weight, layer.bias) for layer in inner), strict=True)
            )
            h = _product(x, weight, bias)
        else:
            x = _computed(x)
            h = cat([apply(layer, x) for layer in inner], dim=-1)
        return apply(down, _Deferred(lambda: swiglu(h), h.dtype, SWIGLU, (h,)))


def _plain_linear(layer: nn.Module) -> bool:
    """Returns whether a layer can be called by its weight and bias."""
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and _as_made(layer)


def _as_made(module: nn.Module) -> bool:
    """Returns whether a call of a module is one of its class's forward."""
    return "forward" not in vars(module) and not has_hooks(module)


def has_hooks(layer: nn.Module) -> bool:
    """Returns whether calls of a layer run hooks."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(map(vars(layer).get, hooks))


@takes_dual_tensors
def _rotated(x: Any, cos: Tensor, sin: Tensor, half: bool, dtype: torch.dtype, *, backend: Any = None) -> Any:
    """Rotates pairs of the last dimension of x, a linear function, by tables [L, D / 2]."""
    exact = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(exact), sin.to(exact)

    def rotate(t: Tensor) -> Tensor:
        t = t.to(exact)
        if half:
            first, second = t.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(dtype)
        if torch.compiler.is_compiling():  # which knows no complex numbers
            even, odd = t.unflatten(-1, (-1, 2)).unbind(-1)
            pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
        else:
            pairs = torch.view_as_complex(last_contiguous(t).unflatten(-1, (-1, 2)))
            pairs = torch.view_as_real(pairs * torch.complex(cos, sin))
        return pairs.flatten(-2).to(dtype)

    return map_both(rotate, x)


class RotaryEmbedding(nn.Module):
    """Rotary positions of a sequence or an image.

    Args:
        length: L, or (H, W) for the L = H · W positions of an image in rows: half of the pairs then rotate by
            the row, half by the column.
        width: of a head, D; a multiple of 2, of 4 for images.
        theta: the base of the frequencies.
        layout: "interleaved", pairs (2i, 2i + 1) and buffers `freqs_cos` and `freqs_sin` [L, D]; "half",
            pairs (i, i + D / 2), as `rotate_half` makes them, and the same buffers; "complex", interleaved
            pairs and one complex buffer `freqs_cis` [L, D / 2].

    Raises:
        ValueError: for a layout or a width that does not exist.
    """

    def __init__(
        self,
        length: int | tuple[int, int],
        width: int,
        theta: float = 10000.0,
        *,
        layout: str = "interleaved",
    ) -> None:
        super().__init__()
        if layout not in ("interleaved", "half", "complex"):
            raise ValueError(
                f"RotaryEmbedding: layout must be 'interleaved', 'half' or 'complex', got {layout!r}"
            )
        if isinstance(length, int):
            cos, sin = rope_tables(length, width, theta)
        else:
            by_axis = [rope_tables(n, width // 2, theta) for n in length]
            cos, sin = (
                torch.cat(
                    [rows.repeat_interleave(length[1], 0), columns.repeat(length[0], 1)],
                    dim=-1,
                )
                for rows, columns in zip(*by_axis, strict=True)
            )
        self.layout = layout
        if layout == "complex":
            self.names: tuple[str, ...] = ("freqs_cis",)
            self.register_buffer("freqs_cis", torch.complex(cos, sin))
            return
        self.names = ("freqs_cos", "freqs_sin")
        for name, table in zip(self.names, (cos, sin), strict=True):
            whole = table.repeat(1, 2) if layout == "half" else table.repeat_interleave(2, -1)
            self.register_buffer(name, whole)

    def extra_repr(self) -> str:
        return f"length={len(getattr(self, self.names[0]))}, layout={self.layout!r}"

    def tables(self) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines by pair, [L, D / 2]."""
        if self.layout == "complex":
            return tuple(torch.view_as_real(getattr(self, self.names[0])).unbind(-1))  # type: ignore[return-value]
        cos, sin = (getattr(self, name) for name in self.names)
        if self.layout == "half":
            return cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]
        return cos[..., ::2], sin[..., ::2]

    def forward(self, x: Any) -> Any:
        """Rotates x [B, H, L, D], queries or keys, a tensor or a `Dual`.

        Raises:
            ValueError: for another L or D than the tables'.
        """
        cos, sin = self.tables()
        if x.shape[-2:] != (cos.shape[0], 2 * cos.shape[1]):
            raise ValueError(
                f"RotaryEmbedding: x must be [B, H, {cos.shape[0]}, {2 * cos.shape[1]}], got {list(x.shape)}"
            )
        # Products of real tables promote, complex ones are cast back.
        dtype = x.dtype if self.layout == "complex" else torch.promote_types(x.dtype, cos.dtype)
        return _rotated(x, cos, sin, self.layout == "half", dtype)


def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Computes flash-attn's function of that name, on any device and of `Dual`s too.

    Args:
        q: [B, L_q, H, D]; tensors, `Dual`s, or dual tensors inside `imf_kernels.jvp`.
        k, v: [B, L_k, H_k, D] with H a multiple of H_k.
        softmax_scale: 1 / √D by default.
        causal: the last query sees the last key; a query that sees no key gives zero.
        deterministic: always so here.
        dropout_p, window_size, softcap, alibi_slopes, return_attn_probs: their defaults alone.

    Returns:
        [B, L_q, H, D].

    Raises:
        NotImplementedError: for an argument that is not served.
    """
    return packages.flash(
        "flash_attn_func",
        {
            **{"q": q, "k": k, "v": v, "dropout_p": dropout_p, "softmax_scale": softmax_scale},
            **{"causal": causal, "window_size": window_size, "softcap": softcap},
            **{"alibi_slopes": alibi_slopes, "return_softmax": return_attn_probs},
        },
    )


class Attention(nn.Module):
    """Self-attention in timm's form: layers `qkv` and `proj`, norms `q_norm`, `k_norm` per head, and `norm`.

    Args:
        dim: width d, a multiple of num_heads.
        num_heads: number of heads.
        qkv_bias, proj_bias: whether the layers have a bias.
        qk_norm: whether queries and keys are normalised, by norm_layer.
        proj_drop: dropout of the result. There is none of the weights.
        norm_layer: makes a norm from a width.
        scale_norm: whether the heads' results, put side by side, are normalised before `proj`.
    """

    name_of_dropout = "proj_drop"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = LayerNorm,
        scale_norm: bool = False,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"Attention: dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.q_norm, self.k_norm = (
            norm_layer(dim // num_heads).to(device, dtype) if qk_norm else nn.Identity() for _ in range(2)
        )
        self.norm = norm_layer(dim).to(device, dtype) if scale_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Any, attn_mask: Tensor | None = None, is_causal: bool = False, *, rope: Any = None
    ) -> Any:
        """Computes attention within x [B, L, d], a tensor or a `Dual`.

        Args:
            attn_mask, is_causal: as of `scaled_dot_product_attention`, the mask to [B, H, L, L].
            rope: a `RotaryEmbedding`, or another function of queries and keys [B, H, L, D]. The former after
                `RMSNorm`s is fused with them, if interleaved.
        """
        if is_causal and attn_mask is not None:
            raise ValueError("Attention: pass attn_mask or is_causal=True, not both")
        q, k, v = self._prepared(apply(self.qkv, x), rope)
        q, k, v = (map_both(last_contiguous, t.transpose(1, 2)) for t in (q, k, v))
        if q.dtype != v.dtype:  # norms and tables in float32
            q, k = q.to(v.dtype), k.to(v.dtype)
        causal = packages.TOP_LEFT if is_causal else packages.FULL
        out = apply(self.norm, packages.attend(q, k, v, attn_mask, causal, None).flatten(2))
        return apply(getattr(self, self.name_of_dropout), apply(self.proj, out))

    def _prepared(self, qkv: Any, rope: Any) -> Any:
        """Returns q, k and v [B, H, L, D] of a projection [B, L, 3 H D]."""
        norms: tuple[Any, Any] = self.q_norm, self.k_norm
        if (
            isinstance(rope, RotaryEmbedding)
            and rope.layout != "half"
            and all(type(norm) is RMSNorm and norm.weight is not None and norm.eps for norm in norms)
            and norms[0].eps == norms[1].eps
        ):
            cos, sin = (table.contiguous() for table in rope.tables())
            return qk_norm_rope(qkv, norms[0].weight, norms[1].weight, cos, sin, norms[0].eps)
        heads = qkv.reshape(*qkv.shape[:2], 3, self.num_heads, qkv.shape[2] // (3 * self.num_heads))
        q, k, v = (t.transpose(1, 2) for t in heads.unbind(2))
        q, k = _normalized(norms[0], q), _normalized(norms[1], k)
        return (q, k, v) if rope is None else (rope(q), rope(k), v)


def _normalized(norm: Any, x: Any) -> Any:
    """Calls a norm of a part of a projection, which is kept anyway: the norm keeps no copy of the part."""
    if type(norm) not in (LayerNorm, nn.LayerNorm) or not _as_made(norm) or len(norm.normalized_shape) > 1:
        return apply(norm, x)
    parameters = norm.bias, norm.weight
    as_pytorch = all(p is None or p.dtype == x.dtype for p in parameters) and not autocasts(x.device)
    if torch.compiler.is_compiling() or not as_pytorch:
        return apply(norm, x)
    one = 1.0 if norm.weight is None else 0.0
    return recomputed(LAYER_NORM, (map_both(last_contiguous, x), *parameters), (one, norm.eps, None))


class RopeAttention(Attention):
    """`Attention` whose second argument is rope, as LightningDiT calls it."""

    def forward(self, x: Any, rope: Any = None) -> Any:  # type: ignore[override]
        return super().forward(x, rope=rope)


class CrossAttention(nn.Module):
    """Attention of x to a context in Stable Diffusion's form: layers `to_q`, `to_k`, `to_v` and `to_out`.

    Args:
        query_dim: width d of x and of the result.
        context_dim: width of the context; d by default.
        heads: number of heads.
        dim_head: width of a head.
        dropout: of the result.
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads, inner = heads, heads * dim_head
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.to_q = nn.Linear(query_dim, inner, bias=False, **made)
        self.to_k, self.to_v = (
            nn.Linear(context_dim or query_dim, inner, bias=False, **made) for _ in range(2)
        )
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim, **made), nn.Dropout(dropout))

    def forward(self, x: Any, context: Any = None, mask: Tensor | None = None) -> Any:
        """Computes attention of x [B, L_q, d] to the context [B, L_k, context_dim], tensors or `Dual`s.

        Args:
            context: x itself by default.
            mask: bool, [B, L_k] once flattened, True where a key takes part.
        """
        context = x if context is None else context
        q, k, v = apply(self.to_q, x), apply(self.to_k, context), apply(self.to_v, context)
        q, k, v = (t.reshape(*t.shape[:2], self.heads, t.shape[2] // self.heads) for t in (q, k, v))
        mask = mask if mask is None else mask.flatten(1)[:, None, None]
        return apply(self.to_out, packages.attend(q, k, v, mask, packages.FULL, None).flatten(2))


class AdaLNBlock(nn.Module):
    """DiT's block: attention and an MLP, each after a norm that is modulated, and added with a gate.

    Args:
        attn: maps x [B, L, d] to the same shape.
        mlp: likewise.
        dim: d.
        eps: of the norms, which have no parameters.
    """

    in_order: tuple[str, ...] = ()  # names of the layers of an MLP that calls them one after the other

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
        n = _deferred_modulated(x, shift1, scale1, self.norm1.eps)
        takes_deferred = type(self.attn) in (Attention, RopeAttention) and _as_made(self.attn)
        x = _gated(x, self.attn(n if takes_deferred else n.plain(), **named), gate1)
        n = _deferred_modulated(x, shift2, scale2, self.norm2.eps)
        return _gated(x, self._mapped(n), gate2)

    def _mapped(self, n: _Deferred) -> Any:
        mlp = self.mlp
        if not _as_made(mlp):
            return apply(mlp, n)
        if type(mlp) is SwiGLU:
            return mlp(n)
        layers = [*mlp] if type(mlp) is nn.Sequential else [getattr(mlp, name) for name in self.in_order]
        return apply_all(layers, n) if layers else apply(mlp, n)

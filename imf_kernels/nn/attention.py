"""Attention and rotary positions as modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from imf_kernels.backends.dispatch import autocasts
from imf_kernels.backends.layout import last_contiguous
from imf_kernels.dual import map_both
from imf_kernels.nn.calls import apply, check_skipped, is_as_made
from imf_kernels.nn.modules import LayerNorm, RMSNorm
from imf_kernels.ops.layer_norm import LAYER_NORM
from imf_kernels.ops.qk_norm_rope import qk_norm_rope, rope_tables
from imf_kernels.ops.recomputed import recomputed
from imf_kernels.transforms import packages
from imf_kernels.transforms.dual_tensors import takes_dual_tensors


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
            cos, sin = torch.view_as_real(getattr(self, self.names[0])).unbind(-1)
            return cos, sin
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
    skipped: tuple[str, ...] = ()  # names of parts that are not called

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
        check_skipped(self)
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
            type(rope) is RotaryEmbedding
            and rope.layout != "half"
            and all(type(norm) is RMSNorm and norm.weight is not None and norm.eps for norm in norms)
            and all(map(is_as_made, (rope, *norms)))
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
    if type(norm) not in (LayerNorm, nn.LayerNorm) or not is_as_made(norm) or len(norm.normalized_shape) > 1:
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

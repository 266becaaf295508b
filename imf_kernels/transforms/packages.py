"""Attention functions of flash-attn and xformers, served inside `jvp`.

Their functions end in an `autograd.Function` or an operator without forward mode. What they look up when they
are called is replaced once per process, so that names imported before are served too: calls whose tensors
carry a tangent inside `jvp` become `torch.nn.functional.scaled_dot_product_attention`, which has a rule; all
others go to the package.

Sources: flash_attn/flash_attn_interface.py (2.1 to 2.8), xformers/ops/fmha (0.0.17 on), which later releases
import from mslk.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imf_kernels.backends.dispatch import constant, without_autocast
from imf_kernels.dual import Dual, map_both
from imf_kernels.ops.arithmetic import cat
from imf_kernels.ops.attention import scaled_dot_product_attention
from imf_kernels.transforms.dual_tensors import carries_tangent, inside, refusing, traced_jvp

# Masks of causal attention: which key the first query sees last.
FULL, TOP_LEFT, BOTTOM_RIGHT = "full", "top left", "bottom right"


def attend(q: Any, k: Any, v: Any, mask: Any, causal: str, scale: float | None) -> Any:
    """Computes attention of q, k, v [B, L, H, D], tensors, dual tensors or `Dual`s, in [B, L_q, H, D_v].

    As in these packages key and value may have fewer heads, and `torch.autocast` casts nothing.
    """
    lengths = q.shape[1], k.shape[1]
    if causal == BOTTOM_RIGHT and lengths[0] != lengths[1]:
        seen = torch.ones(lengths, dtype=torch.bool, device=q.device).tril(lengths[1] - lengths[0])
    else:
        seen = None
    if mask is not None and causal != FULL:
        seen = torch.ones(lengths, dtype=torch.bool, device=q.device).tril() if seen is None else seen
        mask, causal = mask.masked_fill(~seen, float("-inf")), FULL
    elif seen is not None:
        mask, causal = seen, FULL
    named = {"is_causal": causal != FULL, "scale": scale, "enable_gqa": k.shape[2] != q.shape[2]}
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    function = scaled_dot_product_attention if any(isinstance(x, Dual) for x in (q, k, v)) else _pytorchs
    return function(q, k, v, mask, **named).transpose(1, 2)


def _pytorchs(q: Tensor, *rest: Any, **named: Any) -> Tensor:
    with without_autocast(q.device):
        return F.scaled_dot_product_attention(q, *rest, **named)


def _by_sequence(q: Any, k: Any, v: Any, starts: Any, causal: str, scale: float | None) -> Any:
    """Computes attention within each of the sequences of q, k, v [1, tokens, H, D].

    Args:
        starts: for queries and for keys, the first tokens of the sequences and the number of tokens.
    """
    for x, first, name in ((q, starts[0], "queries"), (k, starts[1], "keys")):
        if len(starts[0]) != len(starts[1]) or first[0] != 0 or first[-1] != x.shape[1]:
            raise ValueError(
                f"imf_kernels.jvp: cumulative lengths of the {name} must be one more than the sequences and "
                f"end at the number of tokens, {x.shape[1]}, got {list(first)}"
            )
    queries, keys = ([end - start for start, end in itertools.pairwise(s)] for s in starts)
    if len({*queries}) == len({*keys}) == 1:
        q, k, v = (_in_batch(x, n) for x, n in ((q, queries), (k, keys), (v, keys)))
        return map_both(lambda t: t.reshape(1, -1, *t.shape[2:]), attend(q, k, v, None, causal, scale))
    parts: Any = zip(*(x.split(n, dim=1) for x, n in ((q, queries), (k, keys), (v, keys))), strict=True)
    return cat([attend(a, b, c, None, causal, scale) for a, b, c in parts], dim=1)


def _in_batch(x: Any, lengths: list[int]) -> Any:
    return map_both(lambda t: t.reshape(len(lengths), lengths[0], *t.shape[2:]), x)


def _block_mask(cu_q: Tensor, cu_k: Tensor, queries: int, keys: int, causal: bool) -> Tensor:
    """Returns which key a query sees in a graph, which does not know the lengths: [queries, keys]."""
    positions = [torch.arange(n, device=cu_q.device) for n in (queries, keys)]
    sequences = [
        torch.bucketize(p, cu[1:], right=True) for p, cu in zip(positions, (cu_q, cu_k), strict=True)
    ]
    seen = sequences[0][:, None] == sequences[1]
    if causal:  # distances from the ends of the sequences
        last = len(cu_q) - 2
        left = [
            cu[1:].long()[s.clamp(max=last)] - p
            for p, cu, s in zip(positions, (cu_q, cu_k), sequences, strict=True)
        ]
        seen = seen & (left[0][:, None] <= left[1])
    return seen


# Arguments of flash-attn that change its result, their neutral values, and what they are.
_REFUSED_BY_FLASH: dict[str, tuple[Callable[[Any], bool], str]] = {
    "dropout_p": (lambda p: p == 0, "dropout of the weights; 0.0 is served"),
    "window_size": (lambda w: max(w) < 0, "a sliding window; (-1, -1) is served"),
    "softcap": (lambda c: c <= 0, "soft-capped logits; 0.0 is served"),
    "alibi_slopes": (lambda s: s is None, "ALiBi; None is served"),
    "return_softmax": (lambda r: not r, "return_attn_probs=True; the output alone is served"),
    "block_table": (lambda b: b is None, "a paged cache; None is served"),
}
_CUMULATIVE = "cu_seqlens_q", "cu_seqlens_k"
_OF_FLASH = {
    *("q", "k", "v", "kv", "qkv", "softmax_scale", "causal", "deterministic", "is_grad_enabled"),
    *(*_CUMULATIVE, "cu_seqlens", "max_seqlen", "max_seqlen_q", "max_seqlen_k"),
}


def flash(function: str, arguments: dict[str, Any]) -> Any:
    """Computes what a function of flash-attn defines by its arguments.

    Raises: NotImplementedError for an argument that is not served.
    """
    for name, value in arguments.items():
        neutral, what = _REFUSED_BY_FLASH.get(name, (lambda x: x is None or x is False, "not known here"))
        if name not in _OF_FLASH and not neutral(value):
            raise NotImplementedError(f"imf_kernels.jvp: {function}: {name}={value!r} is {what}")
    varlen = "cu_seqlens" in arguments or "cu_seqlens_q" in arguments
    dim = 1 if varlen else 2
    if "qkv" in arguments:
        q, k, v = arguments["qkv"].unbind(dim)
    else:
        q = arguments["q"]
        k, v = arguments["kv"].unbind(dim) if "kv" in arguments else (arguments["k"], arguments["v"])
    causal, scale = BOTTOM_RIGHT if arguments["causal"] else FULL, arguments["softmax_scale"]
    if not varlen:
        return attend(q, k, v, None, causal, scale)
    q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    cu_q, cu_k = (arguments[name if name in arguments else "cu_seqlens"] for name in _CUMULATIVE)
    if torch.compiler.is_compiling():
        mask = _block_mask(cu_q, cu_k, q.shape[1], k.shape[1], causal != FULL)
        return attend(q, k, v, mask, FULL, scale).squeeze(0)
    return _by_sequence(q, k, v, [cu_q.tolist(), cu_k.tolist()], causal, scale).squeeze(0)


# The masks of xformers by class.
_MASKS = {
    "NoneType": FULL,
    "Tensor": FULL,
    "LowerTriangularMask": TOP_LEFT,
    "LowerTriangularFromBottomRightMask": BOTTOM_RIGHT,
    "LowerTriangularMaskWithTensorBias": TOP_LEFT,
}
_BLOCKS = {
    "BlockDiagonalMask": FULL,
    "BlockDiagonalCausalMask": TOP_LEFT,
    "BlockDiagonalCausalFromBottomRightMask": BOTTOM_RIGHT,
}


def _xformers(inputs: Any) -> Any:
    """Computes `memory_efficient_attention` of the `Inputs` of xformers."""
    inputs.validate_inputs()
    what, bias = "imf_kernels.jvp: memory_efficient_attention:", inputs.attn_bias
    if inputs.p != 0:
        raise NotImplementedError(f"{what} p={inputs.p!r} is dropout of the weights; 0.0 is served")
    dtype = getattr(inputs, "output_dtype", None) or inputs.query.dtype
    if dtype != inputs.query.dtype or getattr(inputs, "is_partial", False):
        raise NotImplementedError(f"{what} a result of the query's dtype is served, got {dtype}, partial")
    kind = "Tensor" if isinstance(bias, Tensor) else type(bias).__name__
    if kind not in _MASKS and kind not in _BLOCKS:
        served = ", ".join((*_MASKS, *_BLOCKS)).replace("NoneType", "None")
        raise NotImplementedError(f"{what} attn_bias={kind} is not served; {served} are")
    mask = bias if kind == "Tensor" else getattr(bias, "_bias", None)
    if mask is not None and not mask.is_floating_point():
        raise TypeError(f"{what} a tensor as attn_bias is added to the logits, got {mask.dtype}")
    q, k, v = inputs.query, inputs.key, inputs.value
    out = (*q.shape[:-1], v.shape[-1])
    if q.dim() == 3:  # [B, L, D]
        q, k, v = (x.unsqueeze(2) for x in (q, k, v))
        mask = mask if mask is None else mask.unsqueeze(1)
    if q.dim() == 5:  # [B, L, G, H, D]
        q, k, v = (x.flatten(2, 3) for x in (q, k, v))
        mask = mask if mask is None else mask.flatten(1, 2)
    if kind in _MASKS:
        return attend(q, k, v, mask, _MASKS[kind], inputs.scale).reshape(out)
    starts = [bias.q_seqinfo.seqstart_py, bias.k_seqinfo.seqstart_py]
    return _by_sequence(q, k, v, starts, _BLOCKS[kind], inputs.scale).reshape(out)


def _moves(arguments: Any) -> bool:
    """Returns whether this is a call inside `jvp` one of whose tensors has a tangent."""
    in_jvp = traced_jvp.depth > 0 if torch.compiler.is_compiling() else not inside.run.over
    return in_jvp and any(carries_tangent(x) for x in arguments)


class _Served:
    """An `autograd.Function` of flash-attn, but for calls inside `jvp`."""

    def __init__(self, function: Any, name: str) -> None:
        self.function, self.name = function, name
        self.names = list(inspect.signature(function.forward).parameters)[1:]  # without ctx

    def apply(self, *arguments: Any) -> Any:
        if not _moves(arguments):
            return self.function.apply(*arguments)
        return flash(self.name, dict(zip(self.names, arguments, strict=True)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)


def _serving(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps what `memory_efficient_attention` calls."""

    @functools.wraps(function)
    def call(inp: Any, op: Any = None) -> Any:
        bias = inp.attn_bias if isinstance(inp.attn_bias, Tensor) else getattr(inp.attn_bias, "_bias", None)
        if not _moves((inp.query, inp.key, inp.value, bias)):
            return function(inp, op)
        return _xformers(inp)

    return call


_FLASH = {
    "FlashAttnFunc": "flash_attn_func",
    "FlashAttnKVPackedFunc": "flash_attn_kvpacked_func",
    "FlashAttnQKVPackedFunc": "flash_attn_qkvpacked_func",
    "FlashAttnVarlenFunc": "flash_attn_varlen_func",
    "FlashAttnVarlenKVPackedFunc": "flash_attn_varlen_kvpacked_func",
    "FlashAttnVarlenQKVPackedFunc": "flash_attn_varlen_qkvpacked_func",
}
_served: set[ModuleType] = set()


@constant  # called while torch.compile traces, before it reads what is replaced
def serve_packages() -> None:
    """Serves the packages that are loaded."""
    module = sys.modules.get("flash_attn.flash_attn_interface")
    if module is not None and module not in _served:
        _served.add(module)
        version = sys.modules["flash_attn"].__version__.split(".")
        if (int(version[0]), int(version[1])) >= (2, 1):  # before, causal masks were aligned otherwise
            for name, public in _FLASH.items():
                setattr(module, name, _Served(getattr(module, name), public))
        for name in ("flash_attn_gpu", "flash_attn_cuda"):  # before 2.7 the latter
            kernels = getattr(module, name, None)
            if hasattr(kernels, "fwd_kvcache"):
                kernels.fwd_kvcache = refusing(kernels.fwd_kvcache, _KVCACHE)  # type: ignore[union-attr]
    for name in ("xformers.ops.fmha", "mslk.attention.fmha"):
        module = sys.modules.get(name)
        if module is not None and module not in _served and hasattr(module, "_memory_efficient_attention"):
            _served.add(module)
            module._memory_efficient_attention = _serving(module._memory_efficient_attention)  # type: ignore[attr-defined]


_KVCACHE = "flash_attn_with_kvcache would leave the tangent behind; flash_attn_func has one"

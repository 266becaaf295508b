"""Packages that take the places of flash-attn and xformers where they are not, computed in PyTorch.

Names, signatures and what is called by which name are theirs: public functions look up an autograd.Function
of their module (in xformers, without a gradient, none), which calls operators of torch.library without
forward mode.
"""

import contextlib
import importlib
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch


def plain(q, k, v, bias, scale):
    """The formula: q, k, v [B, L, H, D], bias to [B, H, L_q, L_k]; queries that see no key give zero."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = s if bias is None else s + bias
    empty = (s == -torch.inf).all(-1, keepdim=True)
    p = s.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", p, v)


def causal_bias(queries, keys, offset, like):
    seen = torch.ones(queries, keys, dtype=torch.bool, device=like.device).tril(offset)
    return like.new_zeros(queries, keys).masked_fill(~seen, -torch.inf)


def varlen(q, k, v, cu_q, cu_k, causal, scale):
    """Sequences packed into q, k, v [tokens, H, D]."""
    out = []
    for i in range(len(cu_q) - 1):
        a, b = (
            (x[None, cu_q[i] : cu_q[i + 1]] for x in (q,)),
            (x[None, cu_k[i] : cu_k[i + 1]] for x in (k, v)),
        )
        (a,), (b, c) = a, b
        bias = causal_bias(a.shape[1], b.shape[1], b.shape[1] - a.shape[1], q) if causal else None
        out.append(plain(a, b, c, bias, scale)[0])
    return torch.cat(out)


@torch.library.custom_op("flash_twin::forward", mutates_args=())
def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    bias = causal_bias(q.shape[1], k.shape[1], k.shape[1] - q.shape[1], q) if causal else None
    return plain(q, k, v, bias, scale).contiguous(), q.new_empty(0)


@_forward.register_fake
def _(q, k, v, scale, causal):
    return q.new_empty(q.shape), q.new_empty(0)


@torch.library.custom_op("flash_twin::varlen_forward", mutates_args=())
def _varlen_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return varlen(q, k, v, cu_q, cu_k, causal, scale), q.new_empty(0)


@_varlen_forward.register_fake
def _(q, k, v, cu_q, cu_k, scale, causal):
    return q.new_empty(q.shape), q.new_empty(0)


def _run(ctx, q, k, v, rest, scale, causal, return_softmax):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    operator = _varlen_forward if rest else _forward
    ctx.save_for_backward(q, k, v, *rest)
    ctx.scale, ctx.causal = scale, causal
    out, lse = operator(q, k, v, *rest, scale, causal)
    return (out, lse, None) if return_softmax else out


def _gradients(ctx, dout):
    q, k, v, *rest = ctx.saved_tensors
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        if rest:
            out = varlen(q, k, v, *rest, ctx.causal, ctx.scale)
        else:
            bias = causal_bias(q.shape[1], k.shape[1], k.shape[1] - q.shape[1], q) if ctx.causal else None
            out = plain(q, k, v, bias, ctx.scale)
        return torch.autograd.grad(out, (q, k, v), dout)


_OPTIONS = "dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, "
_LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
_FUNCTIONS = {  # tensors, lengths, and after the options
    "": ("q, k, v, ", "", ""),
    "KVPacked": ("q, kv, ", "", ""),
    "QKVPacked": ("qkv, ", "", ""),
    "Varlen": ("q, k, v, ", _LENGTHS, "block_table, "),
    "VarlenKVPacked": ("q, kv, ", _LENGTHS, ""),
    "VarlenQKVPacked": ("qkv, ", "cu_seqlens, max_seqlen, ", ""),
}
_TEMPLATE = """
class FlashAttn{kind}Func(torch.autograd.Function):
    @staticmethod
    def forward(ctx, {tensors}{lengths}{options}return_softmax, {more}is_grad_enabled):
        q, k, v = {parts}
        ctx.packed, ctx.arguments = "{tensors}", {count}
        return _run(ctx, q, k, v, {rest}, softmax_scale, causal, return_softmax)

    @staticmethod
    def backward(ctx, dout, *args):
        dq, dk, dv = _gradients(ctx, dout)
        given = {gradients}
        return *given, *[None] * (ctx.arguments - len(given))

def flash_attn_{public}func(
    {tensors}{lengths}dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False, {default}
):
    return FlashAttn{kind}Func.apply(
        {tensors}{lengths}{options}return_attn_probs, {more}torch.is_grad_enabled()
    )
"""


class _Kernels:
    """The extension module: what it computes is not seen by PyTorch."""

    @staticmethod
    def fwd_kvcache(q, *cache):
        return [q.detach().clone(), None]


def _flash_attn():
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    kernels = type("flash_attn_2_cuda", (), {"fwd_kvcache": _Kernels.fwd_kvcache})
    vars(interface).update(
        torch=torch,
        _run=_run,
        _gradients=_gradients,
        flash_attn_gpu=kernels,
        __file__="flash_attn_interface.py",
    )
    for kind, (tensors, lengths, more) in _FUNCTIONS.items():
        dim = 1 if lengths else 2
        packed = {
            "q, k, v, ": ("q, k, v", "dq, dk, dv"),
            "q, kv, ": (f"q, *kv.detach().unbind({dim})", f"dq, torch.stack([dk, dv], {dim})"),
            "qkv, ": (f"qkv.detach().unbind({dim})", f"(torch.stack([dq, dk, dv], {dim}),)"),
        }
        parts, gradients = packed[tensors]
        cumulative = "cu_seqlens_q, cu_seqlens_k" if "_q" in lengths else "cu_seqlens, cu_seqlens"
        cumulative = f"[{cumulative}]" if lengths else "[]"
        public = "varlen_" if lengths else ""
        public += kind.removeprefix("Varlen").lower() + "_" * kind.endswith("Packed")
        code = _TEMPLATE.format(
            kind=kind, tensors=tensors, lengths=lengths, options=_OPTIONS, more=more, parts=parts,
            rest=cumulative, gradients=gradients, public=public, default="block_table=None," if more else "",
            count=(tensors + lengths + _OPTIONS + more).count(",") + 2,
        )  # fmt: skip
        exec(code, vars(interface))
        name = f"flash_attn_{public}func"
        setattr(package, name, getattr(interface, name))

    def flash_attn_with_kvcache(q, *cache):
        return interface.flash_attn_gpu.fwd_kvcache(q, *cache)[0]

    package.flash_attn_with_kvcache = interface.flash_attn_with_kvcache = flash_attn_with_kvcache
    package.__version__ = "2.8.4"
    return {package.__name__: package, interface.__name__: interface}


# xformers


class LowerTriangularMask:
    offset = staticmethod(lambda queries, keys: 0)

    def materialize(self, shape, like):
        return causal_bias(*shape, self.offset(*shape), like)


class LowerTriangularFromBottomRightMask(LowerTriangularMask):
    offset = staticmethod(lambda queries, keys: keys - queries)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    def __init__(self, bias):
        self._bias = bias

    def materialize(self, shape, like):
        return super().materialize(shape, like) + self._bias


class LocalAttentionFromBottomRightMask:
    """One of those that are refused."""


@dataclass
class _SeqLenInfo:
    seqstart_py: list[int]


class BlockDiagonalMask:
    offset: Any = None

    def __init__(self, q_seqlen, kv_seqlen=None):
        self.q_seqinfo, self.k_seqinfo = (
            _SeqLenInfo([0, *torch.tensor(lengths).cumsum(0).tolist()])
            for lengths in (q_seqlen, kv_seqlen or q_seqlen)
        )

    def materialize(self, shape, like):
        bias = like.new_full(shape, -torch.inf)
        q, k = self.q_seqinfo.seqstart_py, self.k_seqinfo.seqstart_py
        for a, b, c, d in zip(q, q[1:], k, k[1:], strict=False):
            causal = self.offset and causal_bias(b - a, d - c, self.offset(b - a, d - c), like)
            bias[a:b, c:d] = 0.0 if self.offset is None else causal
        return bias


class BlockDiagonalCausalMask(BlockDiagonalMask):
    offset = staticmethod(LowerTriangularMask.offset)


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    offset = staticmethod(LowerTriangularFromBottomRightMask.offset)


@dataclass
class Inputs:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_bias: Any = None
    p: float = 0.0
    scale: float | None = None
    output_dtype: torch.dtype | None = None
    is_partial: bool = False

    def validate_inputs(self):
        if any(x.dim() != self.query.dim() for x in (self.key, self.value)):
            raise ValueError("Query/Key/Value should all have BMGHK, BMHK or BMK shape.")


@torch.library.custom_op("xformers_twin::forward", mutates_args=())
def _efficient(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    return plain(q, k, v, bias, scale).contiguous()


@_efficient.register_fake
def _(q, k, v, bias, scale):
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def efficient(inp, operator=plain):
    """Attention of `Inputs` of 3, 4 or 5 dimensions."""
    q, k, v = inp.query, inp.key, inp.value
    shape, bias = (*q.shape[:-1], v.shape[-1]), inp.attn_bias
    if bias is not None and not isinstance(bias, torch.Tensor):
        bias = bias.materialize((q.shape[1], k.shape[1]), q)
    elif bias is not None:
        bias = {3: lambda: bias[:, None], 4: lambda: bias, 5: lambda: bias.flatten(1, 2)}[q.dim()]()
    q, k, v = (x.unsqueeze(2) if x.dim() == 3 else x.flatten(2, -2) for x in (q, k, v))
    return operator(q, k, v, bias, inp.scale).reshape(shape)


def _xformers():
    package, ops, fmha = (ModuleType(f"xformers{name}") for name in ("", ".ops", ".ops.fmha"))

    class _fMHA(torch.autograd.Function):
        @staticmethod
        def forward(ctx, op_fw, op_bw, *args):
            inp = Inputs(*args)
            ctx.save_for_backward(*args[:3])
            ctx.rest, ctx.count = args[3:], len(args)
            return efficient(inp, _efficient), None

        @staticmethod
        def backward(ctx, grad, _):
            with torch.enable_grad():
                qkv = [x.detach().requires_grad_() for x in ctx.saved_tensors]
                gradients = torch.autograd.grad(efficient(Inputs(*qkv, *ctx.rest)), qkv, grad)
            return None, None, *gradients, *[None] * (ctx.count - 3)

    def _memory_efficient_attention(inp, op=None):
        if all(x.requires_grad is False for x in [inp.query, inp.key, inp.value]):
            return efficient(inp, _efficient)
        return _fMHA.apply(None, None, inp.query, inp.key, inp.value, inp.attn_bias, inp.p, inp.scale)[0]

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        inp = Inputs(query=query, key=key, value=value, p=p, attn_bias=attn_bias, scale=scale)
        return fmha._memory_efficient_attention(inp, op=op)

    fmha._memory_efficient_attention = _memory_efficient_attention
    fmha.memory_efficient_attention = ops.memory_efficient_attention = memory_efficient_attention
    return {module.__name__: module for module in (package, ops, fmha)}


_MAKE = {"flash_attn": _flash_attn, "xformers": _xformers}


@contextlib.contextmanager
def loaded(name):
    """Yields the package where it and a GPU are, else its stand-in, entered into sys.modules."""
    if torch.cuda.is_available():
        with contextlib.suppress(ImportError):
            yield importlib.import_module(name if name == "flash_attn" else "xformers.ops")
            return
    modules = _MAKE[name]()
    sys.modules.update(modules)
    try:
        yield modules[name if name == "flash_attn" else "xformers.ops"]
    finally:
        for module in modules:
            sys.modules.pop(module, None)

"""A package that takes flash-attn's place where it is not: its public function, computed in PyTorch on a CPU.

As there, tensors are [B, L, H, D], an autograd.Function calls operators of torch.library, backward fills its
results in place and has no derivative, a causal mask aligns the last query and key, head dims that are no
multiples of 8 are padded, and the operands of products are rounded to the tensors' dtype. What the kernels
would read at a wrong address raises.
"""

import math

import torch
import torch.nn.functional as F

__version__ = "2.8.3"
calls = []  # the named arguments of each call


def _check(*tensors):
    for x in tensors:
        assert x.dim() == 4 and x.stride(3) == 1 and x.data_ptr() % 16 == 0, (x.shape, x.stride())
        strides = zip(x.shape[:3], x.stride()[:3], strict=True)
        assert all(size == 1 or stride % 8 == 0 for size, stride in strides), x.stride()
        assert x.shape[3] % 8 == 0 and not x.is_neg()


def _logits(q, k, scale, causal):
    """The logits without their maximum, and the logarithm of the sum of their exponentials, [B, H, L_q]."""
    s = scale * torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float())
    if causal:
        seen = torch.ones(s.shape[2:], dtype=torch.bool).tril(s.shape[3] - s.shape[2])
        s = s.masked_fill(~seen, -math.inf)
    largest = s.amax(-1, keepdim=True)
    return s - largest, s.logsumexp(-1) - largest[..., 0]


def _of_all_heads(q, *tensors):
    return [x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in tensors]


@torch.library.custom_op("flash_stand_in::forward", mutates_args=(), device_types="cpu")
def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(q, k, v)
    k, v = _of_all_heads(q, k, v)
    s, lse = _logits(q, k, scale, causal)
    weights = s.exp().to(q.dtype).float()
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v.float()) / lse.exp().transpose(1, 2)[..., None]
    return out.to(q.dtype).contiguous(), lse


@_forward.register_fake
def _(q, k, v, scale, causal):
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@torch.library.custom_op("flash_stand_in::backward", mutates_args=("dq", "dk", "dv"), device_types="cpu")
def _backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, scale: float, causal: bool,
) -> torch.Tensor:  # fmt: skip
    _check(dout, q, k, v, out, dq, dk, dv)
    group = q.shape[2] // k.shape[2]
    k, v = _of_all_heads(q, k, v)
    dout = dout.float()
    s, recomputed = _logits(q, k, scale, causal)
    p = (s - lse[..., None]).exp()
    assert torch.equal(recomputed, lse)
    delta = (dout * out.float()).sum(-1)  # [B, L, H]
    p_dp = p * (torch.einsum("bqhd,bkhd->bhqk", dout, v.float()) - delta.transpose(1, 2)[..., None])
    ds, p = p_dp.to(q.dtype).float(), p.to(q.dtype).float()
    dq.copy_(scale * torch.einsum("bhqk,bkhd->bqhd", ds, k.float()))
    dk.copy_(scale * torch.einsum("bhqk,bqhd->bkhd", ds, q.float()).unflatten(2, (-1, group)).sum(3))
    dv.copy_(torch.einsum("bhqk,bqhd->bkhd", p, dout).unflatten(2, (-1, group)).sum(3))
    return delta


@_backward.register_fake
def _(dout, q, k, v, out, lse, dq, dk, dv, scale, causal):
    return lse.new_empty(q.shape[:3])


def _last_contiguous(x):
    return x if x.stride(-1) == 1 else x.contiguous()


class FlashAttnFunc(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, causal):
        ctx.width, ctx.scale, ctx.causal = q.shape[3], scale, causal
        padding = 0, -q.shape[3] % 8
        q, k, v = (_last_contiguous(F.pad(x, padding) if padding[1] else x) for x in (q, k, v))
        out, lse = torch.ops.flash_stand_in.forward(q, k, v, scale, causal)
        ctx.save_for_backward(q, k, v, out, lse)
        return out[..., : ctx.width]

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        padding = 0, -dout.shape[3] % 8
        dout = _last_contiguous(F.pad(dout, padding) if padding[1] else dout)
        torch.ops.flash_stand_in.backward(dout, q, k, v, out, lse, dq, dk, dv, ctx.scale, ctx.causal)
        return *(x[..., : ctx.width] for x in (dq, dk, dv)), None, None


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert (dropout_p, window_size, softcap, alibi_slopes, return_attn_probs) == (0, (-1, -1), 0, None, False)
    calls.append({"softmax_scale": softmax_scale, "causal": causal, "deterministic": deterministic})
    return FlashAttnFunc.apply(q, k, v, softmax_scale, causal)

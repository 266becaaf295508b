"""flash-attn, an optional package: attention that carries no tangent, forward and backward, on NVIDIA's GPUs.

Its public function runs with its own autograd, so that nothing depends on the signatures of its kernels,
which change between releases.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from imf_kernels.backends.dispatch import cached_constant, in_graph
from imf_kernels.backends.layout import unfit

DTYPES = (torch.bfloat16, torch.float16)
WIDEST = 256
OLDEST = (2, 7)  # from which torch.compile traces it


@cached_constant
def missing() -> str | None:
    """Returns why flash-attn cannot be used in this process; `None` if it can."""
    if torch.version.hip:
        return "it takes NVIDIA's GPUs, and this PyTorch is built for ROCm, on which 'triton' runs"
    try:
        version = importlib.import_module("flash_attn").__version__
    except ImportError as error:
        return f"flash-attn cannot be imported: {error} (pip install 'imf-kernels[flash]')"
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        return f"it needs flash-attn {OLDEST[0]}.{OLDEST[1]} or newer, got {version}"
    return None


def unavailable(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> str | None:
    """Returns why flash-attn cannot compute attention of q, k, v [B, H, L, D]; `None` if it can."""
    if reason := unfit((q, k, v), "cuda", DTYPES) or missing():
        return reason
    if (capability := torch.cuda.get_device_capability(q.device)) < (8, 0):
        return f"it runs on compute capability 8.0 and newer, got {capability[0]}.{capability[1]}"
    width, value_width = q.shape[3], v.shape[3]
    if width != value_width or not 0 < width <= WIDEST:
        return f"it takes one head dim of at most {WIDEST}, got {width} and {value_width} of the value"
    if 0 in (*q.shape, *k.shape):
        return f"it needs a sample, a head, a query and a key, got {list(q.shape)} and {list(k.shape)}"
    if is_causal and q.shape[2] != k.shape[2]:
        return (
            f"with is_causal it takes as many queries as keys, got {q.shape[2]} and {k.shape[2]}: it aligns "
            "the last ones, this operation the first"
        )
    if scale <= 0:
        return f"it takes a scale above 0, got {scale:g}: it looks for the maximum before it scales"
    return next(filter(None, map(_unaligned, (q, k, v))), None)


def _unaligned(x: Tensor) -> str | None:
    """Returns why x, [B, H, L, D] or [B, L, H, D], cannot be read 16 bytes at a time; `None` if it can.

    Other head dims than multiples of 8 are padded, and so copied, by flash-attn.
    """
    if x.shape[3] % 8:
        return None
    if any(size > 1 and stride % 8 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)):
        return f"it takes strides that are multiples of 8 elements, got {x.stride()}"
    if not in_graph() and x.data_ptr() % 16:  # a traced tensor has no address yet
        return f"it takes addresses that are multiples of 16 bytes, got {x.data_ptr():#x}"
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
    """Computes attention of q, k, v [B, H, L, D], in the memory order [B, L, H, D].

    Gradients repeat bitwise, like all of this library.
    """
    from flash_attn import flash_attn_func

    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out: Tensor = flash_attn_func(q, k, v, softmax_scale=scale, causal=is_causal, deterministic=True)
    if out.requires_grad and not torch.compiler.is_compiling():  # graphs have no second derivatives
        out.register_hook(_cotangent)
    return out.transpose(1, 2)


def _cotangent(dout: Tensor) -> Tensor:
    """Returns the gradient dout [B, L, H, D] as flash-attn can read it.

    Raises: RuntimeError where it is to be differentiated, of which flash-attn's backward knows nothing.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "scaled_dot_product_attention: create_graph=True asks for second derivatives, which flash-attn "
            "does not have; backend='reference' does"
        )
    dout = dout.resolve_neg()
    return dout.contiguous() if _unaligned(dout) else dout

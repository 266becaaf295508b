"""Drop-in modules with the state dict of what they replace, and `replace`, which swaps them in.

Each takes tensors, `Dual`s, and dual tensors inside `imf_kernels.jvp`.
"""

from imf_kernels.nn.attention import Attention, CrossAttention, RotaryEmbedding, flash_attn_func
from imf_kernels.nn.blocks import AdaLNBlock
from imf_kernels.nn.modules import GroupNorm, LayerNorm, Modulate, RMSNorm, SwiGLU
from imf_kernels.nn.swap import Swap, replace

__all__ = [
    "AdaLNBlock",
    "Attention",
    "CrossAttention",
    "GroupNorm",
    "LayerNorm",
    "Modulate",
    "RMSNorm",
    "RotaryEmbedding",
    "Swap",
    "SwiGLU",
    "flash_attn_func",
    "replace",
]

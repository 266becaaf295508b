"""Exact forward-mode derivatives at close to the cost of a forward pass.

Every operation takes tensors or `Dual`s (a primal and its tangent), computes both in one pass, and lets
gradients flow through the primal alone.
"""

from imf_kernels import nn as nn
from imf_kernels.advice.explain import explain
from imf_kernels.backends.dispatch import use_backend
from imf_kernels.dual import Dual, linear_map, primal
from imf_kernels.ops.arithmetic import cat
from imf_kernels.ops.attention import scaled_dot_product_attention
from imf_kernels.ops.elementwise import gelu, silu
from imf_kernels.ops.gated_residual import gated_residual
from imf_kernels.ops.gated_residual_rms_norm import gated_residual_rms_norm
from imf_kernels.ops.group_norm import group_norm
from imf_kernels.ops.layer_norm import layer_norm
from imf_kernels.ops.layer_norm_modulate import layer_norm_modulate
from imf_kernels.ops.linear import linear
from imf_kernels.ops.prepend_tokens import prepend_tokens
from imf_kernels.ops.qk_norm_rope import qk_norm_rope, rope_tables
from imf_kernels.ops.rms_norm import rms_norm
from imf_kernels.ops.sinusoidal_embedding import sinusoidal_embedding
from imf_kernels.ops.swiglu import swiglu
from imf_kernels.transforms.checkpoint import checkpoint
from imf_kernels.transforms.jvp import jvp

__version__ = "0.1.0"  # of both packages: pyproject.toml reads it here

__all__ = [
    "Dual",
    "cat",
    "checkpoint",
    "explain",
    "gated_residual",
    "gated_residual_rms_norm",
    "gelu",
    "group_norm",
    "jvp",
    "layer_norm",
    "layer_norm_modulate",
    "linear",
    "linear_map",
    "prepend_tokens",
    "primal",
    "qk_norm_rope",
    "rms_norm",
    "rope_tables",
    "scaled_dot_product_attention",
    "silu",
    "sinusoidal_embedding",
    "swiglu",
    "use_backend",
]

"""A user's file, typed: mypy follows the calls (test_build.py). Not run."""

import torch
from torch import Tensor

import imf_kernels as ik
from imf_kernels import Dual

x, w = torch.ones(2, 16), torch.ones(16)
of_tensor: Tensor = ik.rms_norm(x, w)
of_dual: Dual = ik.rms_norm(Dual(x, x), w)
sums: Tensor = ik.gated_residual(x, x, w)
moving: Dual = ik.gated_residual(x, Dual(x), w)
both: tuple[Dual, Dual] = ik.gated_residual_rms_norm(Dual(x), x, w, w)
heads = torch.ones(1, 2, 3, 8)
attended: Tensor = ik.scaled_dot_product_attention(heads, heads, heads)
attended_dual: Dual = ik.scaled_dot_product_attention(Dual(heads), heads, heads)
modulated: Dual = ik.layer_norm_modulate(Dual(x), x, x)
prepended: Tensor = ik.prepend_tokens(heads[0], [(x[:, :8], x[:, :8])])
linear: Dual = ik.linear(Dual(x), torch.ones(4, 16))
with ik.use_backend("reference"):
    activated: Tensor = ik.gelu(ik.silu(x), approximate="tanh")
wrong_sum: Dual = ik.gated_residual(x, x, w)  # expect: Incompatible types in assignment
attended_wrong: Tensor = ik.scaled_dot_product_attention(Dual(heads), heads, heads)  # expect: Incompatible
rotated: tuple[Dual, Dual, Dual] = ik.qk_norm_rope(Dual(x), w[:2], w[:2], x[:, :1], x[:, :1])
wrong: Dual = ik.rms_norm(x, w)  # expect: Incompatible types in assignment
ik.rms_norm(x, "w")  # expect: Argument 2 to "rms_norm" has incompatible type "str"

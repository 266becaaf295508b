"""What the networks share: the embedding of scalars, patches, the way from x to the heads, checks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import imf_kernels as ik
from imf.model.config import IMFConfig
from imf_kernels import Dual

SINUSOIDS = 256


class ScalarEmbedder(nn.Module):
    """A scalar a sample → sinusoids → Linear → SiLU → Linear, in fp32.

    std: of the initial weights; by default (input width)^(−½) of each layer.
    """

    def __init__(self, width: int, std: float | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(SINUSOIDS, width)
        self.last = nn.Linear(width, width)
        for layer in (self.first, self.last):
            nn.init.normal_(layer.weight, std=std or layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, t: Tensor | Dual) -> Any:
        return self.of_sinusoids(ik.sinusoidal_embedding(t, SINUSOIDS))

    def of_sinusoids(self, x: Tensor | Dual) -> Any:
        """Returns what `forward` does, from the sinusoidal embedding of t, [B, SINUSOIDS]."""
        first, last = self.first, self.last
        x = ik.silu(ik.linear(x, first.weight, first.bias))
        return ik.linear(x, last.weight, last.bias)


def patch_embedder(config: IMFConfig) -> nn.Linear:
    """The Linear from a patch's values to the stream: the official programs' convolution, Xavier uniform."""
    layer = nn.Linear(config.patch_values, config.hidden_size)
    bound = math.sqrt(6 / (config.patch_values + config.hidden_size))
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.zeros_(layer.bias)
    return layer


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """Makes a Linear that is zero at the start."""
    layer = nn.Linear(in_features, out_features)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def condition_tokens(count: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(count, width) * width**-0.5)


def patchify(z: Tensor, c: IMFConfig) -> Tensor:
    """[B, C, H, W] → [B, patches, C p p], a patch's values in the order of a convolution's weights."""
    p, side = c.patch_size, c.input_size // c.patch_size
    z = z.reshape(-1, c.in_channels, side, p, side, p)
    return z.permute(0, 2, 4, 1, 3, 5).reshape(-1, c.patches, c.patch_values)


def unpatchify(x: Tensor, c: IMFConfig) -> Tensor:
    """[B, L, p p C] or [B · L, p p C], patches last, values in the order (row, column, channel) →
    [B, C, H, W]."""
    p, side = c.patch_size, c.input_size // c.patch_size
    x = x.view(-1, c.tokens, c.patch_values)[:, -c.patches :]
    x = x.reshape(-1, side, side, p, p, c.in_channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, c.in_channels, c.input_size, c.input_size)


def residual_scales(c: IMFConfig) -> list[nn.Parameter]:
    """Makes the learned scales [d] of a block's two residual branches, attention and MLP."""
    return [nn.Parameter(torch.full((c.hidden_size,), float(c.residual_scale))) for _ in range(2)]


class VelocityNetwork(nn.Module):
    """A transformer from a noisy image and what conditions it to velocities: blocks that u and v share, then
    the blocks and the final layer of each.

    Subclasses make the layers (`x_embedder`, `shared_blocks`, `u_blocks`, `u_final`, with a v-head `v_blocks`
    and `v_final`) and define `embed`. A block is called as `block(x, *context, compute_dtype)`.

    Attributes:
        config: its shape.
        compute_dtype: dtype of the operands of the blocks' products and of attention: torch.bfloat16, or
            `None` for the weights' own. Weights, embedders, norms, the residual stream and the outputs are
            fp32 in either case (fp64 after `.double()`, on the `reference` backend).
    """

    x_embedder: nn.Linear
    shared_blocks: nn.ModuleList
    u_blocks: nn.ModuleList
    v_blocks: nn.ModuleList

    def __init__(self, config: IMFConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None

    def embed(self, z: Any, t: Any, h: Any, omega: Tensor, t_min: Tensor, t_max: Tensor, y: Tensor) -> Any:
        """Returns the sequence x, [B, L, d] or [B · L, d], and the tuple of a block's other arguments."""
        raise NotImplementedError

    def forward(
        self,
        z: Tensor | Dual,
        t: Tensor | Dual,
        h: Tensor | Dual,
        omega: Tensor,
        t_min: Tensor,
        t_max: Tensor,
        y: Tensor,
        heads: str = "u",
    ) -> Any:
        """Velocities at z.

        Args:
            z: [B, C, H, W] in float32, the noisy image; a `Dual` for its tangent.
            t, h: [B] in float32, the time and t − r; a `Dual` each for their tangents. t has no effect on a
                network with condition tokens, which carry h alone.
            omega, t_min, t_max: [B] in float32, the guidance scale ω > 0, 1 for none, and the guidance
                interval; without effect on a network that does not have them as inputs.
            y: [B] in int64 or int32, labels; num_classes is the null label.
            heads: "u", "v" or "uv": which heads to evaluate.

        Returns:
            u, v, or the pair (u, v), each [B, C, H, W] in float32. u is a `Dual` if z or a time is one; v is
            always a plain tensor, evaluated on the primal alone: nothing needs its tangent.

        Raises:
            ValueError, TypeError: for inputs that do not fit or a head that the network does not have; on a
                CPU, unless compiled, also for labels and guidance scales out of range.
        """
        name, has_v = type(self).__name__, self.config.has_v_head
        if heads not in ("u", "v", "uv") or ("v" in heads and not has_v):
            wanted = "'u', 'v' or 'uv'" if has_v else "'u' (this network has no v-head)"
            raise ValueError(f"{name}: heads must be {wanted}, got {heads!r}")
        plain = {"omega": omega, "t_min": t_min, "t_max": t_max}
        check_inputs(name, self.config, self.x_embedder.weight, z, y, {"t": t, "h": h}, plain)
        if heads == "v":
            z, t, h = ik.primal(z), ik.primal(t), ik.primal(h)
        x, context = self.embed(z, t, h, omega, t_min, t_max, y)
        x = self._blocks(self.shared_blocks, x, context)
        outputs = []
        if "u" in heads:
            outputs.append(self._head("u", x, context))
        if "v" in heads:
            outputs.append(self._head("v", ik.primal(x), tuple(map(ik.primal, context))))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _patches(self, z: Tensor | Dual) -> Any:
        x = ik.linear_map(lambda a: patchify(a, self.config), z)
        return ik.linear(x, self.x_embedder.weight, self.x_embedder.bias)

    def _blocks(self, blocks: nn.ModuleList, x: Tensor | Dual, context: tuple[Any, ...]) -> Any:
        for block in blocks:
            x = block(x, *context, self.compute_dtype)
        return x

    def _head(self, head: str, x: Tensor | Dual, context: tuple[Any, ...]) -> Any:
        blocks, final = getattr(self, f"{head}_blocks"), getattr(self, f"{head}_final")
        x = final(self._blocks(blocks, x, context), *context)
        return ik.linear_map(lambda a: unpatchify(a, self.config), x)


def check_inputs(
    caller: str,
    config: IMFConfig,
    weight: Tensor,
    z: Tensor | Dual,
    y: Tensor,
    duals: dict[str, Any],
    plain: dict[str, Any],
) -> None:
    """ValueError or TypeError, naming the argument, unless the inputs of a network fit it.

    weight: one of its weights, whose dtype and device the inputs must have.
    duals, plain: one scalar per sample, [B], that may carry a tangent, and that may not.
    """
    for name, value in {"z": z, **duals, **plain, "y": y}.items():
        if isinstance(value, Dual) and (name in plain or name == "y"):
            raise TypeError(f"{caller}: {name} carries no tangent; pass a tensor, got a Dual")
        if not isinstance(value, (Tensor, Dual)):
            raise TypeError(f"{caller}: {name} must be a tensor, got {type(value).__name__}")
        if value.device != weight.device:
            raise ValueError(
                f"{caller}: {name} must be on {weight.device} like the weights, got {value.device}"
            )
        if name != "y" and value.dtype != weight.dtype:
            raise TypeError(f"{caller}: {name} must be {weight.dtype} like the weights, got {value.dtype}")
    check_forms(caller, config, z, y, {**duals, **plain})
    if _can_look(y) and not bool(((omega := plain["omega"]) > 0).all()):
        raise ValueError(f"{caller}: omega must be positive, got {float(omega.min())}")


def check_forms(caller: str, config: Any, z: Tensor | Dual, y: Tensor, scalars: dict[str, Any]) -> None:
    """ValueError, naming the argument, for inputs of other forms than a network's; for labels out of range.

    config: an `imf.adapted.NetworkConfig`; with in_channels 0 of images of any form.
    scalars: one per sample, [B].
    """
    image = (config.in_channels, config.input_size, config.input_size)
    if len(z.shape) != 4 or (config.in_channels and tuple(z.shape[1:]) != image):
        raise ValueError(f"{caller}: z must be [B, {', '.join(map(str, image))}], got {list(z.shape)}")
    batch = z.shape[0]
    for name, value in scalars.items():
        if tuple(value.shape) != (batch,):
            raise ValueError(f"{caller}: {name} must be [{batch}], one a sample, got {list(value.shape)}")
    if y.dtype not in (torch.int64, torch.int32) or tuple(y.shape) != (batch,):
        raise ValueError(f"{caller}: y must be [{batch}] in int64 or int32, got {list(y.shape)} in {y.dtype}")
    if _can_look(y) and not (int(y.min()) >= 0 and int(y.max()) <= config.num_classes):
        raise ValueError(
            f"{caller}: labels must be within 0 and {config.num_classes} (the null label), "
            f"got {int(y.min())} to {int(y.max())}"
        )


def _can_look(y: Tensor) -> bool:
    """Whether values can be checked: on other devices looking would wait, and no graph has values; there the
    embedding's own check speaks."""
    return y.device.type == "cpu" and y.numel() > 0 and not torch.compiler.is_compiling()

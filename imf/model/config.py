"""The shape of a network, and the published shapes by name."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch

TOKENS = ("class_tokens", "omega_tokens", "interval_tokens", "time_tokens")
# What is larger is a mistake, which would otherwise fill the memory or never end.
MOST = {
    "input_size": 2**16,
    "in_channels": 2**16,
    "hidden_size": 2**20,
    "depth": 2**12,
    "num_classes": 2**28,
    **dict.fromkeys(TOKENS, 2**10),
}
MOST_MLP_WIDTH = 2**22
MOST_POSITIONS = 2**28  # patches times width: the tables of positions, which are in no file


@dataclass(frozen=True)
class IMFConfig:
    """The shape of a network.

    Attributes:
        input_size: height and width of the images or latents.
        patch_size: pixels along a patch.
        in_channels: channels of the input.
        hidden_size: width of the residual stream.
        depth: blocks from the input to one head's output.
        num_heads: attention heads; hidden_size / num_heads is the head dimension.
        aux_head_depth: how many of the `depth` blocks belong to the heads: as many for u as for v. With plain
            blocks 0 means that there is no v-head.
        mlp_ratio: width of the MLP over hidden_size, rounded down.
        num_classes: without the null label, which is index num_classes.
        conditioning: "tokens", in front of the sequence, or "adaln", adaLN-zero, which sees t beside h.
        block: "modern" (RMSNorm, SwiGLU, rotary positions, QK-norm) or "plain" (LayerNorm, GELU, fixed
            positions).
        omega_input, interval_input: whether ω and the guidance interval are inputs.
        class_tokens, omega_tokens, interval_tokens, time_tokens: how many tokens carry the class, ω, each end
            of the guidance interval, and h, with conditioning by tokens.
        residual_scale: initial value of the learned scales of residual branches, with conditioning by tokens.

    "tokens" and "modern" are `imf.model.imf.IMF`, all else is `imf.mean_flow.network.DiT`;
    `imf.mean_flow.methods` names those that the paper's table of ablations walks through.
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 768
    depth: int = 12
    num_heads: int = 12
    aux_head_depth: int = 8
    mlp_ratio: float = 8 / 3
    num_classes: int = 1000
    conditioning: str = "tokens"
    block: str = "modern"
    omega_input: bool = True
    interval_input: bool = True
    class_tokens: int = 8
    omega_tokens: int = 4
    interval_tokens: int = 2
    time_tokens: int = 4
    residual_scale: float = 0.0

    def __post_init__(self) -> None:
        sizes = (
            "input_size",
            "patch_size",
            "in_channels",
            "hidden_size",
            "depth",
            "num_heads",
            "num_classes",
            *TOKENS,
        )
        for name in sizes:
            value = getattr(self, name)
            self._require(name, type(value) is int and value >= 1, "a positive integer")
            self._require(name, value <= MOST.get(name, value), f"at most {MOST.get(name)}")
        width, heads, depth = self.hidden_size, self.num_heads, self.depth
        fits = type(self.aux_head_depth) is int and 0 <= self.aux_head_depth <= depth
        self._require("aux_head_depth", fits, f"an integer within 0 and depth {depth}")
        ratio = self.mlp_ratio
        fits = isinstance(ratio, (int, float)) and 0 < ratio < math.inf and width * ratio >= 1
        self._require("mlp_ratio", fits, "a number of at least 1 / hidden_size")
        self._require("mlp_ratio", width * ratio <= MOST_MLP_WIDTH, f"at most {MOST_MLP_WIDTH} / hidden_size")
        scale = self.residual_scale
        fits = isinstance(scale, (int, float)) and not isinstance(scale, bool) and math.isfinite(scale)
        self._require("residual_scale", fits, "a finite number")
        multiple = self.input_size % self.patch_size == 0
        self._require("input_size", multiple, f"a multiple of patch_size {self.patch_size}")
        if (positions := self.patches * width) > MOST_POSITIONS:
            raise ValueError(
                f"IMFConfig: hidden_size times patches (input_size / patch_size) ** 2 must be at most "
                f"{MOST_POSITIONS}, got {positions}"
            )
        self._require("conditioning", self.conditioning in ("tokens", "adaln"), "tokens or adaln")
        self._require("block", self.block in ("modern", "plain"), "modern or plain")
        for name in ("omega_input", "interval_input"):
            self._require(name, type(getattr(self, name)) is bool, "True or False")
        if self.conditioning == "tokens" and not (self.omega_input and self.interval_input):
            raise ValueError(
                f"IMFConfig: tokens carry ω and the interval: omega_input and interval_input must be True, "
                f"got {self.omega_input} and {self.interval_input}"
            )
        if self.block == "modern":
            self._require("block", self.conditioning != "adaln", "'plain' with conditioning 'adaln'")
            wanted = f"a multiple of twice num_heads {heads} (rotary positions turn pairs of channels)"
            self._require("hidden_size", width % (2 * heads) == 0, wanted)
        else:
            wanted = f"a multiple of num_heads {heads} and of 4 (sines and cosines of rows and columns)"
            self._require("hidden_size", width % 4 == 0 and width % heads == 0, wanted)

    def _require(self, name: str, fits: bool, wanted: str) -> None:
        if not fits:
            raise ValueError(f"IMFConfig: {name} must be {wanted}, got {getattr(self, name)!r}")

    @property
    def mlp_width(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def patches(self) -> int:
        return (self.input_size // self.patch_size) ** 2

    @property
    def patch_values(self) -> int:
        return self.patch_size**2 * self.in_channels

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        if self.conditioning == "adaln":
            return self.patches
        return self.patches + sum(self.condition_tokens.values())

    @property
    def condition_tokens(self) -> dict[str, int]:
        """How many tokens carry each condition, in the order of the sequence."""
        interval = self.interval_tokens
        counts = self.class_tokens, self.omega_tokens, interval, interval, self.time_tokens
        return dict(zip(("y", "omega", "t_min", "t_max", "h"), counts, strict=True))

    @property
    def has_v_head(self) -> bool:
        return self.block == "modern" or self.aux_head_depth > 0


@dataclass(frozen=True)
class AdaptedConfig:
    """What is known of an adapted network; attributes as of `imf.adapted.NetworkConfig`.

    custom: its class, "module.Class".  in_channels, input_size: 0 until the first batch.
    Raises: ValueError, naming it, for a value of another type or out of range.
    """

    custom: str
    num_classes: int
    in_channels: int = 0
    input_size: int = 0
    has_v_head: bool = False
    omega_input: bool = False
    interval_input: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            kind, least = str(field.type), int(name == "num_classes")
            if type(value).__name__ != kind or (kind == "int" and value < least):
                wanted = f"an int of at least {least}" if kind == "int" else f"a {kind}"
                raise ValueError(f"adapted network: {name} must be {wanted}, got {value!r}")
        if self.interval_input and not self.omega_input:
            raise ValueError("adapted network: interval_input without omega_input is no form of guidance")

    @property
    def form(self) -> str:
        """What guidance is to the network, a key of `imf.adapted.GUIDANCE`."""
        return "interval" if self.interval_input else "omega" if self.omega_input else "fixed"


# The network of original Mean Flows: adaLN-zero, no v-head, guidance fixed in training.
ORIGINAL: dict[str, Any] = {
    "aux_head_depth": 0,
    "mlp_ratio": 4.0,
    "conditioning": "adaln",
    "block": "plain",
    "omega_input": False,
    "interval_input": False,
}
PRESETS = {
    "iMF-B/2": IMFConfig(hidden_size=768, depth=12, num_heads=12),
    "iMF-M/2": IMFConfig(hidden_size=768, depth=24, num_heads=12),
    "iMF-L/2": IMFConfig(hidden_size=1024, depth=32, num_heads=16),
    "iMF-XL/2": IMFConfig(hidden_size=1024, depth=48, num_heads=16),
    "MF-B/2": IMFConfig(hidden_size=768, depth=12, num_heads=12, **ORIGINAL),
    "MF-M/2": IMFConfig(hidden_size=1024, depth=16, num_heads=16, **ORIGINAL),
    "MF-L/2": IMFConfig(hidden_size=1024, depth=24, num_heads=16, **ORIGINAL),
    "MF-XL/2": IMFConfig(hidden_size=1152, depth=28, num_heads=16, **ORIGINAL),
}


def patch_size_for(input_size: int, max_patches: int) -> int:
    """Returns the smallest patch size that divides the images and gives at most `max_patches`."""
    return next(p for p in divisors(input_size) if (input_size // p) ** 2 <= max_patches)


def divisors(size: int) -> list[int]:
    """Returns the divisors of a size, ascending."""
    return [p for p in range(1, size + 1) if size % p == 0]


def config_of(model: Any) -> Any:
    """The configuration of a network, also of one that a wrapper (DDP, torch.compile) holds.

    Raises: TypeError if it is no `imf.adapted.Network`.
    """
    network = model
    while network is not None and not hasattr(network, "config"):
        network = getattr(network, "module", None) or getattr(network, "_orig_mod", None)
    config = getattr(network, "config", None)
    if isinstance(getattr(config, "num_classes", None), int) and hasattr(config, "has_v_head"):
        return config
    raise TypeError(
        f"model must be a network of imf.build or imf.adapt, got {type(model).__name__}; wrap one of your "
        f"own: imf.adapt(network, num_classes=…, call=lambda network, z, t, r, labels: …)"
    )


def check_guidance(omega: float, t_min: float, t_max: float) -> None:
    """Raises ValueError unless omega >= 1, finite in fp32, and 0 <= t_min <= t_max <= 1."""
    for name, holds, wanted, got in (
        ("omega", abs(omega) <= torch.finfo(torch.float32).max, "finite in fp32", omega),
        ("omega", omega >= 1, "at least 1", omega),
        ("t_min", 0 <= t_min <= 1, "in [0, 1]", t_min),
        ("t_max", t_min <= t_max <= 1, f"in [t_min, 1] = [{t_min:g}, 1]", t_max),
    ):
        if not holds:
            raise ValueError(f"{name} (--{name.replace('_', '-')}) must be {wanted}, got {got!r}")

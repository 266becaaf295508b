"""The methods that can be trained: Mean Flows, each step from them to Improved Mean Flows, and flow maps.

A method is an objective (`imf.mean_flow.objective.objective`), the distribution of its times and the form of
the network that it needs; sizes are the configuration's own. The first ones are in the order of the ablations
in "Improved Mean Flows" (arXiv 2512.02012); each adds one thing to the one before it. The others train the
network of original Mean Flows by losses that differentiate the tangent (`imf.mean_flow.flow_maps`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from imf.model.config import IMFConfig
from imf.objective.draws import Guidance

if TYPE_CHECKING:  # for an annotation
    from imf.adapted import NetworkConfig


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        text: what it is, or adds to the one before it.
        tangent: the direction of u's derivative, (tangent, 1, 0) in (z, t, r): "v_c", "v_g", or "v" for the
            v-head's; "r" for the derivative by r alone, along (0, 0, 1).
        times: distribution of t and r, as of `imf.objective.draws.Draws.sample`.
        omega_input, interval_input, conditioning, block: the form of the network, as of `IMFConfig`.
    """

    text: str
    tangent: str = "v"
    times: str = "logit-normal"
    omega_input: bool = True
    interval_input: bool = True
    conditioning: str = "adaln"
    block: str = "plain"

    @property
    def v_head(self) -> bool:
        """Whether the network has a head for v."""
        return self.tangent == "v"

    @property
    def flow_map(self) -> bool:
        """Whether the loss differentiates the tangent, ∂u/∂r."""
        return self.tangent == "r"

    @property
    def form(self) -> dict[str, Any]:
        """The fields of an `IMFConfig` that the method decides."""
        return {
            name: getattr(self, name) for name in ("conditioning", "block", "omega_input", "interval_input")
        }


_FIXED: dict[str, Any] = {"omega_input": False, "interval_input": False}
METHODS = {
    "mf": Method("original Mean Flows", tangent="v_g", **_FIXED),
    "imf-boundary": Method("v-loss, v = u(z, t, t) as tangent", tangent="v_c", **_FIXED),
    "imf-vhead": Method("v-loss, v from an auxiliary head", **_FIXED),
    "imf-omega": Method("+ ω as an input", interval_input=False),
    "imf-interval": Method("+ interval as an input"),
    "imf-tokens": Method("+ in-context tokens in place of adaLN-zero", conditioning="tokens"),
    "imf": Method("+ SwiGLU, RMSNorm, RoPE: Improved Mean Flows", conditioning="tokens", block="modern"),
    "tvm": Method("Terminal Velocity Matching", tangent="r", times="gap", **_FIXED),
    "lsd": Method("Lagrangian self-distillation", tangent="r", times="uniform", **_FIXED),
}


def guidance_of(network: NetworkConfig, guidance: Guidance) -> Guidance | None:
    """Returns the guidance of an objective: `guidance`, or `None` for networks with ω as an input."""
    return None if network.omega_input else guidance


def network_of(method: str, network: IMFConfig) -> IMFConfig:
    """The configuration of the form that a method needs, with the sizes of another one.

    The MLP keeps its number of weights: SwiGLU has three matrices where GELU has two. A v-head that goes away
    leaves its blocks to u.
    """
    chosen = METHODS[method]
    ratios = {("modern", "plain"): 3 / 2, ("plain", "modern"): 2 / 3}
    return replace(
        network,
        **chosen.form,
        mlp_ratio=network.mlp_ratio * ratios.get((network.block, chosen.block), 1),
        aux_head_depth=network.aux_head_depth if chosen.v_head else 0,
    )

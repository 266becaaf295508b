"""The methods that can be trained: original Mean Flows, Improved Mean Flows, and each step between them.

A method is an objective and the form of the network that it needs; sizes are the configuration's own. They
are in the order of the ablations in "Improved Mean Flows" (arXiv 2512.02012); each adds one thing to the one
before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from imf.mean_flow.objective import mean_flow
from imf.model.config import IMFConfig
from imf.objective.draws import Draws
from imf.objective.imf_loss import Guidance, Loss, StepDraws, improved_mean_flow

Objective = Callable[[nn.Module, Tensor, Tensor, Draws | StepDraws], Loss]


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        text: what it adds to the one before it.
        objective: called as `objective(model, x, y, draws)`, with `guidance=` where that is fixed.
        omega_input, interval_input, conditioning, block: the form of the network, as of `IMFConfig`.
        v_head: whether the network has a head for v.
    """

    text: str
    objective: Callable[..., Loss]
    omega_input: bool = True
    interval_input: bool = True
    conditioning: str = "adaln"
    block: str = "plain"
    v_head: bool = True

    @property
    def form(self) -> dict[str, Any]:
        """Those fields of an `IMFConfig` that the method decides."""
        return {
            name: getattr(self, name) for name in ("conditioning", "block", "omega_input", "interval_input")
        }


_FIXED: dict[str, Any] = {"omega_input": False, "interval_input": False}
METHODS = {
    "mf": Method("original Mean Flows", mean_flow, v_head=False, **_FIXED),
    "imf-boundary": Method(
        "v-loss, v = u(z, t, t) as tangent", partial(mean_flow, tangent="v_c"), v_head=False, **_FIXED
    ),
    "imf-vhead": Method("v-loss, v from an auxiliary head", improved_mean_flow, **_FIXED),
    "imf-omega": Method("+ ω as an input", improved_mean_flow, interval_input=False),
    "imf-interval": Method("+ interval as an input", improved_mean_flow),
    "imf-tokens": Method(
        "+ in-context tokens in place of adaLN-zero", improved_mean_flow, conditioning="tokens"
    ),
    "imf": Method(
        "+ SwiGLU, RMSNorm, RoPE: Improved Mean Flows",
        improved_mean_flow,
        conditioning="tokens",
        block="modern",
    ),
}


def objective(method: str, guidance: Guidance) -> Objective:
    """The objective of a method; `guidance` is what networks without ω as an input are trained for."""
    return partial(METHODS[method].objective, guidance=guidance_of(method, guidance))


def guidance_of(method: str, guidance: Guidance) -> Guidance | None:
    """What `imf.objective.imf_loss.prepare` takes: `guidance`, or `None` for networks with ω as an input."""
    return None if METHODS[method].omega_input else guidance


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

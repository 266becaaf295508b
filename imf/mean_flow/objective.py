"""The training objective of original Mean Flows, and the objective of any method.

The network has u alone, and its instantaneous velocity is v(z, t; y) = u(z, t, t; y). Guidance is fixed:

    v_g  = ω v_t + κ v_c + (1 − ω − κ) v_u inside the guidance interval, else v_t;  dropped rows v_t
    du/dt = JVP of u at (z, t, r) along (v_g, 1, 0)
    loss = mean over the batch of L / sg(L + c)^p,   L = Σ (u − sg(v_g − (t − r) du/dt))²

Along v_g, which contains v_t, du/dt depends on more than (z, t, r), and the loss is no regression of a
network on v_g. With v_c in its place it is one: `imf.objective.imf_loss.improved_mean_flow`.

Sources: "Mean Flows" (arXiv 2505.13447) and its official program; "Improved Mean Flows" (arXiv 2512.02012).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from imf.mean_flow.flow_maps import (
    check_fixed,
    lagrangian_self_distillation,
    terminal_velocity_matching,
)
from imf.mean_flow.methods import METHODS
from imf.model.config import config_of
from imf.objective.draws import Draws, Guidance, StepDraws
from imf.objective.imf_loss import (
    Loss,
    adaptive,
    cast_once_on_gpus,
    guided_velocity,
    improved_mean_flow,
    instantaneous_velocities,
    interpolate,
    squared_error,
)
from imf_kernels import Dual


def mean_flow(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    draws: Draws | StepDraws,
    *,
    guidance: Guidance,
    norm_eps: float = 0.01,
    norm_p: float = 1.0,
) -> Loss:
    """Evaluates the objective, equal to the official program's and with less work.

    What is left out has no effect on the result: tangents and v_c on FM rows (there t = r, and v_c is
    the network's own u), v_u where it is not used (dropped rows, rows outside the interval, 1 − ω − κ = 0),
    v_c after the FM rows where κ = 0.

    Args:
        model: a network without guidance as an input; u alone is trained.
        x, y, draws, norm_eps, norm_p: as of `improved_mean_flow`; of the draws ω and interval are not used.
        guidance: what the network is trained for.

    Returns:
        A `Loss`; gradients flow through the primal u alone.

    Raises:
        ValueError, TypeError: as `imf.objective.imf_loss.improved_mean_flow`, and for a network with guidance
            as an input.
    """
    step = check_fixed("mean_flow", model, x, y, draws, guidance)
    config, draws = config_of(model), step.draws
    fm, after = slice(draws.n_fm), slice(draws.n_fm, None)
    t, h, one = draws.t, draws.t - draws.r, torch.ones_like(draws.t)
    conditions = draws.omega, draws.t_min, draws.t_max, y.masked_fill(draws.drop, config.num_classes)
    c_rows = step.c_rows[:0] if guidance.kappa == 0 else step.c_rows

    z, v_t = interpolate(x, draws)
    with cast_once_on_gpus(model, x):
        v_c, v_u = instantaneous_velocities(model, z, y, step, c_rows, head="u")
        direction = guided_velocity(v_t, v_c, v_u, step)[after]
        u = model(Dual(z, direction), Dual(t, one[after]), Dual(h, one[after]), *conditions, heads="u")
    v_c[fm] = u.primal.detach()[fm]
    v_g = guided_velocity(v_t, v_c, v_u, step)
    du_dt = u.tangent.detach()
    error = squared_error(u.primal + h[:, None, None, None] * du_dt, v_g)

    loss_u, loss_v = error.detach().mean() / x[0].numel(), (u.primal.detach() - v_t).square().mean()
    loss = adaptive(error, norm_eps, norm_p).mean()
    return Loss(loss, loss_u, loss_v, u.primal.detach(), None, du_dt, v_g)


Objective = Callable[[nn.Module, Tensor, Tensor, Draws | StepDraws], Loss]


def objective(
    method: str,
    guidance: Guidance | None,
    *,
    teacher: nn.Module | None = None,
    norm_eps: float = 0.01,
    norm_p: float = 1.0,
) -> Objective:
    """The objective of a method; guidance: as `imf.mean_flow.methods.guidance_of` returns it.

    teacher: the averaged network, for Terminal Velocity Matching.
    norm_eps, norm_p: of the adaptive weights, which flow maps do not have.
    """
    if METHODS[method].tangent not in ("v_g", "r"):
        return partial(improved_mean_flow, guidance=guidance, norm_eps=norm_eps, norm_p=norm_p)
    assert guidance is not None  # no network of these methods has it as an input
    if method == "tvm":
        if teacher is None:
            raise ValueError("objective: teacher must be the averaged network for the method tvm, got None")
        return partial(terminal_velocity_matching, teacher=teacher, guidance=guidance)
    if method == "lsd":
        return partial(lagrangian_self_distillation, guidance=guidance)
    return partial(mean_flow, guidance=guidance, norm_eps=norm_eps, norm_p=norm_p)

"""The training objective of original Mean Flows, and its first step towards the improved ones.

The network has u alone, and its instantaneous velocity is v(z, t; y) = u(z, t, t; y). Guidance is fixed:

    v_g  = ω v_t + κ v_c + (1 − ω − κ) v_u inside the guidance interval, else v_t;  dropped rows v_t
    du/dt = JVP of u at (z, t, r) along (v_g, 1, 0)
    loss = mean over the batch of L / sg(L + c)^p,   L = Σ (u − sg(v_g − (t − r) du/dt))²

Along v_g, which contains v_t, du/dt depends on more than (z, t, r), and the loss is no regression of a
network on v_g. With v_c in its place it is one, of the compound velocity u + (t − r) · sg(du/dt): the v-loss
with the boundary condition v = u(z, t, t) in the paper of Improved Mean Flows.

Sources: "Mean Flows" (arXiv 2505.13447) and its official program; "Improved Mean Flows" (arXiv 2512.02012).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from imf.objective.draws import Draws
from imf.objective.imf_loss import (
    Guidance,
    Loss,
    Prepared,
    adaptive,
    check_batch,
    evaluated,
    interpolate,
    rounded_once,
    target,
)
from imf_kernels import Dual


def mean_flow(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    draws: Draws | Prepared,
    *,
    guidance: Guidance,
    tangent: str = "v_g",
    norm_eps: float = 0.01,
    norm_p: float = 1.0,
) -> Loss:
    """One evaluation of the objective, equal to the official program's and with less work.

    What is left out has no effect on the result: tangents and v_c on FM rows (there t = r, and v_c is
    the network's own u), v_u where it is not used (dropped rows, rows outside the interval, 1 − ω − κ = 0),
    v_c behind the FM rows where κ = 0 and it is no tangent.

    Args:
        model: a network without guidance as an input; its `config.num_classes` is the null label.
        x, y, draws, norm_eps, norm_p: as of `improved_mean_flow`; of the draws ω and interval are not used.
        guidance: what the network is trained for.
        tangent: "v_g", or "v_c" for the v-loss with the boundary condition.

    Returns:
        A `Loss`; gradients flow through the primal u alone.

    Raises:
        ValueError, TypeError: as `imf.objective.imf_loss.improved_mean_flow`, and for another tangent.
    """
    null, step = _check(model, x, y, draws, tangent, guidance)
    draws, c_rows = step.draws, step.c_rows
    if guidance.kappa == 0 and tangent == "v_g":
        c_rows = c_rows[:0]
    n_fm, t, h = draws.n_fm, draws.t, draws.t - draws.r
    z, v_t = interpolate(x, draws)
    with rounded_once(model, x):
        v_c, v_u = evaluated(model, z, y, draws, c_rows, step.u_rows, "u")
        direction = (v_c if tangent == "v_c" else target(v_t, v_c, v_u, step))[n_fm:]

        one, labels = torch.ones_like(t[n_fm:]), y.masked_fill(draws.drop, null)
        given = draws.omega, draws.t_min, draws.t_max, labels
        u = model(Dual(z, direction), Dual(t, one), Dual(h, one), *given, heads="u")

    v_c[:n_fm] = u.primal.detach()[:n_fm]
    v_g = target(v_t, v_c, v_u, step)
    return _loss(u.primal, v_t, h, u.tangent.detach(), v_g, norm_eps, norm_p)


def mean_flow_plain(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    draws: Draws | Prepared,
    *,
    guidance: Guidance,
    tangent: str = "v_g",
    norm_eps: float = 0.01,
    norm_p: float = 1.0,
) -> Loss:
    """The same objective in the official program's own form: every row gets v_c, v_u and a tangent.

    Costs more and gives the same loss and gradients; here for comparison. Arguments and result as of
    `mean_flow`, but `du_dt` is computed on every row.
    """
    null, step = _check(model, x, y, draws, tangent, guidance)
    draws = step.draws
    t, h, every = draws.t, draws.t - draws.r, torch.arange(x.shape[0], device=x.device)
    z, v_t = interpolate(x, draws)
    v_c, v_u = evaluated(model, z, y, draws, every, every, "u")
    v_g = target(v_t, v_c, v_u, step)
    direction = v_c if tangent == "v_c" else v_g
    one, labels = torch.ones_like(t), y.masked_fill(draws.drop, null)
    given = draws.omega, draws.t_min, draws.t_max, labels
    u = model(Dual(z, direction), Dual(t, one), Dual(h, one), *given, heads="u")
    return _loss(u.primal, v_t, h, u.tangent.detach(), v_g, norm_eps, norm_p)


def _check(
    model: nn.Module, x: Tensor, y: Tensor, draws: Draws | Prepared, tangent: str, guidance: Guidance
) -> tuple[int, Prepared]:
    if tangent not in ("v_g", "v_c"):
        raise ValueError(f"mean_flow: tangent must be 'v_g' or 'v_c', got {tangent!r}")
    return check_batch("mean_flow", model, x, y, draws, guidance)


def _loss(
    u: Tensor, v_t: Tensor, h: Tensor, du_dt: Tensor, v_g: Tensor, norm_eps: float, norm_p: float
) -> Loss:
    squares = (u + h[:, None, None, None] * du_dt - v_g).square().flatten(1).sum(1)
    return Loss(
        loss=adaptive(squares, norm_eps, norm_p).mean(),
        loss_u=squares.detach().mean() / u[0].numel(),
        loss_v=(u.detach() - v_t).square().mean(),
        u=u.detach(),
        v=None,
        du_dt=du_dt,
        v_g=v_g,
    )

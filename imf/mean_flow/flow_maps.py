"""Objectives that train a flow map by the velocity at which it arrives; they differentiate the tangent.

The network of original Mean Flows is a flow map, from z at time t along the flow's path to time r:

    X(z, t, r) = z − (t − r) u(z, t, r),   ∂X/∂r = u − (t − r) ∂u/∂r

The Lagrangian equation says that it arrives at time r with the flow's velocity v(z, t) = u(z, t, t):
∂X/∂r (z, t, r) = v(X(z, t, r), r). On the first rows, the FM rows, v regresses on the guided velocity v_g; on
the others ∂X/∂r on the velocity v' of a teacher, by the JVP of u along (0, 0, 1) in (z, t, r):

    L_v = Σ (u(z, t, t) − v_g)²
    L_u = Σ (∂X/∂r − sg(v'(sg(X), r)))²

Gradients flow through u and through ∂u/∂r, but neither into the teacher nor into the point where it is
evaluated. v_g is that of `imf.mean_flow.objective.mean_flow` in the full interval, with the teacher's v_c and
v_u.

Sources: "Terminal Velocity Matching" (arXiv 2511.19797) and its official program, training/wrapper.py and
training/loss.py of github.com/lumalabs/tvm; "How to build a consistency model: Learning flow maps via
self-distillation" (arXiv 2505.18825) and copies of its official program, `lsd_term` and `diagonal_term` of
py/common/losses.py. The first one's s is our r. In the second the data are at time 1: its s is our 1 − t, its
t our 1 − r.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from imf.distributed import sharded
from imf.model.config import config_of
from imf.objective.draws import Draws, Guidance, StepDraws
from imf.objective.imf_loss import (
    Loss,
    cast_once_on_gpus,
    check_batch,
    guided_velocity,
    interpolate,
    squared_error,
)
from imf_kernels import Dual


def terminal_velocity_matching(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    draws: Draws | StepDraws,
    *,
    teacher: nn.Module,
    guidance: Guidance,
) -> Loss:
    """Evaluates the loss of Terminal Velocity Matching.

        loss = mean over the FM rows of β² L_v + mean over the others of β² L_u,   L by means, not sums

    β is 1 / the guidance scale, (1 − κ) / ω, and 1 on dropped rows. The teacher is a moving average of the
    network; the program's decays by 0.99. With κ = 0 v_g is the program's, with scale ω.

    Differences from the program: an image is in one of the two terms, not in both, with the same expectation;
    the scale is fixed, not an input; the network's output is not multiplied by it (its `do_scale_param`), and
    its layers are those of Mean Flows, without the paper's normalization of queries, keys and modulation.

    Args:
        model: a network without guidance as an input; u alone is trained.
        x, y: as of `imf.objective.imf_loss.improved_mean_flow`.
        draws: the step's random numbers, of `times="gap"` in the program, with FM rows and others; ω and
            interval are not used.
        teacher: a network of the same form, not trained here.
        guidance: what the network is trained for, in the interval [0, 1].

    Returns:
        A `Loss`: loss_u is the mean over the elements of the other rows of (∂X/∂r − v')², loss_v over those
        of the FM rows of (u − v_g)², du_dt is ∂u/∂r, 0 on the FM rows, v_g what each row regresses on.

    Raises:
        ValueError, TypeError: as `imf.mean_flow.objective.mean_flow`, and for draws of FM rows alone or none,
            and a guidance interval.
    """
    caller = "terminal_velocity_matching"
    step = _check(caller, model, x, y, draws, guidance)
    n_fm, count = step.draws.n_fm, len(x)
    if not 0 < n_fm < count:
        raise ValueError(
            f"{caller}: draws must have FM rows and others, got n_fm {n_fm} of {count} rows; both are where "
            f"fm_fraction times the rows is at least 1 and below their number"
        )
    error, watched = _errors(model, teacher, x, y, step, guidance)
    beta = (1 - step.kappa) / (1 + step.alpha)
    error = beta.square() * error / x[0].numel()
    return Loss(error[:n_fm].mean() + error[n_fm:].mean(), **watched)


def lagrangian_self_distillation(
    model: nn.Module, x: Tensor, y: Tensor, draws: Draws | StepDraws, *, guidance: Guidance
) -> Loss:
    """Evaluates the loss of Lagrangian self-distillation.

        loss = (sum over the FM rows of L_v + sum over the others of L_u) / rows

    The teacher is the network itself, behind a stop-gradient ("convex" in the program). The program draws
    uniform times and 75 % FM rows, and learns a weight exp(−w(r, t)) per pair of times with the loss
    exp(−w) L + w; here w = 0. The paper trains without guidance: `Guidance(kappa=0)`.

    Args:
        model: a network without guidance as an input; u alone is trained.
        x, y: as of `imf.objective.imf_loss.improved_mean_flow`.
        draws: the step's random numbers, of `times="uniform"` in the program; ω and interval are not used.
        guidance: what the network is trained for, in the interval [0, 1].

    Returns, raises:
        As `terminal_velocity_matching`, with any number of FM rows.
    """
    step = _check("lagrangian_self_distillation", model, x, y, draws, guidance)
    error, watched = _errors(model, model, x, y, step, guidance)
    return Loss(error.mean(), **watched)


def check_fixed(
    caller: str, model: nn.Module, x: Tensor, y: Tensor, draws: Draws | StepDraws, guidance: Guidance
) -> StepDraws:
    """The step's draws where x is, see `check_batch`; ValueError also unless guidance is fixed."""
    step = check_batch(caller, model, x, y, draws, guidance)
    if config_of(model).omega_input or guidance is None:
        raise ValueError(
            f"{caller}: guidance is fixed: model must not have it as an input, guidance must be a Guidance; "
            f"imf.improved_mean_flow trains networks with guidance as an input"
        )
    return step


def _check(
    caller: str, model: nn.Module, x: Tensor, y: Tensor, draws: Draws | StepDraws, guidance: Guidance
) -> StepDraws:
    step = check_fixed(caller, model, x, y, draws, guidance)
    if (guidance.t_min, guidance.t_max) != (0, 1):
        raise ValueError(
            f"{caller}: guidance must be in the interval [0, 1], got [{guidance.t_min:g}, {guidance.t_max:g}]"
        )
    return step


def _errors(
    model: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, step: StepDraws, guidance: Guidance
) -> tuple[Tensor, dict[str, Any]]:
    """Returns L_v of the FM rows and L_u of the others, [B], and the fields of `Loss` but the loss."""
    draws, n_fm = step.draws, step.draws.n_fm
    fm, after = slice(n_fm), slice(n_fm, None)
    t, r, h = draws.t, draws.r, draws.t - draws.r
    labels = y.masked_fill(draws.drop, config_of(model).num_classes)
    z, v_t = interpolate(x, draws)
    with cast_once_on_gpus(model, x):
        along_r = Dual(h, -torch.ones_like(h[after]), differentiable=True)  # dh/dr = −1
        u = model(z, t, along_r, draws.omega, draws.t_min, draws.t_max, labels)
        column = h[:, None, None, None]  # 0 on the FM rows
        arrival = u.primal - column * u.tangent  # ∂X/∂r
        with torch.no_grad():
            arrived = z - column * u.primal
            calls = [(arrived[after], r[after], labels[after])]
            if guided := (guidance.omega, guidance.kappa) != (1, 0):
                calls.append((z[fm], t[fm], torch.full_like(y[fm], config_of(model).num_classes)))
            if guidance.kappa and teacher is not model:
                calls.append((z[fm], t[fm], labels[fm]))
            velocities = _velocities(teacher, *map(torch.cat, zip(*calls, strict=True)))
            target, *others = velocities.split([len(rows) for rows, _, _ in calls])
            v_c, v_u = torch.zeros_like(z), torch.zeros_like(z)
            if guided:
                v_u[fm] = others[0]
            v_c[fm] = others[1] if len(others) > 1 else u.primal[fm]
            target = torch.cat([guided_velocity(v_t, v_c, v_u, step)[fm], target])
    error = squared_error(arrival, target)

    mean = error.detach() / x[0].numel()
    return error, {
        "loss_u": mean[after].sum() / max(1, len(x) - n_fm),
        "loss_v": mean[fm].sum() / max(1, n_fm),
        "u": u.primal.detach(),
        "v": None,
        "du_dt": u.tangent.detach(),
        "v_g": target,
    }


def _velocities(teacher: nn.Module, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Evaluates v(z, t) = u(z, t, t) of a network."""
    if not len(z) and not sharded(teacher):  # other processes may have rows, and wait for this one's shards
        return z
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    return teacher(z, t, zero, one, zero, one, labels)

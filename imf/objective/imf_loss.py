"""The training objective of Improved Mean Flows, exactly, in the form that does the least work.

With z = (1 − t) x + t e and v_t = e − x, the network's u is trained through the MeanFlow identity: the
compound velocity V = u + (t − r) · sg(du/dt) regresses on the guided velocity v_g, and so does the v-head:

    v_g  = v_t + (1 − 1/ω') (v_c − v_u),   ω' = ω inside the guidance interval, else 1
    du/dt = JVP of u at (z, t, r) along (v_c, 1, 0)
    loss = mean over the batch of L_u / sg(L_u + c)^p + L_v / sg(L_v + c)^p,   L = Σ (· − v_g)²

A network without a v-head has v(z, t) = u(z, t, t), the boundary condition, and the first term alone.

Source: "Improved Mean Flows" (arXiv 2512.02012) and its official program.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from imf.distributed import sharded
from imf.model.cast_weights import cast_once
from imf.model.config import config_of
from imf.objective.draws import Draws, Guidance, StepDraws, form
from imf_kernels import Dual


@dataclass(frozen=True)
class Loss:
    """What one evaluation of an objective gives.

    Attributes:
        loss: the scalar to differentiate. It reads about 2 always, 1 without a v-head, by construction: watch
            the two below.
        loss_u: mean over all elements of (V − v_g)²; detached.
        loss_v: of (v − v_g)²; without a v-head of (u − v_t)², to watch alone; detached.
        u, v: [B, C, H, W], the network's outputs; detached. v is `None` without a v-head.
        du_dt: [B, C, H, W], the total derivative; in the less-work form zero on the FM rows, where t − r = 0
            leaves it without effect and it is not computed.
        v_g: [B, C, H, W], the guided velocity that is regressed on.
    """

    loss: Tensor
    loss_u: Tensor
    loss_v: Tensor
    u: Tensor
    v: Tensor | None
    du_dt: Tensor
    v_g: Tensor


def improved_mean_flow(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    draws: Draws | StepDraws,
    *,
    guidance: Guidance | None = None,
    norm_eps: float = 0.01,
    norm_p: float = 1.0,
) -> Loss:
    """Evaluates the objective, equal to the official program's and with less work.

    What is left out has no effect on the result: tangents and v_c on FM rows (there t = r, and v_c is
    the network's own v), v_u where it is not used (dropped rows, rows whose ω' is 1), heads not read.

    Args:
        model: a network of `imf.build` or of `imf.adapt`, also inside DDP; see `imf.adapted.Network`.
        x: [B, C, H, W] in float32, data.
        y: [B] in int64 or int32, labels.
        draws: the step's random numbers, on the CPU or where x is.
        guidance: of a network without ω as an input; it then decides v_g instead of the drawn ω and
            interval. A `StepDraws` has it already.
        norm_eps, norm_p: c and p of the adaptive weights.

    Returns:
        A `Loss`; gradients flow through the primal u and v alone.

    Raises:
        ValueError, TypeError: for a batch that does not fit; on a CPU also for labels out of range, the null
            label among them.
    """
    step = check_batch("improved_mean_flow", model, x, y, draws, guidance)
    config, draws = config_of(model), step.draws
    fm, after = slice(draws.n_fm), slice(draws.n_fm, None)  # rows with r = t need no tangent
    t, h, one = draws.t, draws.t - draws.r, torch.ones_like(draws.t)
    conditions = draws.omega, draws.t_min, draws.t_max, y.masked_fill(draws.drop, config.num_classes)
    head, heads = ("v", "uv") if config.has_v_head else ("u", "u")

    z, v_t = interpolate(x, draws)
    with cast_once_on_gpus(model, x):
        v_c, v_u = instantaneous_velocities(model, z, y, step, step.c_rows, head)
        # The network at (z, t, r), with the derivative along (v_c, 1, 0).
        out = model(Dual(z, v_c[after]), Dual(t, one[after]), Dual(h, one[after]), *conditions, heads=heads)
    u, v = out if config.has_v_head else (out, None)
    v_c[fm] = (u.primal if v is None else v).detach()[fm]  # what the network's v is where r = t
    v_g = guided_velocity(v_t, v_c, v_u, step)
    du_dt = u.tangent.detach()
    compound = u.primal + h[:, None, None, None] * du_dt  # V
    error_u = squared_error(compound, v_g)
    loss = adaptive(error_u, norm_eps, norm_p)
    if v is None:
        error_v = squared_error(u.primal.detach(), v_t)
    else:
        error_v, v = squared_error(v, v_g), v.detach()
        loss = loss + adaptive(error_v, norm_eps, norm_p)

    loss_u, loss_v = (error.detach().mean() / x[0].numel() for error in (error_u, error_v))
    return Loss(loss.mean(), loss_u, loss_v, u.primal.detach(), v, du_dt, v_g)


def check_batch(
    caller: str, model: nn.Module, x: Tensor, y: Tensor, draws: Draws | StepDraws, guidance: Guidance | None
) -> StepDraws:
    """The step's draws where x is; ValueError or TypeError unless the batch fits them."""
    given = draws.draws if isinstance(draws, StepDraws) else draws
    if not isinstance(given, Draws):
        raise TypeError(f"{caller}: draws must be a Draws, got a {type(draws).__name__}")
    noise, batch = given.noise, given.noise.shape[0]
    if not batch:
        raise ValueError(f"{caller}: x must have a row, got {form(x)}")
    if not isinstance(guidance, (Guidance, type(None))):
        raise TypeError(f"{caller}: guidance must be a Guidance or None, got a {type(guidance).__name__}")
    config = config_of(model)
    if draws is given and guidance is None and not config.omega_input:
        raise ValueError(
            f"{caller}: guidance must be a Guidance for a network without ω as an input, got None; pass "
            f"guidance=imf.Guidance(kappa=0.2) for a scale of 1.25, or Guidance(kappa=0) for none"
        )
    if form(x) != form(noise):
        raise ValueError(f"{caller}: x must be {form(noise)} like draws.noise, got {form(x)}")
    wanted = [f"[{batch}] of {dtype} on {noise.device}" for dtype in (torch.int64, torch.int32)]
    if form(y) not in wanted:
        raise ValueError(f"{caller}: y must be {wanted[0]} or int32, got {form(y)}")
    null = config.num_classes
    if y.device.type == "cpu" and y.numel() and not (int(y.min()) >= 0 and int(y.max()) < null):
        raise ValueError(
            f"{caller}: labels must be within 0 and {null - 1} (the null label is no label of "
            f"data), got {int(y.min())} to {int(y.max())}"
        )
    return draws if isinstance(draws, StepDraws) else StepDraws.of(draws, guidance, x.device)


def interpolate(x: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Returns z and v_t."""
    t = draws.t[:, None, None, None]
    return (1 - t) * x + t * draws.noise, draws.noise - x


@torch.no_grad()
def instantaneous_velocities(
    model: nn.Module, z: Tensor, y: Tensor, step: StepDraws, c_rows: Tensor, head: str
) -> tuple[Tensor, Tensor]:
    """Evaluates v_c = v(z, t; ω', y) on `c_rows` and v_u = v(z, t; 1, null) on `step.u_rows`, in one call.

    Elsewhere they are 0. head: "v", or "u" for v = u(z, t, t); at h = 0, with the full interval.
    """
    u_rows = step.u_rows
    v_c, v_u, rows = torch.zeros_like(z), torch.zeros_like(z), torch.cat([c_rows, u_rows])
    if rows.numel() or sharded(model):  # other processes may have rows, and wait for this one's shards
        omega = torch.cat([step.omega[c_rows], torch.ones_like(step.omega[u_rows])])
        labels = torch.cat([y[c_rows], torch.full_like(y[u_rows], config_of(model).num_classes)])
        zero, one = torch.zeros_like(omega), torch.ones_like(omega)
        v = model(z[rows], step.draws.t[rows], zero, omega, zero, one, labels, heads=head)
        # Of a row that is computed several times the first counts: products may round equal rows differently.
        first = torch.searchsorted(u_rows, u_rows)
        v_c[c_rows], v_u[u_rows] = v[: len(c_rows)], v[len(c_rows) :][first]
    return v_c, v_u


def guided_velocity(v_t: Tensor, v_c: Tensor, v_u: Tensor, step: StepDraws) -> Tensor:
    """Returns v_g, from velocities that may be anything finite where they are not used."""
    alpha, kappa = (w[:, None, None, None] for w in (step.alpha, step.kappa))
    return v_t + alpha * (v_t - v_u) + kappa * (v_c - v_u)


def squared_error(x: Tensor, target: Tensor) -> Tensor:
    """L, [B]: sums over a row of (x − target)²."""
    return (x - target).square().flatten(1).sum(1)


def adaptive(error: Tensor, norm_eps: float, norm_p: float) -> Tensor:
    """L / sg(L + c)^p for each row."""
    return error / (error.detach() + norm_eps) ** norm_p


def cast_once_on_gpus(model: nn.Module, x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Casts weights once for all passes of a step: on a GPU, unless FSDP2 keeps only shards of them."""
    return cast_once() if x.device.type != "cpu" and not sharded(model) else contextlib.nullcontext()

"""The training objective of Improved Mean Flows, exactly, in the form that does the least work.

With z = (1 − t) x + t e and v_t = e − x, the network's u is trained through the MeanFlow identity: the
compound velocity V = u + (t − r) · sg(du/dt) regresses on the guided velocity v_g, and so does the v-head:

    v_g  = v_t + (1 − 1/ω') (v_c − v_u),   ω' = ω inside the guidance interval, else 1
    du/dt = JVP of u at (z, t, r) along (v_c, 1, 0)
    loss = mean over the batch of L_u / sg(L_u + c)^p + L_v / sg(L_v + c)^p,   L = Σ (· − v_g)²

`imf.mean_flow.objective` has that of original Mean Flows, which shares these parts.

Source: "Improved Mean Flows" (arXiv 2512.02012) and its official program.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from imf.distributed import sharded
from imf.model.cast_weights import made_once
from imf.model.config import config_of
from imf.objective.draws import Draws, form
from imf_kernels import Dual


@dataclass(frozen=True)
class Guidance:
    """Guidance that is fixed in training, for networks without ω as an input.

    v_g = ω v_t + κ v_c + (1 − ω − κ) v_u where t_min ≤ t ≤ t_max, else v_t: a guidance scale of ω / (1 − κ).

    Raises: ValueError, naming the argument, unless ω > 0, 0 ≤ κ < 1, 0 ≤ t_min ≤ t_max ≤ 1.
    """

    omega: float = 1.0
    kappa: float = 0.5
    t_min: float = 0.0
    t_max: float = 1.0

    def __post_init__(self) -> None:
        for name, holds, wanted in (
            ("omega", 0 < self.omega < math.inf, "above 0 and finite"),
            ("kappa", 0 <= self.kappa < 1, "in [0, 1)"),
            ("t_min", 0 <= self.t_min <= 1, "in [0, 1]"),
            ("t_max", self.t_min <= self.t_max <= 1, f"in [t_min, 1] = [{self.t_min:g}, 1]"),
        ):
            if not holds:
                raise ValueError(f"Guidance: {name} must be {wanted}, got {getattr(self, name)!r}")


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


@dataclass(frozen=True)
class Prepared:
    """A step's draws where the batch is, and what they ask for, which only the host has to know.

    Attributes:
        draws: with every tensor where the batch is.
        alpha, kappa: [B], of the target v_g = v_t + α (v_t − v_u) + κ (v_c − v_u); 0 on dropped rows.
        c_rows: [B − n_fm] in int64, the rows behind the FM rows.
        u_rows: [G] in int64, the rows whose target contains v_u, some of them repeated.
    """

    draws: Draws
    alpha: Tensor
    kappa: Tensor
    c_rows: Tensor
    u_rows: Tensor

    def tensors(self) -> list[Tensor]:
        """All of them, in an order that depends on nothing."""
        own = [self.alpha, self.kappa, self.c_rows, self.u_rows]
        return own + [value for value in vars(self.draws).values() if isinstance(value, Tensor)]


def prepare(draws: Draws, guidance: Guidance | None, device: torch.device) -> Prepared:
    """What of a step can be known before it runs; with draws on the CPU nothing here waits for `device`."""
    alpha, kappa = _target_weights(draws, guidance)
    c_rows = torch.arange(draws.n_fm, len(draws.t), device=draws.t.device)
    small = alpha, kappa, c_rows, _rows_of_v_u(alpha + kappa)
    return Prepared(draws.to(device), *(x.to(device, non_blocking=True) for x in small))


def improved_mean_flow(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    draws: Draws | Prepared,
    *,
    guidance: Guidance | None = None,
    norm_eps: float = 0.01,
    norm_p: float = 1.0,
) -> Loss:
    """One evaluation of the objective, equal to the official program's and with less work.

    What is left out has no effect on the result: tangents and v_c on FM rows (there t = r, and v_c is
    the network's own v), v_u where it is not used (dropped rows, rows whose ω' is 1), heads not read.

    Args:
        model: called as `model(z, t, h, omega, t_min, t_max, y, heads=...)`;
            its `config.num_classes` is the null label.
        x: [B, C, H, W] in float32, data.
        y: [B] in int64 or int32, labels.
        draws: the step's random numbers, or what `prepare` made of them.
        guidance: of a network without ω as an input; it then decides v_g in the place of the drawn ω and
            interval. What `prepare` made has it already.
        norm_eps, norm_p: c and p of the adaptive weights.

    Returns:
        A `Loss`; gradients flow through the primal u and v alone.

    Raises:
        ValueError, TypeError: for a batch that does not fit; on a CPU also for labels out of range, the null
            label among them.
    """
    null, step = check_batch("improved_mean_flow", model, x, y, draws, guidance)
    draws = step.draws
    n_fm, t, h = draws.n_fm, draws.t, draws.t - draws.r
    z, v_t = interpolate(x, draws)
    with rounded_once(model, x):
        # v_c where the tangent needs it, v_u where the target does, in one evaluation of the v-head.
        v_c, v_u = evaluated(model, z, y, draws, step.c_rows, step.u_rows, "v")

        # The network at (z, t, r), with the derivative along (v_c, 1, 0) of the rows behind the FM rows.
        one = torch.ones_like(t[n_fm:])
        labels = y.masked_fill(draws.drop, null)
        given = draws.omega, draws.t_min, draws.t_max, labels
        u, v = model(Dual(z, v_c[n_fm:]), Dual(t, one), Dual(h, one), *given, heads="uv")

    v_c[:n_fm] = v.detach()[:n_fm]
    v_g = target(v_t, v_c, v_u, step)
    return _loss(u.primal, v, h, u.tangent.detach(), v_g, norm_eps, norm_p)


def improved_mean_flow_plain(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    draws: Draws | Prepared,
    *,
    guidance: Guidance | None = None,
    norm_eps: float = 0.01,
    norm_p: float = 1.0,
) -> Loss:
    """The same objective in the official program's own form: every row gets v_c, v_u and a tangent.

    Costs more and gives the same loss and gradients; here for comparison. Arguments and result as of
    `improved_mean_flow`, but `du_dt` is computed on every row.
    """
    null, step = check_batch("improved_mean_flow", model, x, y, draws, guidance)
    draws = step.draws
    t, h, every = draws.t, draws.t - draws.r, torch.arange(x.shape[0], device=x.device)
    z, v_t = interpolate(x, draws)
    v_c, v_u = evaluated(model, z, y, draws, every, every, "v")
    v_g = target(v_t, v_c, v_u, step)
    one, labels = torch.ones_like(t), y.masked_fill(draws.drop, null)
    given = draws.omega, draws.t_min, draws.t_max, labels
    u, v = model(Dual(z, v_c), Dual(t, one), Dual(h, one), *given, heads="uv")
    return _loss(u.primal, v, h, u.tangent.detach(), v_g, norm_eps, norm_p)


def check_batch(
    who: str, model: nn.Module, x: Tensor, y: Tensor, draws: Draws | Prepared, guidance: Guidance | None
) -> tuple[int, Prepared]:
    """The null label and the draws prepared; ValueError or TypeError unless the batch fits the draws."""
    given = draws.draws if isinstance(draws, Prepared) else draws
    if not isinstance(given, Draws):
        raise TypeError(f"{who}: draws must be a Draws, got a {type(draws).__name__}")
    noise, batch = given.noise, given.noise.shape[0]
    if form(x) != form(noise):
        raise ValueError(f"{who}: x must be {form(noise)} like draws.noise, got {form(x)}")
    wanted = [f"[{batch}] of {dtype} on {noise.device}" for dtype in (torch.int64, torch.int32)]
    if form(y) not in wanted:
        raise ValueError(f"{who}: y must be {wanted[0]} or int32, got {form(y)}")
    null: int = config_of(model).num_classes
    if y.device.type == "cpu" and y.numel() and not (int(y.min()) >= 0 and int(y.max()) < null):
        raise ValueError(
            f"{who}: labels must be within 0 and {null - 1} (the null label is no label of "
            f"data), got {int(y.min())} to {int(y.max())}"
        )
    return null, draws if isinstance(draws, Prepared) else prepare(draws, guidance, x.device)


def interpolate(x: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """z and v_t."""
    t = draws.t[:, None, None, None]
    return (1 - t) * x + t * draws.noise, draws.noise - x


def target(v_t: Tensor, v_c: Tensor, v_u: Tensor, step: Prepared) -> Tensor:
    """v_g, from velocities that may be anything finite where they are not used."""
    alpha, kappa = (w[:, None, None, None] for w in (step.alpha, step.kappa))
    return v_t + alpha * (v_t - v_u) + kappa * (v_c - v_u)


@torch.no_grad()
def evaluated(
    model: nn.Module, z: Tensor, y: Tensor, draws: Draws, c_rows: Tensor, u_rows: Tensor, head: str
) -> tuple[Tensor, Tensor]:
    """v_c = v(z, t; ω', y) on `c_rows` and v_u = v(z, t; 1, null) on `u_rows`, in one call; 0 elsewhere.

    head: "v", or "u" for v = u(z, t, t); at h = 0, with the whole interval.
    """
    v_c, v_u, rows = torch.zeros_like(z), torch.zeros_like(z), torch.cat([c_rows, u_rows])
    if rows.numel() or sharded(model):  # the other processes may have rows, and wait for this one's shards
        omega = torch.cat([_effective_omega(draws)[c_rows], torch.ones_like(draws.omega[u_rows])])
        labels = torch.cat([y[c_rows], torch.full_like(y[u_rows], config_of(model).num_classes)])
        zero, one = torch.zeros_like(omega), torch.ones_like(omega)
        v = model(z[rows], draws.t[rows], zero, omega, zero, one, labels, heads=head)
        v_c[c_rows], v_u[u_rows] = v[: len(c_rows)], v[len(c_rows) :]
    return v_c, v_u


def rounded_once(model: nn.Module, x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Within it weights are rounded once for all passes: on a GPU, unless FSDP2 keeps a part of them."""
    return made_once() if x.device.type != "cpu" and not sharded(model) else contextlib.nullcontext()


def adaptive(squares: Tensor, norm_eps: float, norm_p: float) -> Tensor:
    """L / sg(L + c)^p a row."""
    return squares / (squares.detach() + norm_eps) ** norm_p


def _target_weights(draws: Draws, guidance: Guidance | None) -> tuple[Tensor, Tensor]:
    """α and κ of the target, as of `Prepared`."""
    if guidance is None:
        omega = _effective_omega(draws)
        alpha, kappa = torch.zeros_like(omega), 1 - 1 / omega
    else:
        inside = (guidance.t_min <= draws.t) & (draws.t <= guidance.t_max)
        alpha, kappa = (inside.to(draws.t.dtype) * w for w in (guidance.omega - 1, guidance.kappa))
    return alpha.masked_fill(draws.drop, 0.0), kappa.masked_fill(draws.drop, 0.0)


def _rows_of_v_u(coefficient: Tensor) -> Tensor:
    """Rows where it is not 0, the last one repeated up to a multiple of an eighth of the batch.

    Computing a row twice changes nothing; a new number of rows at every step would cost matrix products that
    prepare themselves for each shape more than the rows do.
    """
    rows, batch = coefficient.nonzero().squeeze(1), len(coefficient)
    eighth = max(1, batch // 8)
    return repeated(rows, min(batch, -(-len(rows) // eighth) * eighth))


def sizes_of_v_u(batch: int) -> list[int]:
    """The numbers of rows, in rising order, that v_u is computed on in CUDA graphs; the last is the batch."""
    return sorted({-(-batch * eighths // 8) for eighths in (5, 6, 7, 8)})


def repeated(rows: Tensor, count: int) -> Tensor:
    """[count]: `rows`, and the last of them again and again; without any the batch's first one."""
    last = rows[-1:] if len(rows) else rows.new_zeros(1)
    return torch.cat([rows, last.expand(count - len(rows))])


def _effective_omega(draws: Draws) -> Tensor:
    """ω' : ω inside the guidance interval, 1 outside."""
    inside = (draws.t_min <= draws.t) & (draws.t <= draws.t_max)
    # Not torch.where, which copies its number to a GPU and waits for that.
    return draws.omega.masked_fill(~inside, 1.0)


def _loss(
    u: Tensor, v: Tensor, h: Tensor, du_dt: Tensor, v_g: Tensor, norm_eps: float, norm_p: float
) -> Loss:
    compound = u + h[:, None, None, None] * du_dt
    squares_u = (compound - v_g).square().flatten(1).sum(1)
    squares_v = (v - v_g).square().flatten(1).sum(1)
    weighted = adaptive(squares_u, norm_eps, norm_p) + adaptive(squares_v, norm_eps, norm_p)
    elements = u[0].numel()
    return Loss(
        loss=weighted.mean(),
        loss_u=squares_u.detach().mean() / elements,
        loss_v=squares_v.detach().mean() / elements,
        u=u.detach(),
        v=v.detach(),
        du_dt=du_dt,
        v_g=v_g,
    )

"""The training objective of Improved Mean Flows, exactly, in the form that does the least work.

With z = (1 − t) x + t e and v_t = e − x, the network's u is trained through the MeanFlow identity: the
compound velocity V = u + (t − r) · sg(du/dt) regresses on the guided velocity v_g, and so does the v-head:

    v_g  = v_t + (1 − 1/ω') (v_c − v_u),   ω' = ω inside the guidance interval, else 1
    du/dt = JVP of u at (z, t, r) along (v_c, 1, 0)
    loss = mean over the batch of L_u / sg(L_u + c)^p + L_v / sg(L_v + c)^p,   L = Σ (· − v_g)²

Source: "Improved Mean Flows" (arXiv 2512.02012) and its official program.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from imf_kernels import Dual

MAX_LOG_POWER = 80  # omega_max ** (1 - omega_exponent) must stay finite in float32


@dataclass(frozen=True)
class Draws:
    """Everything random in one step, so that a step is a function of its arguments.

    Attributes:
        t, r: [B] in float32, end and start of the interval, 0 ≤ r ≤ t ≤ 1; r = t on the FM rows.
        noise: [B, C, H, W], e.
        omega: [B], the guidance scale ω, 1 for none.
        t_min, t_max: [B], the guidance interval; (0, 1) on the FM rows.
        drop: [B] boolean, rows whose label is dropped.
        n_fm: how many rows, the first ones, are flow-matching (FM) rows.
    """

    t: Tensor
    r: Tensor
    noise: Tensor
    omega: Tensor
    t_min: Tensor
    t_max: Tensor
    drop: Tensor
    n_fm: int

    def __post_init__(self) -> None:
        noise = self.noise
        if not isinstance(noise, Tensor) or noise.dim() != 4 or not noise.is_floating_point():
            raise ValueError(f"Draws: noise must be [B, C, H, W] of floating-point type, got {_form(noise)}")
        batch = noise.shape[0]
        for name in ("t", "r", "omega", "t_min", "t_max", "drop"):
            dtype = torch.bool if name == "drop" else noise.dtype
            wanted, got = f"[{batch}] of {dtype} on {noise.device}", _form(getattr(self, name))
            if got != wanted:
                raise ValueError(f"Draws: {name} must be {wanted} like noise, got {got}")
        if type(self.n_fm) is not int or not 0 <= self.n_fm <= batch:
            raise ValueError(
                f"Draws: n_fm must be an int within 0 and the batch of {batch}, got {self.n_fm!r}"
            )
        if noise.device.type == "cpu":  # elsewhere a look would wait for the device
            t, r, omega, t_min, t_max = self.t, self.r, self.omega, self.t_min, self.t_max
            fm = slice(0, self.n_fm)
            for holds, rule in (
                (t[fm] == r[fm], "r must equal t on the first n_fm rows"),
                ((r >= 0) & (r <= t) & (t <= 1), "t and r must be 0 <= r <= t <= 1"),
                ((omega > 0) & (omega < math.inf), "omega must be positive and finite"),
                ((t_min >= 0) & (t_min <= t_max) & (t_max <= 1), "the guidance interval must lie in [0, 1]"),
                (
                    (t_min[fm] == 0) & (t_max[fm] == 1),
                    "the guidance interval of the first n_fm rows must be (0, 1)",
                ),
            ):
                if not bool(holds.all()):  # also where one is NaN
                    raise ValueError(f"Draws: {rule}, not so in row {int((~holds).nonzero()[0])}")

    @staticmethod
    def sample(
        x: Tensor,
        *,
        seed: int,
        step: int,
        process: int = 0,
        fm_fraction: float = 0.5,
        drop_probability: float = 0.1,
        omega_max: float = 8.0,
        omega_exponent: float = 1.0,
        mean: float = -0.4,
        std: float = 1.0,
    ) -> Draws:
        """The draws of one step, a function of (seed, step, process) alone.

        Args:
            x: [B, C, H, W], the batch: its shape and device are used.
            fm_fraction: share of FM rows, rounded down.
            drop_probability: of a label; the rows dropped are the first ones, as in the official program.
            omega_max, omega_exponent: ω has density ∝ ω^(−omega_exponent) on [1, omega_max].
            mean, std: t and r are the larger and the smaller of two sigmoid(N(mean, std²)).

        Raises:
            ValueError: an argument out of range.
        """
        if not isinstance(x, Tensor) or x.dim() != 4:
            raise ValueError(f"Draws.sample: x must be [B, C, H, W], got {_form(x)}")
        for name, value in (("seed", seed), ("step", step), ("process", process)):
            _require(type(value) is int and value >= 0, name, "an integer of at least 0", value)
        for name, share in (("fm_fraction", fm_fraction), ("drop_probability", drop_probability)):
            _require(0 <= share <= 1, name, "in [0, 1]", share)
        _require(math.isfinite(mean), "mean", "finite", mean)
        _require(0 <= std < math.inf, "std", "at least 0", std)
        _require(1 <= omega_max < math.inf, "omega_max", "finite and at least 1", omega_max)
        _require(
            math.isfinite(omega_exponent) and (1 - omega_exponent) * math.log(omega_max) <= MAX_LOG_POWER,
            "omega_exponent",
            f"such that omega_max ** (1 - omega_exponent) is at most e ** {MAX_LOG_POWER}",
            omega_exponent,
        )
        generator = torch.Generator().manual_seed(_key(seed, step, process))
        batch = x.shape[0]
        n_fm = int(batch * fm_fraction)
        fm = torch.arange(batch) < n_fm
        times = torch.sigmoid(torch.randn(2, batch, generator=generator) * std + mean)
        t, r = times.amax(0), times.amin(0)
        uniform = torch.rand(4, batch, generator=generator)
        log_max = math.log(omega_max)
        if omega_exponent == 1.0:
            omega = torch.exp(uniform[0] * log_max)
        else:
            slope = 1.0 - omega_exponent
            omega = torch.exp(torch.log1p(uniform[0] * math.expm1(slope * log_max)) / slope)
        n_drop = int((uniform[3] < drop_probability).sum())
        draws = Draws(
            t=t,
            r=torch.where(fm, t, r),
            noise=torch.randn(x.shape, generator=generator),
            omega=omega.clamp(min=1.0),
            t_min=torch.where(fm, 0.0, uniform[1] * 0.5),
            t_max=torch.where(fm, 1.0, 0.5 + uniform[2] * 0.5),
            drop=torch.arange(batch) < n_drop,
            n_fm=n_fm,
        )
        return draws.to(x.device)

    def to(self, device: torch.device | str) -> Draws:
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "n_fm"}
        return Draws(**tensors, n_fm=self.n_fm)


def _require(condition: bool, name: str, wanted: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"Draws.sample: {name} must be {wanted}, got {got!r}")


def _form(x: Any) -> str:
    if not isinstance(x, Tensor):
        return f"a {type(x).__name__}"
    return f"{list(x.shape)} of {x.dtype} on {x.device}"


def _key(seed: int, step: int, process: int) -> int:
    """One 63-bit seed from three numbers, far apart for neighbouring ones (the mixer of splitmix64)."""
    mask, key = (1 << 64) - 1, 0
    for value in (seed, step, process):
        key = (key + value + 0x9E3779B97F4A7C15) & mask
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & mask
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & mask
        key ^= key >> 31
    return key >> 1


@dataclass(frozen=True)
class Loss:
    """What one evaluation of the objective gives.

    Attributes:
        loss: the scalar to differentiate. It reads about 2 always, by construction: watch the two below.
        loss_u, loss_v: means over all elements of (V − v_g)² and (v − v_g)²; detached.
        u, v: [B, C, H, W], the network's outputs; detached.
        du_dt: [B, C, H, W], the total derivative; in the less-work form zero on the FM rows, where t − r = 0
            leaves it without effect and it is not computed.
        v_g: [B, C, H, W], the guided velocity that both heads regress on.
    """

    loss: Tensor
    loss_u: Tensor
    loss_v: Tensor
    u: Tensor
    v: Tensor
    du_dt: Tensor
    v_g: Tensor


def improved_mean_flow(
    model: nn.Module, x: Tensor, y: Tensor, draws: Draws, *, norm_eps: float = 0.01, norm_p: float = 1.0
) -> Loss:
    """One evaluation of the objective, equal to the official program's and with less work.

    What is left out has no effect on the result: tangents and v_c on FM rows (there t = r, and v_c is
    the network's own v), v_u where it is not used (dropped rows, rows whose ω' is 1), heads not read.

    Args:
        model: called as `model(z, h, omega, t_min, t_max, y, heads)`; its `config.num_classes` is the null
            label.
        x: [B, C, H, W] in float32, data.
        y: [B] in int64 or int32, labels.
        draws: the step's random numbers.
        norm_eps, norm_p: c and p of the adaptive weights.

    Returns:
        A `Loss`; gradients flow through the primal u and v alone.

    Raises:
        ValueError, TypeError: for a batch that does not fit; on a CPU also for labels out of range, the null
            label among them.
    """
    _check(model, x, y, draws)
    h, null = draws.t - draws.r, _null_label(model)
    n_fm, batch = draws.n_fm, x.shape[0]
    z, v_t = _interpolate(x, draws)
    omega = _effective_omega(draws)
    y_null = torch.full_like(y, null)

    # v_c where the tangent needs it, v_u where the target does, in one evaluation of the v-head.
    guided = ~draws.drop & (omega != 1)
    u_rows = _padded(guided.nonzero().squeeze(1), batch)
    c_rows = torch.arange(n_fm, batch, device=x.device)
    rows = torch.cat([c_rows, u_rows])
    v_c, v_u = torch.zeros_like(x), torch.zeros_like(x)
    if rows.numel():
        with torch.no_grad():
            omegas = torch.cat([omega[c_rows], torch.ones_like(omega[u_rows])])
            labels = torch.cat([y[c_rows], y_null[u_rows]])
            v = _velocity(model, z[rows], omegas, labels)
        v_c[c_rows], v_u[u_rows] = v[: len(c_rows)], v[len(c_rows) :]

    # The network at (z, t, r), with the derivative along (v_c, 1, 0) of the rows behind the FM rows.
    z_dual, h_dual = Dual(z, v_c[n_fm:]), Dual(h, torch.ones_like(h[n_fm:]))
    labels = torch.where(draws.drop, y_null, y)
    u, v = model(z_dual, h_dual, draws.omega, draws.t_min, draws.t_max, labels, heads="uv")
    du_dt = u.tangent.detach()

    v_c[:n_fm] = v.detach()[:n_fm]
    v_g = v_t + _where(guided, (1 - 1 / omega)) * (v_c - v_u)
    return _loss(u.primal, v, h, du_dt, v_g, norm_eps, norm_p)


def improved_mean_flow_plain(
    model: nn.Module, x: Tensor, y: Tensor, draws: Draws, *, norm_eps: float = 0.01, norm_p: float = 1.0
) -> Loss:
    """The same objective in the official program's own form: every row gets v_c, v_u and a tangent.

    Costs more and gives the same loss and gradients; here for comparison. Arguments and result as of
    `improved_mean_flow`, but `du_dt` is computed on every row.
    """
    _check(model, x, y, draws)
    t, h, null = draws.t, draws.t - draws.r, _null_label(model)
    z, v_t = _interpolate(x, draws)
    omega = _effective_omega(draws)
    with torch.no_grad():
        v_c = _velocity(model, z, omega, y)
        v_u = _velocity(model, z, torch.ones_like(omega), torch.full_like(y, null))
    v_g = v_t + _where(~draws.drop, 1 - 1 / omega) * (v_c - v_u)
    labels = torch.where(draws.drop, null, y)
    u, v = model(
        Dual(z, v_c), Dual(h, torch.ones_like(t)), draws.omega, draws.t_min, draws.t_max, labels, heads="uv"
    )
    return _loss(u.primal, v, h, u.tangent.detach(), v_g, norm_eps, norm_p)


def _check(model: nn.Module, x: Tensor, y: Tensor, draws: Draws) -> None:
    if not isinstance(draws, Draws):
        raise TypeError(f"improved_mean_flow: draws must be a Draws, got a {type(draws).__name__}")
    noise, batch = draws.noise, draws.noise.shape[0]
    if _form(x) != _form(noise):
        raise ValueError(f"improved_mean_flow: x must be {_form(noise)} like draws.noise, got {_form(x)}")
    wanted = [f"[{batch}] of {dtype} on {noise.device}" for dtype in (torch.int64, torch.int32)]
    if _form(y) not in wanted:
        raise ValueError(f"improved_mean_flow: y must be {wanted[0]} or int32, got {_form(y)}")
    null = _null_label(model)
    if y.device.type == "cpu" and y.numel() and not (int(y.min()) >= 0 and int(y.max()) < null):
        raise ValueError(
            f"improved_mean_flow: labels must be within 0 and {null - 1} (the null label is no label of "
            f"data), got {int(y.min())} to {int(y.max())}"
        )


def _null_label(model: Any) -> int:
    """The null label's index, also of a network that a wrapper (DDP, torch.compile) holds."""
    while not hasattr(model, "config"):
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if inner is None:
            raise TypeError(
                f"improved_mean_flow: model must have a config with num_classes, got {type(model).__name__}"
            )
        model = inner
    return model.config.num_classes


def _padded(rows: Tensor, batch: int) -> Tensor:
    """`rows` with the last one repeated up to a multiple of an eighth of the batch.

    Computing a row twice changes nothing; a new number of rows at every step would cost matrix products that
    prepare themselves for each shape more than the rows do.
    """
    missing = -len(rows) % max(1, batch // 8)
    return torch.cat([rows, rows[-1:].expand(missing)]) if len(rows) and missing else rows


def _interpolate(x: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    t = draws.t[:, None, None, None]
    return (1 - t) * x + t * draws.noise, draws.noise - x


def _effective_omega(draws: Draws) -> Tensor:
    """ω' : ω inside the guidance interval, 1 outside."""
    inside = (draws.t_min <= draws.t) & (draws.t <= draws.t_max)
    return torch.where(inside, draws.omega, 1.0)


def _velocity(model: nn.Module, z: Tensor, omega: Tensor, y: Tensor) -> Tensor:
    """v(z, t; ω, y): the v-head at h = 0, with the whole interval."""
    zero = torch.zeros_like(omega)
    return model(z, zero, omega, zero, torch.ones_like(omega), y, heads="v")


def _where(mask: Tensor, coefficient: Tensor) -> Tensor:
    return torch.where(mask, coefficient, 0.0)[:, None, None, None]


def _loss(
    u: Tensor, v: Tensor, h: Tensor, du_dt: Tensor, v_g: Tensor, norm_eps: float, norm_p: float
) -> Loss:
    compound = u + h[:, None, None, None] * du_dt
    squares_u = (compound - v_g).square().flatten(1).sum(1)
    squares_v = (v - v_g).square().flatten(1).sum(1)
    weighted = sum(s / (s.detach() + norm_eps) ** norm_p for s in (squares_u, squares_v))
    elements = u[0].numel()
    return Loss(
        loss=torch.as_tensor(weighted).mean(),
        loss_u=squares_u.detach().mean() / elements,
        loss_v=squares_v.detach().mean() / elements,
        u=u.detach(),
        v=v.detach(),
        du_dt=du_dt,
        v_g=v_g,
    )

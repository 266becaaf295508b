"""The random numbers of a training step, and what follows from them before the step runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from imf import random

TIMES = "logit-normal", "uniform", "gap"  # distributions of t and r
GAP_MEAN, GAP_STD = -0.8, 1.0  # of logit(t − r), of the official program of Terminal Velocity Matching
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

    All but the noise may lie on the CPU while it lies on a GPU: an objective then knows which rows need what
    without waiting for the device.
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
            raise ValueError(f"Draws: noise must be [B, C, H, W] of floating-point type, got {form(noise)}")
        batch, t = noise.shape[0], self.t
        if isinstance(t, Tensor) and t.device.type != "cpu" and t.device != noise.device:
            raise ValueError(f"Draws: t must be on the CPU or with noise on {noise.device}, got {t.device}")
        device = t.device if isinstance(t, Tensor) else noise.device
        for name in ("t", "r", "omega", "t_min", "t_max", "drop"):
            dtype = torch.bool if name == "drop" else noise.dtype
            wanted, got = f"[{batch}] of {dtype} on {device}", form(getattr(self, name))
            if got != wanted:
                raise ValueError(f"Draws: {name} must be {wanted}, got {got}")
        if type(self.n_fm) is not int or not 0 <= self.n_fm <= batch:
            raise ValueError(
                f"Draws: n_fm must be an int within 0 and the batch of {batch}, got {self.n_fm!r}"
            )
        if device.type == "cpu":  # elsewhere a look would wait for the device
            r, omega, t_min, t_max = self.r, self.omega, self.t_min, self.t_max
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
        r0_fraction: float = 0.0,
        drop_probability: float = 0.1,
        omega_max: float = 8.0,
        omega_exponent: float = 1.0,
        interval: bool = True,
        times: str = "logit-normal",
        mean: float = -0.4,
        std: float = 1.0,
    ) -> Draws:
        """The draws of one step, a function of (seed, step, process) alone, and for the noise of the device.

        Args:
            x: [B, C, H, W], the batch: its shape is used, and its device for the noise alone; all draws are
                float32.
            fm_fraction: share of FM rows, the first ones, rounded down.
            r0_fraction: share of rows with r = 0, the last ones, rounded down; 0 in the paper.
            drop_probability: of a label; the rows dropped are the first ones, as in the official program.
            omega_max, omega_exponent: ω has density ∝ ω^(−omega_exponent) on [1, omega_max].
            interval: whether the guidance interval is drawn; otherwise it is (0, 1) on all rows.
            times: "logit-normal": t and r are the larger and the smaller of two sigmoid(N(mean, std²)), also
                in the FM rows, with r = t. "uniform": of two uniform variables; in the FM rows t is uniform.
                "gap": t − r is sigmoid(N(−0.8, 1)) and r is sigmoid(N(mean, std²)), truncated to t ≤ 1; in
                the FM rows t is sigmoid(N(mean, std²)).
            mean, std: of `times`; "gap" asks for std > 0.

        Raises:
            ValueError: an argument out of range.
        """
        if not isinstance(x, Tensor) or x.dim() != 4:
            raise ValueError(f"Draws.sample: x must be [B, C, H, W], got {form(x)}")
        for name, value in (("seed", seed), ("step", step), ("process", process)):
            _require(type(value) is int and value >= 0, name, "an integer of at least 0", value)
        shares = {"fm_fraction": fm_fraction, "drop_probability": drop_probability}
        for name, share in shares.items():
            _require(0 <= share <= 1, name, "in [0, 1]", share)
        fits = r0_fraction >= 0 and fm_fraction + r0_fraction <= 1
        wanted = f"at least 0, and at most 1 with fm_fraction {fm_fraction:g}"
        _require(fits, "r0_fraction", wanted, r0_fraction)
        _require(times in TIMES, "times", f"one of {', '.join(TIMES)}", times)
        _require(math.isfinite(mean), "mean", "finite", mean)
        _require(0 <= std < math.inf, "std", "at least 0", std)
        _require(std > 0 or times != "gap", "std", "above 0 with times 'gap'", std)
        _require(1 <= omega_max < math.inf, "omega_max", "finite and at least 1", omega_max)
        _require(
            math.isfinite(omega_exponent) and (1 - omega_exponent) * math.log(omega_max) <= MAX_LOG_POWER,
            "omega_exponent",
            f"such that omega_max ** (1 - omega_exponent) is at most e ** {MAX_LOG_POWER}",
            omega_exponent,
        )
        on_host = _drawn_on_host(
            x.shape[0], seed, step, process, fm_fraction=fm_fraction, r0_fraction=r0_fraction,
            drop_probability=drop_probability, omega_max=omega_max, omega_exponent=omega_exponent,
            interval=interval, times=times, mean=mean, std=std,
        )  # fmt: skip
        # Made where it is used: a copy would wait until a GPU has done all that it was asked for.
        of_noise = random.generator(seed, "noise", step, process, x.device)
        return Draws(noise=torch.randn(x.shape, generator=of_noise, device=x.device), **on_host)

    def to(self, device: torch.device | str) -> Draws:
        """The same with every tensor on `device`; does not wait for it."""
        names = [f.name for f in fields(self) if f.name != "n_fm"]
        return Draws(**{n: getattr(self, n).to(device, non_blocking=True) for n in names}, n_fm=self.n_fm)


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
class StepDraws:
    """A step's draws on the batch's device, with what the host computes so that nothing synchronises.

    Attributes:
        draws: with every tensor on the device.
        alpha, kappa: [B], weights of the target v_g = v_t + α (v_t − v_u) + κ (v_c − v_u); 0 on dropped rows.
        omega: [B], ω' : ω inside the guidance interval, 1 outside.
        c_rows: [B − n_fm] in int64, the rows after the FM rows.
        u_rows: [G] in int64, ascending, the rows whose target contains v_u, the last one repeated.
    """

    draws: Draws
    alpha: Tensor
    kappa: Tensor
    omega: Tensor
    c_rows: Tensor
    u_rows: Tensor

    @staticmethod
    def of(draws: Draws, guidance: Guidance | None, device: torch.device) -> StepDraws:
        """Moves draws to `device`; with draws on the CPU nothing here waits for it."""
        alpha, kappa, omega = _weights_of_target(
            draws.t, draws.t_min, draws.t_max, draws.omega, draws.drop, guidance
        )
        c_rows = torch.arange(draws.n_fm, len(draws.t), device=draws.t.device)
        small = alpha, kappa, omega, c_rows, _rows_of_v_u(alpha + kappa)
        return StepDraws(draws.to(device), *(x.to(device, non_blocking=True) for x in small))

    def tensors(self) -> list[Tensor]:
        """All tensors, in a fixed order."""
        own = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return own + [value for value in vars(self.draws).values() if isinstance(value, Tensor)]


def _drawn_on_host(
    batch: int, seed: int, step: int, process: int, *, fm_fraction: float, r0_fraction: float,
    drop_probability: float, omega_max: float, omega_exponent: float, interval: bool, times: str, mean: float,
    std: float,
) -> dict[str, Any]:  # fmt: skip
    """All of `Draws.sample` but the noise."""
    generator = random.generator(seed, "draws", step, process)
    n_fm, n_r0 = int(batch * fm_fraction), int(batch * r0_fraction)
    row = torch.arange(batch)
    fm = row < n_fm
    t, r, t_fm = _times(times, batch, generator, mean, std)
    uniform = torch.rand(4, batch, generator=generator)
    log_max = math.log(omega_max)
    if omega_exponent == 1.0:
        omega = torch.exp(uniform[0] * log_max)
    else:
        slope = 1.0 - omega_exponent
        omega = torch.exp(torch.log1p(uniform[0] * math.expm1(slope * log_max)) / slope)
    whole = fm if interval else torch.ones_like(fm)
    n_drop = int((uniform[3] < drop_probability).sum())
    return {
        "t": torch.where(fm, t_fm, t),
        "r": torch.where(fm, t_fm, r.masked_fill(row >= batch - n_r0, 0.0)),
        "omega": omega.clamp(min=1.0),
        "t_min": torch.where(whole, 0.0, uniform[1] * 0.5),
        "t_max": torch.where(whole, 1.0, 0.5 + uniform[2] * 0.5),
        "drop": row < n_drop,
        "n_fm": n_fm,
    }


def _times(
    times: str, batch: int, generator: torch.Generator, mean: float, std: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns t and r of rows with r < t, and t of FM rows, each [B] in float32."""
    if times == "uniform":
        pair = torch.rand(2, batch, generator=generator)
        return pair.amax(0), pair.amin(0), pair[0]
    if times == "logit-normal":
        pair = torch.sigmoid(torch.randn(2, batch, generator=generator) * std + mean)
        return pair.amax(0), pair.amin(0), pair.amax(0)
    of_gap, of_fm = torch.randn(2, batch, generator=generator, dtype=torch.float64)
    share = torch.rand(batch, generator=generator, dtype=torch.float64)
    gap = torch.sigmoid(of_gap * GAP_STD + GAP_MEAN)
    most = torch.special.ndtr((torch.logit(1 - gap) - mean) / std)  # P(r ≤ 1 − gap)
    r = torch.sigmoid(torch.special.ndtri(share * most) * std + mean)
    t = (r + gap).clamp(max=1)
    return t.float(), r.float(), torch.sigmoid(of_fm * std + mean).float()


def _weights_of_target(
    t: Tensor, t_min: Tensor, t_max: Tensor, omega: Tensor, drop: Tensor, guidance: Guidance | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns alpha, kappa and omega of `StepDraws`."""
    # Not torch.where, which copies its number to a GPU and waits for that.
    omega = omega.masked_fill(~((t_min <= t) & (t <= t_max)), 1.0)
    if guidance is None:
        alpha, kappa = torch.zeros_like(omega), 1 - 1 / omega
    else:
        inside = (guidance.t_min <= t) & (t <= guidance.t_max)
        alpha, kappa = (inside.to(omega.dtype) * w for w in (guidance.omega - 1, guidance.kappa))
    return alpha.masked_fill(drop, 0.0), kappa.masked_fill(drop, 0.0), omega


def _rows_of_v_u(coefficient: Tensor) -> Tensor:
    """Rows where it is not 0, the last one repeated up to the number of rows that v_u is computed on."""
    rows = coefficient.nonzero().squeeze(1)
    return repeated(rows, _rounded_up(len(rows), len(coefficient)))


def _rounded_up(rows: int, batch: int) -> int:
    """Rounds a number of rows up to a multiple of an eighth of the batch.

    Computing a row twice changes nothing; a new number of rows at every step would cost matrix products that
    tune themselves for each shape more than the rows do.
    """
    eighth = max(1, batch // 8)
    return min(batch, -(-rows // eighth) * eighth)


def count_of_v_u(
    batch: int, guidance: Guidance | None, *, seed: int, step: int, process: int, **settings: Any
) -> int:
    """Computes `len(StepDraws.u_rows)` of any process without its batch.

    settings: the others of `Draws.sample`, all of them.
    """
    drawn = _drawn_on_host(batch, seed, step, process, **settings)
    t, t_min, t_max, omega, drop = (drawn[name] for name in ("t", "t_min", "t_max", "omega", "drop"))
    alpha, kappa, _ = _weights_of_target(t, t_min, t_max, omega, drop, guidance)
    return _rounded_up(int((alpha + kappa).count_nonzero()), batch)


def sizes_of_v_u(batch: int) -> list[int]:
    """Numbers of rows, ascending, for which CUDA graphs are captured; the last is the batch."""
    return sorted({-(-batch * eighths // 8) for eighths in (5, 6, 7, 8)})


def repeated(rows: Tensor, count: int) -> Tensor:
    """[count]: `rows` padded with its last one; an empty `rows` with the batch's first."""
    last = rows[-1:] if len(rows) else rows.new_zeros(1)
    return torch.cat([rows, last.expand(count - len(rows))])


def _require(condition: bool, name: str, wanted: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"Draws.sample: {name} must be {wanted}, got {got!r}")


def form(x: Any) -> str:
    """Shape, dtype and device of a tensor as text, for messages; the type of what is none."""
    if not isinstance(x, Tensor):
        return f"a {type(x).__name__}"
    return f"{list(x.shape)} of {x.dtype} on {x.device}"

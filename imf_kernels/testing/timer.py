"""Times of several functions, measured in turns, and their ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Times:
    """Seconds per call, one figure per round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def best(self) -> float:
        return min(self.rounds)


def side_by_side(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int = 9,
    seconds: float = 0.05,
    synchronize: Callable[[], Any] = lambda: None,
) -> dict[str, Times]:
    """Times functions in turns, so that a noisy moment of the machine affects all of them.

    Args:
        functions: by name; each is called once unmeasured first.
        rounds: turns.
        seconds: how long a function runs in a turn, as many calls as fit, at least one.
        synchronize: waits for the device.
    """
    calls = {}
    for name, function in functions.items():
        function()
        calls[name] = max(1, round(seconds / max(_time(function, 1, synchronize), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(_time(function, calls[name], synchronize))
    return {name: Times(tuple(t)) for name, t in times.items()}


def ratios(times: Mapping[str, Times], to: str) -> dict[str, float]:
    """Returns the median over rounds of each function's time over that of `to` in the same round."""
    base = times[to].rounds
    return {
        name: statistics.median(a / b for a, b in zip(t.rounds, base, strict=True))
        for name, t in times.items()
    }


def _time(function: Callable[[], Any], calls: int, synchronize: Callable[[], Any]) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize()
    return (time.perf_counter() - start) / calls

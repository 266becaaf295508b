"""The error rule, the same for every operation, dtype and case: how far a result may be from the exact one.

Exact is the `reference` backend in float64 on the same, already rounded inputs. Let ε be the RMS error of
rounding the exact result to the result's dtype, e the RMS error of PyTorch's computation in float32, ε' and
e' the same for the row, along the last dimension, where they are largest. RMS errors allowed:
    of the full tensor: 3 ε + 2 e,
    of every row, so that a wrong one cannot hide in the mean: max(10 ε, 3 ε') + 2 e'.
Rounding to multiples of a value's ulp errs by ulp / √12 on average and by ulp / 2 at most; ε is computed from
the former, so that a tensor of few values has no lucky ε, and a correctly rounded result always passes.
Likewise e and e' are the largest of several draws of the same case. The rule is checked for primal, tangent
and each primal gradient separately. A zero has no ε: where PyTorch computes exact zeros too, nothing else
passes.

The `reference` itself is checked by the same rule against the formulas of testing/plain.py, through
`torch.func.jvp` and autograd.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from imf_kernels.dual import Dual
from imf_kernels.testing import plain
from imf_kernels.testing.cases import Case

Results = dict[str, Tensor]
CPU = torch.device("cpu")
PLAIN = "plain"  # the formula of `plain`, where a backend is named


def rms(x: Tensor, dim: int | None = None) -> Tensor:
    x = x.double().square()
    return x.mean().sqrt() if dim is None else x.mean(dim).sqrt()


def _rows(x: Tensor) -> Tensor:
    return rms(x, -1) if x.dim() else x.abs()


def _ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the distance between neighbours of `dtype` around each x; 0 at 0."""
    information = torch.finfo(dtype)
    power = torch.frexp(x.abs().clamp(min=information.smallest_normal)).exponent - 1
    return torch.where(x == 0, 0.0, torch.ldexp(torch.full_like(x, information.eps), power))


@dataclass(frozen=True)
class Yardstick:
    """PyTorch's RMS errors in float32: of the full tensor, and of its worst row."""

    whole: float
    row: float

    @classmethod
    def of(cls, fp32: Tensor, exact: Tensor) -> Yardstick:
        if exact.numel() == 0:
            return cls(0.0, 0.0)
        error = fp32.double() - exact
        return cls(rms(error).item(), _rows(error).max().item())

    @classmethod
    def largest(cls, several: Sequence[Yardstick]) -> Yardstick:
        return cls(max(y.whole for y in several), max(y.row for y in several))


def bounds(exact: Tensor, pytorch: Yardstick, dtype: torch.dtype) -> tuple[float, float]:
    """Returns the largest RMS errors of the full tensor and of a row, for a result of `dtype`."""
    rounding = _ulp(exact, dtype) / math.sqrt(12)
    epsilon, worst_epsilon = rms(rounding).item(), _rows(rounding).max().item()
    return 3 * epsilon + 2 * pytorch.whole, max(10 * epsilon, 3 * worst_epsilon) + 2 * pytorch.row


def check(
    name: str, got: Tensor, exact: Tensor, pytorch: Yardstick, rounded_to: torch.dtype | None = None
) -> None:
    """Raises AssertionError, saying what is off and where, unless `got` satisfies the rule.

    Args:
        name: of the result, for the message.
        got: the result to judge.
        exact: what it should be, in float64.
        pytorch: PyTorch's errors in float32.
        rounded_to: the dtype of an intermediate rounding, if coarser than its own.
    """
    assert got.shape == exact.shape, f"{name}: shape must be {list(exact.shape)}, got {list(got.shape)}"
    if exact.numel() == 0:
        return
    if not got.isfinite().all():
        where = (~got.isfinite()).nonzero()[0].tolist()
        bad = int((~got.isfinite()).sum())
        raise AssertionError(
            f"{name}: {bad} of {got.numel()} values are not finite, the first one at {where}"
        )
    whole, row = bounds(exact, pytorch, rounded_to or got.dtype)
    error = got.double() - exact
    size, total = rms(exact).item(), rms(error).item()
    assert total <= whole, f"{name}: RMS error {total:.3e}, at most {whole:.3e} allowed (values: {size:.3e})"
    rows = _rows(error)
    worst = rows.max().item()
    if worst > row:
        where = (rows == rows.max()).nonzero()[0].tolist()
        raise AssertionError(
            f"{name}: row {where} has RMS error {worst:.3e}, at most {row:.3e} allowed (values: {size:.3e})"
        )


def evaluate(
    case: Case,
    primals: Mapping[str, Tensor],
    tangents: Mapping[str, Tensor],
    cotangents: tuple[Tensor, ...] | None,
    backend: str | None,
    dtype: torch.dtype | None = None,
    tangent_cotangents: tuple[Tensor, ...] | None = None,
) -> Results:
    """Returns all results of a case: outputs, their stored tangents, and the gradients for the cotangents
    given: with `tangent_cotangents`, those of the stored tangents, through outputs and tangents.

    Everything is first cast to `dtype`: float64 for the exact results, float32 for PyTorch's. `PLAIN` as the
    backend takes a dtype.
    """

    def convert(x: Tensor) -> Tensor:
        return x.detach().to(dtype or x.dtype) if x.is_floating_point() else x

    if backend == PLAIN:
        return _evaluate_plain(
            case,
            {name: convert(x) for name, x in primals.items()},
            {name: convert(x) for name, x in tangents.items()},
            tuple(map(convert, cotangents or ())),
            None if tangent_cotangents is None else tuple(map(convert, tangent_cotangents)),
        )
    leaves = {name: convert(x) for name, x in primals.items()}
    if cotangents is not None:
        for name in case.differentiable:
            leaves[name].requires_grad_()
    differentiable = tangent_cotangents is not None
    moving = {name: convert(x).requires_grad_(differentiable) for name, x in tangents.items()}
    arguments = {
        name: Dual(x, moving[name], differentiable=differentiable) if name in moving else x
        for name, x in leaves.items()
    }
    options = case.output_options if dtype is None else {}
    results: Results = {}
    outputs, given = [], list(map(convert, cotangents or ()))
    for i, y in enumerate(case.run(arguments, backend, **options)):
        primal, tangent = (y.primal, y.tangent_rows) if isinstance(y, Dual) else (y, None)
        outputs.append(primal)
        results[f"output {i}"] = primal.detach()
        if tangent is not None:
            results[f"tangent {i}"] = tangent.detach()
            if tangent_cotangents is not None:
                outputs.append(tangent)
                given.insert(len(outputs) - 1, convert(tangent_cotangents[i]))
    if cotangents is not None:
        wanted = {name: leaves[name] for name in case.differentiable}
        if differentiable:
            wanted |= {f"tangent of {name}": x for name, x in moving.items()}
        gradients = torch.autograd.grad(outputs, [*wanted.values()], given)
        results |= {f"gradient of {name}": g for name, g in zip(wanted, gradients, strict=True)}
    return results


def _evaluate_plain(
    case: Case, primals: Mapping[str, Tensor], tangents: Mapping[str, Tensor], cotangents: tuple[Tensor, ...],
    tangent_cotangents: tuple[Tensor, ...] | None,
) -> Results:  # fmt: skip
    """Returns what `torch.func.jvp` and autograd derive from a case's plain formula."""
    moving = {name: x for name, x in primals.items() if x.is_floating_point()}

    def formula(*values: Tensor) -> tuple[Tensor, ...]:
        return plain.formula(case, rounded=False)({**primals, **dict(zip(moving, values, strict=True))})

    for name, x in moving.items():
        x.requires_grad_(bool(cotangents) and name in case.differentiable)
    for x in tangents.values():
        x.requires_grad_(tangent_cotangents is not None)
    directions = {name: torch.zeros_like(x) for name, x in moving.items()}
    for name, x in tangents.items():
        directions[name][primals[name].shape[0] - x.shape[0] :] = x
    both: Any = torch.func.jvp(formula, tuple(moving.values()), tuple(directions.values()))
    outputs, derivatives = both
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    derivatives = [
        y_dot[y_dot.shape[0] - next(iter(tangents.values())).shape[0] :]
        for y_dot in (derivatives if tangents else ())
    ]
    results |= {f"tangent {i}": y_dot.detach() for i, y_dot in enumerate(derivatives)}
    if cotangents:
        wanted = {name: moving[name] for name in case.differentiable}
        if tangent_cotangents is None:
            derivatives, tangent_cotangents = [], ()
        else:
            wanted |= {f"tangent of {name}": x for name, x in tangents.items()}
        results |= {
            f"gradient of {name}": g
            for name, g in zip(
                wanted,
                torch.autograd.grad(
                    (*outputs, *derivatives),
                    [*wanted.values()],
                    (*cotangents, *tangent_cotangents),
                    materialize_grads=True,
                ),
                strict=True,
            )
        }
    return results


@dataclass(frozen=True, eq=False)
class Problem:
    """A case with its data and its exact results, by its definition: the `reference` backend or `PLAIN`."""

    case: Case
    dtype: torch.dtype
    seed: int
    primals: dict[str, Tensor]
    tangents: dict[str, Tensor]
    cotangents: tuple[Tensor, ...]
    exact: Results
    definition: str = "reference"
    tangent_cotangents: tuple[Tensor, ...] | None = None  # gradients flow through tangents too

    @classmethod
    def draw(
        cls, case: Case, dtype: torch.dtype, seed: int, device: torch.device = CPU,
        definition: str = "reference", differentiable: bool = False,
    ) -> Problem:  # fmt: skip
        """Draws data on the CPU, the same everywhere by seed; computes exact results on the device."""
        generator = torch.Generator("cpu").manual_seed(seed)
        primals, tangents = case.draw(generator, dtype)
        out_dtype = case.output_dtype or next(iter(primals.values())).dtype
        cotangents = tuple(
            torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(out_dtype)
            for shape in case.outputs
        )
        tangent_cotangents = None
        if differentiable and tangents:
            rows = next(iter(tangents.values())).shape[0] if case.tangent_rows is not None else None
            tangent_cotangents = tuple(
                torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(out_dtype)
                for shape in (
                    (min(rows, shape[0]), *shape[1:]) if rows is not None else shape for shape in case.outputs
                )
            )
        p = cls(case, dtype, seed, primals, tangents, cotangents, {}, definition, tangent_cotangents)
        try:
            there = p.to(device)
            return replace(there, exact=there.evaluate(definition, dtype=torch.float64))
        except torch.OutOfMemoryError:  # fp64 may not fit a small GPU
            return replace(p, exact=p.evaluate(definition, dtype=torch.float64)).to(device)

    def to(self, device: torch.device) -> Problem:
        def move(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: x.to(device) for name, x in tensors.items()}

        return replace(
            self,
            primals=move(self.primals),
            tangents=move(self.tangents),
            cotangents=tuple(c.to(device) for c in self.cotangents),
            exact=move(self.exact),
            tangent_cotangents=(
                None
                if self.tangent_cotangents is None
                else tuple(c.to(device) for c in self.tangent_cotangents)
            ),
        )

    def evaluate(
        self, backend: str | None, *, tangents: bool = True, dtype: torch.dtype | None = None
    ) -> Results:
        """Returns the results of a backend, with the tangents or without."""
        return evaluate(
            *(self.case, self.primals, self.tangents if tangents else {}, self.cotangents, backend, dtype),
            self.tangent_cotangents,
        )

    def check(self, results: Results, *, tangents: bool = True, draws: int = 8) -> None:
        """Checks every result against the error rule. `draws`: of the yardsticks; one is the strictest."""
        faults = self.faults(results, tangents=tangents, draws=draws)
        assert not faults, "\n".join(faults)

    def faults(self, results: Results, *, tangents: bool = True, draws: int = 8) -> list[str]:
        """Returns what is wrong with the results, a line for each that breaks the error rule."""
        expected = {name for name in self.exact if tangents or not name.startswith("tangent")}
        if self.definition == PLAIN:  # torch.func.jvp returns structural zeros too
            expected = {name for name in expected if name in results or self.exact[name].any()}
        missing = expected ^ set(results)
        if missing:
            return [f"{self.case}: results that only one side has: {sorted(missing)}"]
        device = next(iter(self.exact.values())).device
        differentiable = self.tangent_cotangents is not None
        pytorch = yardsticks(self.case, self.dtype, self.seed, draws, device, self.definition, differentiable)
        found = []
        for name, got in results.items():
            argument = self.case.inputs.get(name.removeprefix("gradient of ").removeprefix("tangent of "))
            rounded = self.dtype if argument and argument.rounded else None
            try:
                check(f"{self.case}, {name}", got, self.exact[name], pytorch[name], rounded)
            except AssertionError as error:
                found.append(str(error))
        return found


def problem(
    case: Case,
    dtype: torch.dtype,
    seed: int = 0,
    definition: str = "reference",
    differentiable: bool = False,
) -> Problem:
    """Returns the case with data of `dtype` and its exact results, on PyTorch's default device.

    Args:
        definition: of the exact results, "reference" or `PLAIN`.
        differentiable: its gradients are those of outputs and tangents, for cotangents of both.
    """
    return _problem(case, dtype, seed, torch.get_default_device(), definition, differentiable)


@functools.lru_cache(maxsize=4)
def _problem(
    case: Case,
    dtype: torch.dtype,
    seed: int,
    device: torch.device,
    definition: str,
    differentiable: bool,
) -> Problem:
    return Problem.draw(case, dtype, seed, device, definition, differentiable)


@functools.cache
def yardsticks(
    case: Case,
    dtype: torch.dtype,
    seed: int = 0,
    draws: int = 8,
    device: torch.device = CPU,
    definition: str = "reference",
    differentiable: bool = False,
) -> dict[str, Yardstick]:
    """Returns PyTorch's largest errors in float32 over draws from `seed` on, for all results of the case."""
    drawn: list[dict[str, Yardstick]] = []
    for i in range(seed, seed + draws):
        # The first is the one being checked, and drawn already.
        draw = _problem if i == seed else Problem.draw
        p = draw(case, dtype, i, device, definition, differentiable)
        fp32 = p.evaluate(definition, dtype=torch.float32)
        drawn.append({name: Yardstick.of(x, p.exact[name]) for name, x in fp32.items()})
    return {name: Yardstick.largest([d[name] for d in drawn]) for name in drawn[0]}


def check_case(case: Case, dtype: torch.dtype, backend: str | None, seed: int = 0) -> None:
    """Runs a case on a backend and checks primal, tangent and primal gradients against the error rule."""
    p = problem(case, dtype, seed)
    p.check(p.evaluate(backend))

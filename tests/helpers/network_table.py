"""Makes docs/networks.md: `python -m tests.helpers.network_table [networks] [--modes ...] [--write]`.

Each network runs in each mode, in a process of its own: is what `imf_kernels.jvp` gives right, or refused?

- Right: the primal, its tangent and the gradients of a loss on the primal agree with float64, whose tangent
  is that of torch.func.jvp with attention in its plain form, of PyTorch's dual tensors where that raises, and
  of differences where both do. Under autocast float64 may be made to decide at ReLU and MaxPool2d as bfloat16
  does.
- Refused: a sentence of imf_kernels says what PyTorch forbids.
- "PyTorch: no": the same network without a derivative cannot run in that mode either, or bfloat16 does not
  resolve its tangent for torch.func.jvp either.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import json
import math
import os
import re
import select
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

import imf_kernels as ik
from tests.helpers.networks import NETWORKS, SOURCES, made
from tests.helpers.networks.case import Case

MODES = {
    "eager": "eager",
    "autocast": "autocast bf16",
    "compile": "compile",
    "fullgraph": "compile, fullgraph",
    "inductor": "Inductor",
    "checkpoint": "ik.checkpoint",
    "ddp": "DDP",
    "ddp_static": "DDP, static graph",
    "ddp_unused": "DDP, unused parameters",
    "fsdp": "FSDP2",
}
WITH_INDUCTOR = ("sit", "mf_dit", "unet", "u_vit", "edm2", "pmf", "dit", "flux", "unet_2d", "vit")
RIGHT, REFUSED, PYTORCH, WRONG, CRASH, LATE = "right", "refused", "PyTorch: no", "WRONG", "crash", "timeout"
PAGE = Path(__file__).parents[2] / "docs" / "networks.md"
SECONDS = 180  # a cell
INDUCTOR_SECONDS = 400


@dataclass
class Cell:
    """What a network gave in a mode, and why."""

    result: str
    why: str = ""
    seconds: float = 0.0


@dataclass
class Values:
    """A primal, its tangent and the gradients of the mean of the primal's squares, as one vector."""

    primal: Tensor
    tangent: Tensor | None
    gradient: Tensor


def relative(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def _gradient(module: nn.Module) -> Tensor:
    def of(p: Tensor) -> Tensor:
        if p.grad is None:
            return torch.zeros(p.shape, dtype=torch.float64)
        return (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).double()

    return torch.cat([of(p).flatten() for p in module.parameters() if p.requires_grad])


def _tangents(case: Case) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.full_like(x, float(x.abs().max()))
        if x.dim() == 1
        else torch.randn(x.shape, generator=generator)
        for x in case.moving
    )


class Truth:
    """A network in float64, and the errors of PyTorch itself."""

    def __init__(self, name: str) -> None:
        self.name, self.case = name, made(name)
        self.tangents = _tangents(self.case)
        self.by, self.exact = self._in_float64()

    def _in_float64(self, decisions: _Decisions | None = None) -> tuple[str, Values]:
        module = made(self.name).module.double()
        function = self.case.function(module, torch.float64)
        moving, tangents = (tuple(x.double() for x in xs) for xs in (self.case.moving, self.tangents))
        _seed()
        with decisions.replayed() if decisions else contextlib.nullcontext():
            y = function(*moving)
        y.square().mean().backward()
        with decisions.replayed() if decisions else contextlib.nullcontext():
            by, tangent = _tangent(function, moving, tangents)
        return by, Values(y.detach(), tangent.detach(), _gradient(module))

    def fresh(self) -> tuple[nn.Module, Callable[..., Any]]:
        module = made(self.name).module
        return module, self.case.function(module)

    @functools.cached_property
    def plain(self) -> tuple[float, float]:
        """The errors of the plain forward and its backward in float32."""
        return self._forward()

    @functools.cached_property
    def plain_autocast(self) -> tuple[float, float]:
        with torch.autocast("cpu", torch.bfloat16):
            return self._forward()

    def blocks_to_shard(self, module: nn.Module) -> list[nn.Module]:
        """None where the network reaches into its blocks from outside, which FSDP2 does not take."""
        return _blocks(module) if self.reaches_into_blocks is False else []

    @functools.cached_property
    def reaches_into_blocks(self) -> bool:
        self.__dict__["reaches_into_blocks"] = False
        try:
            _fsdp(self, False)
        except Exception:
            return True
        return False

    def _forward(self) -> tuple[float, float]:
        module, function = self.fresh()
        _seed()
        y = function(*self.case.moving)
        y.square().mean().backward()
        return relative(y.detach(), self.exact.primal), relative(_gradient(module), self.exact.gradient)

    @staticmethod
    def _errors(got: Values, exact: Values) -> dict[str, float]:
        return {
            "primal": relative(got.primal, exact.primal),
            "tangent": relative(got.tangent, exact.tangent),
            "gradient": relative(got.gradient, exact.gradient),
        }

    @functools.cached_property
    def func_jvp(self) -> float:
        """The error of torch.func.jvp's tangent in float32."""
        return self._of_func_jvp()

    @functools.cached_property
    def func_jvp_autocast(self) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            return self._of_func_jvp()

    def _of_func_jvp(self) -> float:
        _, function = self.fresh()
        try:
            tangent = _tangent(function, self.case.moving, self.tangents)[1]
        except (RuntimeError, NotImplementedError):
            return 0.0
        return relative(tangent.detach(), self.exact.tangent)

    def judged(self, got: Values, autocast: bool) -> Cell:
        """Errors are held against those that PyTorch itself makes."""
        errors = self._errors(got, self.exact)
        at_most = 0.05 if autocast else 1e-4
        wrong = {what: error for what, error in errors.items() if not error <= at_most}
        if not wrong:
            return Cell(RIGHT, ", ".join(f"{what} {error:.1e}" for what, error in errors.items()))
        if autocast:
            forward, backward = self.plain_autocast
            if not math.isfinite(backward):
                return Cell(PYTORCH, "NaN in the gradients without a derivative")
            allowed = {"primal": 3 * forward, "tangent": 3 * forward, "gradient": 3 * max(forward, backward)}
        else:
            forward, backward = self.plain
            allowed = {"primal": 4 * forward, "tangent": 4 * self.func_jvp, "gradient": 4 * backward}
        why = ", ".join(f"{what} {error:.1e}, allowed {allowed[what]:.1e}" for what, error in wrong.items())
        too_large = {what for what, error in wrong.items() if not error <= allowed[what]}
        if autocast and too_large and (decisions := _Decisions()).recorded_in(self):
            same = self._errors(decisions.values, self._in_float64(decisions)[1])
            if all(error <= at_most for error in same.values()):
                return Cell(RIGHT, f"{why}; where ReLU and MaxPool2d decide alike {max(same.values()):.1e}")
        if autocast and too_large == {"tangent"} and errors["tangent"] <= 1.5 * self.func_jvp_autocast:
            theirs = f"torch.func.jvp's error under autocast is {self.func_jvp_autocast:.1e}"
            return Cell(
                PYTORCH, f"bfloat16 does not resolve the tangent, {theirs}, ours {errors['tangent']:.1e}"
            )
        return Cell(WRONG if too_large else RIGHT, why)


class _Decisions:
    """Signs at ReLU and places at MaxPool2d, of a run in bfloat16: float64 may decide otherwise, and then has
    another tangent by as much as the tangent itself."""

    values: Values

    def __init__(self) -> None:
        self.made: list[Tensor] = []

    def recorded_in(self, truth: Truth) -> bool:
        relu, pool = nn.ReLU.forward, nn.MaxPool2d.forward

        def signs(module: nn.ReLU, x: Tensor) -> Tensor:
            self.made.append(x.detach() > 0)
            return relu(module, x)

        def places(module: nn.MaxPool2d, x: Tensor) -> Tensor:
            with mock.patch.object(module, "return_indices", True):
                self.made.append(pool(module, x.detach().float())[1])
            return pool(module, x)

        with mock.patch.object(nn.ReLU, "forward", signs), mock.patch.object(nn.MaxPool2d, "forward", places):
            self.values = _autocast(truth, True)
        del self.made[: len(self.made) // 2]  # of the first step
        return bool(self.made)

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        made = iter(self.made)

        def relu(module: nn.ReLU, x: Tensor) -> Tensor:
            return x * next(made)

        def pool(module: nn.MaxPool2d, x: Tensor) -> Tensor:
            places = next(made)
            return x.flatten(2).gather(2, places.flatten(2)).view(places.shape)

        with mock.patch.object(nn.ReLU, "forward", relu), mock.patch.object(nn.MaxPool2d, "forward", pool):
            yield


def _seed() -> None:
    torch.manual_seed(2)


def _tangent(function: Callable[..., Any], moving: Any, tangents: Any) -> tuple[str, Tensor]:
    """By which of PyTorch's ways it was found, and the tangent."""
    with (
        sdpa_kernel(SDPBackend.MATH),
        mock.patch.object(F, "group_norm", _group_norm),
        mock.patch.object(torch, "cdist", lambda x, y: (x.unsqueeze(-2) - y.unsqueeze(-3)).norm(dim=-1)),
    ):
        with contextlib.suppress(RuntimeError, NotImplementedError):
            _seed()
            return "torch.func.jvp", torch.func.jvp(function, moving, tangents)[1]
        with contextlib.suppress(RuntimeError, NotImplementedError), fwAD.dual_level():
            _seed()
            y = function(*map(fwAD.make_dual, moving, tangents))
            return "dual tensors", fwAD.unpack_dual(y).tangent
        if moving[0].dtype != torch.float64:
            raise NotImplementedError
        with torch.no_grad():
            found = []
            for step in (1e-5, -1e-5):
                _seed()
                found.append(function(*(x + step * x_dot for x, x_dot in zip(moving, tangents, strict=True))))
        return "differences", (found[0] - found[1]) / 2e-5


def _group_norm(x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    """Of plain arithmetic: in forward mode PyTorch's own raises for channels that lie last."""
    y = x.reshape(len(x), groups, -1)
    y = (y - y.mean(-1, keepdim=True)) * torch.rsqrt(y.var(-1, correction=0, keepdim=True) + eps)
    y, shape = y.reshape(x.shape), (1, -1, *(1,) * (x.dim() - 2))
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


# The modes: each makes the function and what has to be around it.


def _twice(module: nn.Module, function: Callable[..., Any], by: Callable[..., Any]) -> Values:
    """Two steps, as DDP finds at the second what it lacked at the first; values of the second."""
    for _ in range(2):
        module.zero_grad()
        _seed()
        y, y_dot = by(function)
        y.float().square().mean().backward()
    return Values(y.detach(), y_dot, _gradient(module))


def _jvp_of(truth: Truth) -> Callable[..., Any]:
    def by(function: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        y, y_dot = ik.jvp(function, truth.case.moving, truth.tangents)
        return y, y_dot.detach()

    return by


def _plainly(truth: Truth) -> Callable[..., Any]:
    return lambda function: (function(*truth.case.moving), None)


def _compiled(truth: Truth, derivative: bool, **options: Any) -> Values:
    torch._dynamo.reset()
    module, function = truth.fresh()

    def step(*moving: Tensor) -> Any:
        if derivative:
            return ik.jvp(function, moving, truth.tangents)
        return function(*moving), None

    step = torch.compile(step, **options)

    def by(function: Callable[..., Any]) -> Any:
        y, y_dot = step(*truth.case.moving)
        return y, y_dot if y_dot is None else y_dot.detach()

    return _twice(module, function, by)


def _eager(truth: Truth, derivative: bool) -> Values:
    return _twice(*truth.fresh(), (_jvp_of if derivative else _plainly)(truth))


def _autocast(truth: Truth, derivative: bool) -> Values:
    module, function = truth.fresh()
    by = (_jvp_of if derivative else _plainly)(truth)

    def under(function: Callable[..., Any]) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return by(function)

    return _twice(module, function, under)


def _checkpoint(truth: Truth, derivative: bool) -> Values:
    """By the network's own option where it is diffusers', else each member of a list of modules."""
    module, function = truth.fresh()
    if getattr(module, "_supports_gradient_checkpointing", False) and hasattr(
        module, "enable_gradient_checkpointing"
    ):
        module.enable_gradient_checkpointing(ik.checkpoint)
    else:
        for block in _blocks(module) or [module]:
            block.forward = functools.partial(ik.checkpoint, block.forward)
    return _twice(module, function, (_jvp_of if derivative else _plainly)(truth))


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists of modules, as far as they are called."""
    found = []
    for child in module.children():
        members = list(child) if isinstance(child, nn.ModuleList) else []
        called = members and all(type(m).forward is not nn.Module.forward for m in members)
        called = called and not any(isinstance(m, (nn.ModuleList, nn.Identity)) for m in members)
        found += members if called else _blocks(child)
    return found


def _ddp(truth: Truth, derivative: bool, **options: Any) -> Values:
    with _process_group():
        module, _ = truth.fresh()
        wrapped = DistributedDataParallel(module, **options)
        return _twice(module, truth.case.function(wrapped), (_jvp_of if derivative else _plainly)(truth))


def _fsdp(truth: Truth, derivative: bool) -> Values:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with _process_group():
        module, _ = truth.fresh()
        mesh = init_device_mesh("cpu", (1,))
        for block in truth.blocks_to_shard(module):
            fully_shard(block, mesh=mesh)
        module = fully_shard(module, mesh=mesh)
        return _twice(module, truth.case.function(module), (_jvp_of if derivative else _plainly)(truth))


@contextlib.contextmanager
def _process_group() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


_RUN: dict[str, Callable[..., Values]] = {
    "eager": _eager,
    "autocast": _autocast,
    "compile": functools.partial(_compiled, backend="aot_eager"),
    "fullgraph": functools.partial(_compiled, backend="aot_eager", fullgraph=True),
    "inductor": functools.partial(_compiled, backend="inductor", fullgraph=True),
    "checkpoint": _checkpoint,
    "ddp": _ddp,
    "ddp_static": functools.partial(_ddp, static_graph=True),
    "ddp_unused": functools.partial(_ddp, find_unused_parameters=True),
    "fsdp": _fsdp,
}

_truths: dict[str, Truth] = {}


def cell(name: str, mode: str) -> Cell:
    """Of the table. What PyTorch cannot do is asked only where imf_kernels gave nothing right."""
    start = time.perf_counter()
    warnings.simplefilter("ignore")
    truth = _truths.get(name) or Truth(name)
    _truths.clear()
    _truths[name] = truth
    found = _cell(truth, mode)
    if found.result not in (RIGHT, PYTORCH) and (reason := _without_derivative(truth, mode)):
        found = Cell(PYTORCH, reason)
    found.seconds = time.perf_counter() - start
    return found


def _cell(truth: Truth, mode: str) -> Cell:
    try:
        got = _RUN[mode](truth, True)
    except TimeoutError:
        raise
    except Exception as error:
        message = _first_line(error)
        refusal = re.search(r"imf_kernels\.\w+: [^{\n]*", str(error))
        if isinstance(error, (NotImplementedError, RuntimeError)) and refusal:
            return Cell(REFUSED, refusal.group())
        return Cell(CRASH, f"{type(error).__name__}: {message}{_place(error)}")
    return truth.judged(got, mode == "autocast")


def _without_derivative(truth: Truth, mode: str) -> str:
    try:
        got = _RUN[mode](truth, False)
        error = max(relative(got.primal, truth.exact.primal), relative(got.gradient, truth.exact.gradient))
        if mode != "autocast" and not error <= max(1e-4, *(4 * e for e in truth.plain)):
            return f"its own values without a derivative are wrong, relative error {error:.1e}"
    except TimeoutError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {_first_line(error)}"
    return ""


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300]


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "imf_kernels" in f.filename]
    last = [*ours[-1:], *frames[-1:]]
    return " at " + ", ".join(f"{Path(f.filename).name}:{f.lineno}" for f in last)


# The table: a process for a network, so that a crash or a long cell ends no other.


def _limit(mode: str) -> int:
    return INDUCTOR_SECONDS if mode == "inductor" else SECONDS


def _in_a_process(name: str, modes: list[str], report: Callable[[str, Cell], None]) -> None:
    while modes:
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(reading)
            try:
                _child(name, modes, writing)
            finally:
                os._exit(0)
        os.close(writing)
        done = 0
        with os.fdopen(reading) as lines:
            while select.select([lines], [], [], _limit(modes[done]) + 30)[0]:
                line = lines.readline()
                if not line:
                    break
                report(modes[done], Cell(**json.loads(line)))
                done += 1
                if done == len(modes):
                    break
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if done < len(modes):
            report(modes[done], Cell(CRASH, f"the process ended with status {status}"))
            done += 1
        modes = modes[done:]


def _child(name: str, modes: list[str], writing: int) -> None:
    def late(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    for mode in modes:
        signal.alarm(_limit(mode))
        try:
            found = cell(name, mode)
        except TimeoutError:
            found = Cell(LATE, f"more than {_limit(mode)} s", _limit(mode))
        except Exception as error:
            found = Cell(CRASH, f"of the table: {type(error).__name__}: {_first_line(error)}")
        signal.alarm(0)
        os.write(writing, (json.dumps(asdict(found)) + "\n").encode())


def versions() -> str:
    names = "torch", "diffusers", "transformers"
    return ", ".join(f"{name} {importlib.metadata.version(name).partition('+')[0]}" for name in names)


def page(results: dict[str, dict[str, Any]]) -> str:
    """The table of all results as Markdown."""
    notes: dict[str, int] = {}
    rows = []
    for source, functions in SOURCES.items():
        for name in (f.__name__ for f in functions):
            cells = [_entry(results.get(name, {}).get(mode), notes) for mode in MODES]
            rows.append(f"| {name} | {source} | {' | '.join(cells)} |")
    counts = {
        mode: Counter(modes[mode]["result"] for modes in results.values() if mode in modes) for mode in MODES
    }
    total = sum(counts.values(), Counter())
    share = total[RIGHT] / (total.total() or 1)
    kinds = [
        kind
        for kind in (RIGHT, REFUSED, PYTORCH, WRONG, CRASH, LATE)
        if total[kind] or kind in (WRONG, CRASH)
    ]
    by_kind = ", ".join(f"{total[kind]} {kind}" for kind in kinds)
    lines = [
        *_INTRODUCTION.format(networks=len(NETWORKS), versions=versions()).splitlines(),
        f"Of {total.total()} cells {share:.1%} are right: {by_kind}.",
        "",
        f"| | | {' | '.join(MODES.values())} |",
        f"| --- | --- |{' --- |' * len(MODES)}",
        *rows,
        *(f"| {kind} | | {' | '.join(str(counts[mode][kind]) for mode in MODES)} |" for kind in kinds),
        "",
        *(f"{number}. {text}" for text, number in notes.items()),
    ]
    return "\n".join(lines) + "\n"


_INTRODUCTION = """\
# Networks

What `imf_kernels.jvp` gives for {networks} networks, unmodified, tiny and with random weights, made by
`python -m tests.helpers.network_table` with {versions}.

- Right: the primal, its tangent and the gradients of a loss on the primal agree with float64.
- Refused: a sentence says what PyTorch forbids.
- PyTorch: no: the network cannot run in that mode without a derivative either, or bfloat16 resolves its
  tangent for `torch.func.jvp` as little.

Under autocast the truth may decide as bfloat16 does at ReLU and MaxPool2d, whose slopes jump; networks
whose tangent bfloat16 does not resolve at their usual size, or at times of up to 1, have others here. Numbers
stand for the notes below.

"""


def _entry(found: dict[str, Any] | None, notes: dict[str, int]) -> str:
    if found is None:
        return ""
    if found["result"] == RIGHT:
        return RIGHT
    text = found["why"].replace("|", "\\|").replace("<", "\\<").replace("*", "\\*").replace("_", "\\_")
    return f"{found['result']} [{notes.setdefault(text, len(notes) + 1)}]"


def recorded() -> dict[tuple[str, str], str]:
    """The results of the page, where it was made with these versions."""
    text = PAGE.read_text() if PAGE.exists() else ""
    if f"with {versions()}." not in text.replace("\n", " "):
        return {}
    found = {}
    for line in text.splitlines():
        name, _, *cells = (cell.strip() for cell in line.strip("|").split("|")) if "|" in line else ("", "")
        if name in NETWORKS:
            found |= {
                (name, mode): cell.partition(" [")[0] for mode, cell in zip(MODES, cells, strict=True) if cell
            }
    return found


def _warm_up() -> None:
    """What torch.compile imports when it is first called, once for all processes."""
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    step = torch.compile(lambda x: ik.jvp(layer, (x,), (x,)), backend="aot_eager")
    step(x)[0].sum().backward()
    torch._dynamo.reset()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="of networks; all unless told")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--results", type=Path, help="a file of results to add to")
    parser.add_argument("--write", action="store_true", help=f"{PAGE.name} of all results in the file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if {*arguments.modes} & {"compile", "fullgraph", "inductor"}:
        importlib.import_module("torch._inductor.compile_fx")
        _warm_up()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    results: dict[str, dict[str, Any]] = {}
    if arguments.results and arguments.results.exists():
        results = json.loads(arguments.results.read_text())
    for name in arguments.names or NETWORKS:
        modes = [m for m in arguments.modes if m != "inductor" or name in WITH_INDUCTOR]

        def report(mode: str, found: Cell, name: str = name) -> None:
            results.setdefault(name, {})[mode] = asdict(found)
            print(f"{name:22} {mode:10} {found.seconds:5.1f} s  {found.result:11} {found.why}", flush=True)
            if arguments.results:
                arguments.results.write_text(json.dumps(results, indent=1))

        if modes:
            _in_a_process(name, modes, report)
    if arguments.write:
        PAGE.write_text(page({name: results[name] for name in NETWORKS if name in results}))


if __name__ == "__main__":
    main()

"""Processes of a run or an evaluation, started by `torchrun`: their shares of the work and their agreement.

Hosts agree (on a signal, an error, a text) over gloo, which waits for no GPU.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from imf.program import StopSignals, UserError

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# If processes have errors of both classes, all raise the last; `together` relies on the order.
ERRORS: tuple[type[Exception], ...] = (OSError, UserError)


@dataclass(frozen=True)
class DistributedContext:
    """Process number `rank` of `count`, with its device; the first, of rank 0, writes all files.

    grouped: whether torchrun started them; a process alone needs no torch.distributed.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    grouped: bool = False

    @property
    def first(self) -> bool:
        return self.rank == 0

    def slice(self, size: int) -> range:
        """Returns this process's part of `size` rows: in order of rank, sizes differ by at most 1."""
        return range(self.rank * size // self.count, (self.rank + 1) * size // self.count)

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all processes on the first, an empty list on the others."""
        if not self.grouped:
            return [value]
        values = [None] * self.count if self.first else None
        dist.gather_object(value, values)
        return values or []

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """Returns the value of the process of rank `source`, on all."""
        if not self.grouped:
            return value
        values = [value]
        dist.broadcast_object_list(values, source, device=torch.device("cpu"))
        return values[0]

    def largest(self, *values: int) -> list[int]:
        """Returns the elementwise maximum over the processes."""
        found = torch.tensor(values)
        if self.grouped:
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return [int(x) for x in found]

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Copies tensors of the first process, one after the other, over those of the others."""
        for x in tensors if self.grouped else ():
            dist.broadcast(x, 0)

    def mean(self, x: Tensor) -> Tensor:
        """Averages x, fp32 on the device, over the processes in place; no host waits for it on a GPU."""
        if self.grouped:
            dist.all_reduce(x)
            x /= self.count
        return x

    @contextlib.contextmanager
    def together(self, signals: StopSignals | None = None) -> Iterator[None]:
        """Raises an `ERRORS` of one process in all, so that none waits for one that left.

        One collective carries errors and `signals`. Other exceptions, and these outside of it, end the
        process alone, and then torchrun ends the others. Nothing inside may wait for another process after
        a line that can fail in one alone.
        """
        own: Exception | None = None
        try:
            yield
        except ERRORS as caught:
            own = caught
        kind = 0 if own is None else 1 + isinstance(own, UserError)
        code = kind * self.count + self.rank if kind else 0
        code, number = self.largest(code, signals.pending if signals else 0)
        if signals:
            signals.agreed = number
        if not code:
            return
        kind, source = divmod(code, self.count)
        text = self.broadcast(str(own), source)
        error = own if own is not None and self.rank == source else ERRORS[kind - 1](text)
        error.agreed = True  # type: ignore[attr-defined]
        raise error


def agreed(error: BaseException | None) -> bool:
    """Whether all processes have this error, and so are at the same place."""
    return getattr(error, "agreed", False)


def sharded(network: nn.Module) -> TypeGuard[FSDPModule]:
    """Whether FSDP2 shards it: then every process must call it as often as the others."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # absent: nothing has been sharded
    return fsdp is not None and isinstance(network, fsdp.FSDPModule)


@contextlib.contextmanager
def initialized(
    device: str, timeout: timedelta = timedelta(days=7), cuda_graphs: bool = False
) -> Iterator[DistributedContext]:
    """Joins the processes that `torchrun` started; without it yields the context of a process alone.

    device: as `choose_device` takes it; "cuda" and "auto" mean one GPU per process.
    timeout: how long a process waits for another that lives; that one has died is seen at once.
    cuda_graphs: whether CUDA graphs are to hold collectives; they must be gone where this ends.
    Raises: UserError if only some of torchrun's variables are set, or GPUs are too few.
    """
    ranks, chosen = _ranks(), choose_device(device)
    if ranks is None:
        yield DistributedContext(device=chosen)
        return
    rank, count, local_rank = ranks
    if chosen.type == "cuda":
        chosen = _own_gpu(chosen, local_rank, count)
    if cuda_graphs:  # as PyTorch's notes on CUDA semantics ask; torchrun sets it to 1
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout=timeout)
    yield (context := DistributedContext(rank, count, chosen, grouped=True))
    # Not after an exception, which waiting for processes that have left would hide.
    context.largest(0)
    dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """Returns the device of that name, "auto" for a GPU if there is one; UserError if it cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with contextlib.suppress(RuntimeError):
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(
                f"--device {name}: PyTorch sees no GPU; it was built for CUDA {torch.version.cuda}"
            )
        if device.type in ("cpu", "cuda"):
            return device
    raise UserError(f"--device must be auto, cpu, cuda or cuda:<index>, got {name!r}")


def _ranks() -> tuple[int, int, int] | None:
    """Returns torchrun's rank, number of processes and rank on this machine; None without torchrun."""
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if not found.keys() & set(VARIABLES[:3]):  # clusters set MASTER_ADDR and MASTER_PORT for every job
        return None
    shown = ", ".join(f"{name}={value}" for name, value in found.items())
    if missing := [name for name in VARIABLES if name not in found]:
        raise UserError(
            f"the environment has {shown} but not {', '.join(missing)}: start with torchrun, which sets "
            f"all of them, or unset these for one process alone"
        )
    numbers = [found[name] for name in VARIABLES[:3]]
    if not all(number.isdecimal() for number in numbers) or not int(numbers[0]) < int(numbers[1]):
        raise UserError(
            f"the environment must have numbers as RANK, WORLD_SIZE and LOCAL_RANK, RANK below WORLD_SIZE; "
            f"got {shown}"
        )
    return int(numbers[0]), int(numbers[1]), int(numbers[2])


def _own_gpu(device: torch.device, local_rank: int, count: int) -> torch.device:
    if device.index is not None and count > 1:
        raise UserError(f"--device must be cuda with {count} processes, which take a GPU each, got {device}")
    if local_rank >= (found := torch.cuda.device_count()):
        raise UserError(
            f"process {local_rank} of this machine has no GPU of its own: PyTorch sees {found}; "
            f"start torchrun with --nproc-per-node {found}, or with --device cpu"
        )
    own = torch.device("cuda", local_rank if device.index is None else device.index)
    torch.cuda.set_device(own)
    return own

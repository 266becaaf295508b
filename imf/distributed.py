"""The processes of a run or an evaluation: which part is whose, and what they agree on.

`torchrun` starts the processes and tells each its number by environment variables. What the hosts have to
agree on (a signal, an error, a text) goes over gloo, from host to host, and waits for no GPU.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from imf.program import UserError

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# What ends a run with a message. Where processes have several, the last in this order is everyone's.
ERRORS: tuple[type[Exception], ...] = (OSError, UserError)


@dataclass(frozen=True)
class Processes:
    """One of `count` processes, number `rank`, with its device; a process alone needs no torch.distributed.

    The first one, of rank 0, writes all files.  grouped: whether torchrun started them.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    grouped: bool = False

    @property
    def first(self) -> bool:
        return self.rank == 0

    def slice(self, size: int) -> range:
        """This one's part of `size` things: in the order of the ranks, without gaps, as equal as can be."""
        return range(self.rank * size // self.count, (self.rank + 1) * size // self.count)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes on the first, an empty list on the others."""
        if not self.grouped:
            return [value]
        values = [None] * self.count if self.first else None
        dist.gather_object(value, values)
        return values or []

    def from_first(self, value: Any) -> Any:
        """The first process's value, on all."""
        if not self.grouped:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def largest(self, value: int) -> int:
        """The largest of the processes' values, in each."""
        if not self.grouped:
            return value
        found = torch.tensor([value])
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the processes of x, fp32 on the device, in each; no host waits for it on a GPU."""
        if self.grouped:
            dist.all_reduce(x)
            x /= self.count
        return x

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Within it one of the `ERRORS` in one process is raised in all: none waits for one that left.

        Other exceptions, and these outside of it, end the process alone, upon which torchrun ends the others.
        Nothing inside may wait for another process after a line that can fail in one alone.
        """
        own: Exception | None = None
        try:
            yield
        except ERRORS as caught:
            own = caught
        kind = next((1 + i for i, kind in enumerate(ERRORS) if isinstance(own, kind)), 0)
        found = self.largest(kind * self.count + self.rank if kind else 0)
        if not found:
            return
        kind, source = divmod(found, self.count)
        text = self._from(source, str(own))
        error = own if own is not None and self.rank == source else ERRORS[kind - 1](text)
        error.agreed = True  # type: ignore[attr-defined]
        raise error

    def _from(self, source: int, text: str) -> str:
        if not self.grouped:
            return text
        values = [text]
        dist.broadcast_object_list(values, source, device=torch.device("cpu"))
        return values[0]


def sharded(network: nn.Module) -> TypeGuard[FSDPModule]:
    """Whether FSDP2 shards it: then every process must call it as often as the others."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # absent: nothing has been sharded
    return fsdp is not None and isinstance(network, fsdp.FSDPModule)


def agreed(error: BaseException | None) -> bool:
    """Whether all processes have this error, and so are at the same place."""
    return getattr(error, "agreed", False)


@contextlib.contextmanager
def joined(device: str, timeout: timedelta = timedelta(days=7)) -> Iterator[Processes]:
    """Within it the processes that `torchrun` started know each other; alone without it.

    device: as `imf.training.log.choose_device` takes it; "cuda" and "auto" mean one GPU a process.
    timeout: how long a process waits for another that lives; that one has died is seen at once.
    Raises: UserError if only some of torchrun's variables are set, or GPUs are too few.
    """
    place = _place()
    chosen = choose_device(device)
    if place is None:
        yield Processes(device=chosen)
        return
    rank, count, local_rank = place
    if chosen.type == "cuda":
        chosen = _own_gpu(chosen, local_rank, count)
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout=timeout)
    who = Processes(rank, count, chosen, grouped=True)
    yield who
    # Not after an exception, which waiting for processes that have left would hide.
    who.largest(0)
    dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """The device of that name, "auto" for a GPU where there is one; UserError if it cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device must be auto, cpu, cuda or cuda:<index>, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:<index>, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: PyTorch sees no GPU; it was built for CUDA {torch.version.cuda}")
    return device


def _place() -> tuple[int, int, int] | None:
    """Rank, number of processes and rank on this machine, as torchrun says; None where it says nothing."""
    # MASTER_ADDR and MASTER_PORT alone, which clusters set for every job, ask for nothing.
    if not any(name in os.environ for name in VARIABLES[:3]):
        return None
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    shown = ", ".join(f"{name}={value}" for name, value in found.items())
    missing = [name for name in VARIABLES if name not in found]
    if missing:
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
    rank, count, local_rank = map(int, numbers)
    return rank, count, local_rank


def _own_gpu(device: torch.device, local_rank: int, count: int) -> torch.device:
    if device.index is not None and count > 1:
        raise UserError(f"--device must be cuda with {count} processes, which take a GPU each, got {device}")
    found = torch.cuda.device_count()
    if local_rank >= found:
        raise UserError(
            f"process {local_rank} of this machine has no GPU of its own: PyTorch sees {found}; "
            f"start torchrun with --nproc-per-node {found}, or with --device cpu"
        )
    own = torch.device("cuda", local_rank if device.index is None else device.index)
    torch.cuda.set_device(own)
    return own

"""Several processes that train one network: who takes part, and what they agree on.

`torchrun` starts the processes and tells each its number by environment variables. What the hosts have to agree
on (a signal, an error, a text) goes over gloo, from host to host, and waits for no GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from imf.checkpoint import CheckpointError
from imf.run import TrainingError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_KINDS: tuple[type[Exception], ...] = (OSError, CheckpointError, TrainingError, Exception)
_TEXT = 2000  # bytes of an error's text that reach the other processes


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them; one process alone needs nothing of torch.distributed.

    rank: its number, from 0; the first one writes all files.  count: how many there are.
    local_rank: its number on its machine, which is that of its GPU.  grouped: whether torchrun started it.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    grouped: bool = False

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, value: Any) -> Any:
        """The first process's value, of JSON's types, in every process."""
        if not self.grouped:
            return value
        text = torch.tensor(list(json.dumps(value if self.first else None).encode()), dtype=torch.uint8)
        size = torch.tensor([len(text)])
        dist.broadcast(size, 0)
        text = text if self.first else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(text, 0)
        return json.loads(bytes(text.tolist()))

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
        """Within it an exception in one process is raised in all, of the same kind: none waits for one that
        has left. Nothing inside may wait for other processes after a line that can fail in one alone."""
        error = None
        try:
            yield
        except _KINDS as own:
            error = own
        if not self.grouped:
            if error is not None:
                raise error
            return
        kind = next((len(_KINDS) - i for i, k in enumerate(_KINDS) if isinstance(error, k)), 0)
        worst = self.largest(kind * self.count + (self.count - 1 - self.rank) if kind else 0)
        if not worst:
            return
        kind, place = divmod(worst, self.count)
        source = self.count - 1 - place
        text = torch.zeros(_TEXT, dtype=torch.uint8)
        if self.rank == source:
            encoded = str(error).encode()[:_TEXT]
            text[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
        dist.broadcast(text, source)
        if self.rank == source and error is not None:
            raise error
        said = bytes(text.tolist()).rstrip(b"\0").decode(errors="replace")
        raise _KINDS[len(_KINDS) - kind](said) from error


@contextlib.contextmanager
def processes(device: str, environment: Mapping[str, str] | None = None) -> Iterator[Processes]:
    """The processes that torchrun started, connected while the context lasts; elsewhere this process alone.

    device: that of --device; "auto" and "cuda" give each process the GPU of its number on its machine.
    Raises: TrainingError if only some of torchrun's variables are set, or GPUs are too few.
    """
    variables = os.environ if environment is None else environment
    # MASTER_ADDR and MASTER_PORT alone, which clusters set for every job, ask for nothing.
    if not any(name in variables for name in VARIABLES[:3]):
        yield Processes()
        return
    missing = [name for name in VARIABLES if name not in variables]
    if missing:
        found = ", ".join(f"{name}={variables[name]}" for name in VARIABLES if name in variables)
        raise TrainingError(
            f"the environment has {found} but not {', '.join(missing)}: start with torchrun, which sets all of "
            f"them, or unset what is there to train in one process"
        )
    numbers = [variables[name] for name in VARIABLES[:3]]
    if not all(number.isdecimal() for number in numbers) or not int(numbers[0]) < int(numbers[1]):
        raise TrainingError(
            f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers with RANK < WORLD_SIZE, got {', '.join(numbers)}"
        )
    rank, count, local_rank = map(int, numbers)
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        if count > 1 and ":" in device:
            raise TrainingError(
                f"--device must be cuda with several processes, each of which takes a GPU, got {device}"
            )
        if local_rank >= torch.cuda.device_count():
            raise TrainingError(
                f"process {local_rank} of this machine has no GPU, PyTorch sees {torch.cuda.device_count()}: "
                f"start torchrun with --nproc-per-node {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    yield Processes(rank, count, local_rank, grouped=True)
    # Not after an exception: the others may be gone, and waiting for them would hide it.
    dist.barrier(group=None) if not on_gpu else dist.all_reduce(torch.zeros(1))
    dist.destroy_process_group()

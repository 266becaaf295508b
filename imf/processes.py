"""The processes of an evaluation: which slice is whose, and how results come together on the first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from imf.run import choose_device


@dataclass(frozen=True)
class Processes:
    """One of `count` processes, number `rank`, with its device."""

    rank: int
    count: int
    device: torch.device

    def slice(self, size: int) -> range:
        """This one's part of `size` things: in the order of the ranks, without gaps, as equal as can be."""
        return range(self.rank * size // self.count, (self.rank + 1) * size // self.count)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes on the first, an empty list on the others."""
        if self.count == 1:
            return [value]
        values = [None] * self.count if self.rank == 0 else None
        dist.gather_object(value, values)
        return values or []

    def from_first(self, value: Any) -> Any:
        """The first process's value, on all."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Within it the processes that `torchrun` started know each other; alone without it.

    device: as `imf.run.choose_device` takes it; "cuda" and "auto" mean one GPU a process.
    What travels are sums and logits, from CPU to CPU, so gloo serves every device.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device)
    if count == 1:
        yield Processes(0, 1, chosen)
        return
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    # A process whose samples lie on the disk already may wait for one that makes them.
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield Processes(dist.get_rank(), count, chosen)
    finally:
        dist.destroy_process_group()

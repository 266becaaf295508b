"""The order in which training walks through a data set, and the batches of one process."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from imf.data.dataset import DataSet, row_seeds


def batch_indices(size: int, batch_size: int, *, seed: int, step: int) -> Tensor:
    """Rows of the batch of step `step`: a function of the arguments alone, so a resumed run needs no state.

    Every epoch walks through the `size` examples once, in an order of its own; a batch runs across the end of
    an epoch, so none is short and no example is left out.

    Returns: [batch_size] int64 on the CPU, values in 0 ... size - 1.
    Raises: ValueError unless size >= 1, batch_size >= 1, seed >= 0 and step >= 0.
    """
    for name, value, least in (
        ("size", size, 1),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
        ("step", step, 0),
    ):
        if value < least:
            raise ValueError(f"batch_indices: {name} must be at least {least}, got {value}")
    first, last = step * batch_size, (step + 1) * batch_size  # positions in the endless walk
    epochs = range(first // size, (last - 1) // size + 1)
    walk = np.concatenate([_epoch_order(size, seed, epoch) for epoch in epochs])
    start = first - epochs[0] * size
    return torch.from_numpy(walk[start : start + batch_size].copy())


class Batches:
    """Batches of a process from micro step `first` on, without end.

    A micro step's global batch is `batch_indices(len(dataset), batch_size, seed=seed, step=micro_step)`, and
    process p of P takes its rows [p b / P, (p + 1) b / P). What is random in a row depends on (seed, micro
    step, place in the global batch): all processes together see what one process would see, bit for bit.

    A context manager, whose end stops the thread, and an iterator of x [b / P, C, H, W] fp32 and y [b / P]
    int64 on `device`; on CUDA they come through pinned memory and the copy does not block. What fetching
    raises is raised by the `next` that would have given that batch.

    batch_size: rows of a global batch, a multiple of `processes`.
    ahead: how many batches a thread makes while the network works, 0 for no thread; by default 3 for a GPU.
    On a CPU, whose cores the network keeps busy, the thread's own OpenMP threads would slow it by a third.
    Raises: ValueError, naming it, for an argument out of range.
    """

    def __init__(
        self,
        dataset: DataSet,
        *,
        batch_size: int,
        seed: int,
        first: int = 0,
        process: int = 0,
        processes: int = 1,
        device: torch.device | str = "cpu",
        ahead: int | None = None,
    ) -> None:
        if processes < 1 or not 0 <= process < processes:
            raise ValueError(
                f"Batches: process must be in [0, processes), got process {process} of {processes}"
            )
        if batch_size < 1 or batch_size % processes:
            raise ValueError(
                f"Batches: batch_size must be a positive multiple of the {processes} processes, "
                f"got {batch_size}"
            )
        if min(first, seed, ahead or 0) < 0:
            raise ValueError(
                f"Batches: first, seed and ahead must be at least 0, got {first}, {seed} and {ahead}"
            )
        if len(dataset) < 1:
            raise ValueError("Batches: dataset must have a row, got an empty one")
        self._dataset, self._batch_size, self._seed = dataset, batch_size, seed
        self._part = slice(process * batch_size // processes, (process + 1) * batch_size // processes)
        self._device = torch.device(device)
        self._next = first
        self._pending: deque[Future[tuple[Tensor, Tensor]]] = deque()
        self._ahead = (0 if self._device.type == "cpu" else 3) if ahead is None else ahead
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="imf-data") if self._ahead else None

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._pending.clear()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self._thread is None:
            self._next += 1
            return self._make(self._next - 1)
        while len(self._pending) <= self._ahead:
            self._pending.append(self._thread.submit(self._make, self._next))
            self._next += 1
        x, y = self._pending.popleft().result()
        return x.to(self._device, non_blocking=True), y.to(self._device, non_blocking=True)

    def _make(self, micro_step: int) -> tuple[Tensor, Tensor]:
        rows = batch_indices(len(self._dataset), self._batch_size, seed=self._seed, step=micro_step)
        generator = torch.Generator().manual_seed(_key(self._seed, micro_step))
        row_seeds(generator, self._part.start)  # those of the processes before this one
        x, y = self._dataset.fetch(rows[self._part], generator)
        return (x.pin_memory(), y.pin_memory()) if self._device.type == "cuda" else (x, y)


@functools.lru_cache(maxsize=2)  # a batch that runs across an epoch's end needs two
def _epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    # The third word keeps this stream apart from any other that is keyed by (seed, number).
    return np.random.default_rng((seed, epoch, 0x0DA7A)).permutation(size).astype(np.int64)


def _key(seed: int, micro_step: int) -> int:
    return int(np.random.SeedSequence((seed, micro_step, 0x1A7E47)).generate_state(1)[0])

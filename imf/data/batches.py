"""What a data set provides, the order in which training walks through it, and the batches of one process."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from imf import random

T = TypeVar("T")
R = TypeVar("R")


class DataSet(Protocol):
    """Labelled images or latents, in any order by row number.

    shape: (C, H, W) of a row as the network sees it.
    num_classes: labels are 0 ... num_classes - 1.  class_names: a name per label.
    autoencoder: `imf.evaluation.vae.digest` of the one that made the latents; "" where there are none.
    """

    @property
    def autoencoder(self) -> str: ...

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def num_classes(self) -> int: ...

    @property
    def class_names(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def fetch(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns data x [B, C, H, W] fp32, normalised, and labels y [B] int64, of rows [B] int64.

        Randomness in x[i] (a latent is a sample of its posterior) depends on the i-th of the `row_seeds` of
        the CPU `generator`; nothing else is drawn from it, so part of a batch can be fetched alone.
        """
        ...


def row_seeds(generator: torch.Generator, count: int) -> Tensor:
    """Draws the next `count` seeds of a CPU generator, [count] int64; n, then m equal n + m at once."""
    return torch.randint(2**63 - 1, (count,), generator=generator)


def batch_indices(size: int, batch_size: int, *, seed: int, step: int) -> Tensor:
    """Returns the rows of step `step`'s batch, a function of the arguments alone: resuming needs no state.

    Every epoch walks through the `size` examples once, in an order of its own; a batch runs across the end of
    an epoch, so none is short and no example is left out.

    Returns: [batch_size] int64 on the CPU, values in 0 ... size - 1.
    Raises: ValueError unless size >= 1, batch_size >= 1, seed >= 0 and step >= 0.
    """
    arguments = {"size": (size, 1), "batch_size": (batch_size, 1), "seed": (seed, 0), "step": (step, 0)}
    for name, (value, least) in arguments.items():
        if value < least:
            raise ValueError(f"batch_indices: {name} must be at least {least}, got {value}")
    first, last = step * batch_size, (step + 1) * batch_size  # positions in the endless walk
    epochs = range(first // size, (last - 1) // size + 1)
    walk = np.concatenate([_epoch_order(size, seed, epoch) for epoch in epochs])
    start = first - epochs[0] * size
    return torch.from_numpy(walk[start : start + batch_size].copy())


def prefetch(
    function: Callable[[T], R], items: Iterable[T], *, workers: int, ahead: int
) -> Generator[R, None, None]:
    """Yields function(item) of each item, in order, computed by threads up to `ahead` items before its use.

    ahead: 0 for no thread. Closing the generator ends the threads.
    """
    if not ahead:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="imf-data")
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class Batches:
    """Endless batches of a process, from micro step `first` on.

    A micro step's global batch is `batch_indices(len(dataset), batch_size, seed=seed, step=micro_step)`, and
    process p of P takes its rows [p b / P, (p + 1) b / P). Randomness in a row depends on (seed, micro step,
    place in the global batch): all processes together see the data of a single one, bit for bit.

    A context manager, whose end stops the thread, and an iterator of x [b / P, C, H, W] fp32 and y [b / P]
    int64 on `device`; on CUDA from pinned memory, without blocking. `next` raises what fetching raises.

    batch_size: rows of a global batch, a multiple of `processes`.
    ahead: how many batches a thread fetches in advance, 0 for no thread; by default 3 for a GPU. On a CPU the
    thread's own OpenMP threads would slow the network by a third.
    flip: flip each image left to right with probability 1/2, a function of the same three.
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
        flip: bool = False,
    ) -> None:
        if not 0 <= process < processes:
            wrong = f"process must be in [0, processes), got process {process} of {processes}"
        elif batch_size < 1 or batch_size % processes:
            wrong = f"batch_size must be a positive multiple of the {processes} processes, got {batch_size}"
        elif min(first, seed, ahead or 0) < 0:
            wrong = f"first, seed and ahead must be at least 0, got {first}, {seed} and {ahead}"
        else:
            wrong = "" if len(dataset) else "dataset must have a row, got an empty one"
        if wrong:
            raise ValueError(f"Batches: {wrong}")
        self._dataset, self._batch_size, self._seed = dataset, batch_size, seed
        self._part = slice(process * batch_size // processes, (process + 1) * batch_size // processes)
        self._device, self._flip = torch.device(device), flip
        if ahead is None:
            ahead = 0 if self._device.type == "cpu" else 3
        self._batches = prefetch(self._make, itertools.count(first), workers=1, ahead=ahead)

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self._batches.close()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        x, y = next(self._batches)
        return x.to(self._device, non_blocking=True), y.to(self._device, non_blocking=True)

    def _make(self, micro_step: int) -> tuple[Tensor, Tensor]:
        rows = batch_indices(len(self._dataset), self._batch_size, seed=self._seed, step=micro_step)
        generator = random.generator(self._seed, "rows", micro_step)
        row_seeds(generator, self._part.start)  # skip those of the processes before this one
        x, y = self._dataset.fetch(rows[self._part], generator)
        if self._flip:
            coins = torch.rand(self._batch_size, generator=random.generator(self._seed, "flips", micro_step))
            x = torch.where((coins[self._part] < 0.5)[:, None, None, None], x.flip(3), x)
        return (x.pin_memory(), y.pin_memory()) if self._device.type == "cuda" else (x, y)


@functools.lru_cache(maxsize=2)  # a batch that runs across an epoch's end needs two
def _epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    return torch.randperm(size, generator=random.generator(seed, "order", epoch)).numpy()

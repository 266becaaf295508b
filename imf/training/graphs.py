"""A training step as CUDA graphs: the host replays what the device does, and no longer prepares it.

A graph is of fixed shapes, addresses and numbers. So what changes from step to step is copied into tensors
that stay, and there is a graph for each number of rows that need v_u, of which there are four.

Source: "Accelerating PyTorch with CUDA Graphs" and the notes on CUDA semantics in PyTorch's documentation.
Not yet run on a GPU: tests replay the same steps from a recording of PyTorch's operators on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from imf.objective.draws import Draws, Guidance, StepDraws, repeated, sizes_of_v_u

# What a graph is made of: (x, y, the prepared draws, learning rate, decay of the average) → terms.
Update = Callable[[Tensor, Tensor, StepDraws, Any, Any], Tensor]


class CudaGraph:
    """A call captured on a GPU, not yet run: `replay` does that.

    stream: to capture on; PyTorch's own stream for captures unless given.
    beside: a graph whose memory this one shares; the two must never run at the same time.
    """

    def __init__(
        self,
        call: Callable[[], Tensor],
        device: torch.device,
        stream: torch.cuda.Stream | None = None,
        beside: CudaGraph | None = None,
    ) -> None:
        self.graph = torch.cuda.CUDAGraph()
        # A pool is gone with the last of its graphs, so it is asked of a graph: a handle would outlive it.
        pool = None if beside is None else beside.graph.pool()
        # Other threads, that of the batches, go on allocating: only this thread's calls are watched.
        with (
            torch.cuda.device(device),
            torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            self.result = call()

    def replay(self) -> Tensor:
        """What the call returned, at a place that the next replay writes to."""
        self.graph.replay()
        return self.result


class StepGraphs:
    """Calls `update` by graphs, from the fifth step on; until then as it is, on each size in turn.

    Those first steps compile kernels and make what is made once (the optimizer's state, handles of
    libraries), which no graph can hold. A step that needs v_u on fewer rows than a size runs at that size
    exactly: rows are repeated. So no later step has to run without a graph.

    update: changes weights, optimizer and average in place, waits for nothing, reads nothing else that
        changes.
    """

    def __init__(
        self, update: Update, batch: int, device: torch.device, guidance: Guidance | None = None
    ) -> None:
        self.update = update
        self.device, self.guidance = device, guidance
        self.waiting = sizes_of_v_u(batch)[::-1]  # sizes not yet met, the largest first
        self.warm: list[int] = []
        self.inputs: dict[int, tuple[Tensor, Tensor, StepDraws]] = {}
        self.recorded: dict[int, CudaGraph] = {}
        self.rates = torch.zeros((), device=device), torch.zeros((), device=device)
        # A single one: PyTorch's allocator reuses memory freed on a stream on that stream only.
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, x: Tensor, y: Tensor, draws: Draws | StepDraws, rate: float, decay: float) -> Tensor:
        step = draws if isinstance(draws, StepDraws) else StepDraws.of(draws, self.guidance, self.device)
        needed = len(step.u_rows)
        for scalar, value in zip(self.rates, (rate, decay), strict=True):
            scalar.fill_(value)
        if self.waiting:
            size = self.waiting.pop(0)
            size = size if size >= needed else min(n for n in self.warm if n >= needed)
            self.warm.append(size)
            return self._outside(x, y, _sized(step, size))
        size = min(n for n in self.warm if n >= needed)
        step = _sized(step, size)
        if size not in self.recorded:
            own = x.clone(), y.clone(), _copy(step)
            self.inputs[size] = own
            first = next(iter(self.recorded.values()), None)
            self.recorded[size] = CudaGraph(
                lambda: self.update(*own, *self.rates), self.device, self.stream, beside=first
            )
        own_x, own_y, own_step = self.inputs[size]
        for mine, new in zip((own_x, own_y, *own_step.tensors()), (x, y, *step.tensors()), strict=True):
            mine.copy_(new, non_blocking=True)
        return self.recorded[size].replay().clone()

    def _outside(self, x: Tensor, y: Tensor, step: StepDraws) -> Tensor:
        """Runs the step eagerly, on the stream that later captures it."""
        if self.stream is None:
            return self.update(x, y, step, *self.rates)
        main = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            result = self.update(x, y, step, *self.rates)
        main.wait_stream(self.stream)
        return result


def _sized(step: StepDraws, size: int) -> StepDraws:
    return replace(step, u_rows=repeated(step.u_rows, size))


def _copy(step: StepDraws) -> StepDraws:
    changes: dict[str, Any] = {name: x.clone() for name, x in vars(step).items() if isinstance(x, Tensor)}
    draws: dict[str, Any] = {name: x.clone() for name, x in vars(step.draws).items() if isinstance(x, Tensor)}
    return replace(step, draws=replace(step.draws, **draws), **changes)

"""Training steps as CUDA graphs, so that the host replays a step instead of launching each kernel.

A graph has fixed shapes, addresses and numbers. So inputs are copied into tensors that stay, and there is one
graph for each size of the evaluation of v_u, see `sizes_of_v_u`. With DDP it holds the collectives too. All
processes capture the same size at the same step, as NCCL may exchange addresses of buffers meanwhile.

Source: "Accelerating PyTorch with CUDA Graphs" and the notes on CUDA semantics in PyTorch's documentation.
Graphs of one process have run on a GPU (docs/gpu.md), those with DDP not yet: tests replay the same steps
from a recording of PyTorch's operators on the CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from imf.objective.draws import Draws, Guidance, StepDraws, repeated, sizes_of_v_u

# The captured call: (x, y, draws on the device, learning rate, share of the weights in the average) → terms.
Update = Callable[[Tensor, Tensor, StepDraws, Any, Any], Tensor]

# Eager steps that DDP needs before a capture: it times the first ten.
WARMUP_OF_DDP = 11


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Runs what is inside on a stream, ordered as on the current one; `None` means the current one."""
    if stream is None:
        yield
        return
    main = torch.cuda.current_stream(stream.device)
    stream.wait_stream(main)
    with torch.cuda.stream(stream):
        yield
    main.wait_stream(stream)


class CudaGraph:
    """Call captured on a GPU, not yet run: `replay` runs it.

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
        self.call = call  # what it refers to is read at its address: it must live as long as the graph
        # A pool ends with the last of its graphs, so a graph is asked for it: a handle would outlive it.
        pool = None if beside is None else beside.graph.pool()
        # The thread of the batches allocates meanwhile: only this thread's calls are checked.
        with (
            torch.cuda.device(device),
            torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            self.result = call()

    def replay(self) -> Tensor:
        """Returns the call's result, in memory that the next replay overwrites."""
        self.graph.replay()
        return self.result


class StepGraphs:
    """Replays `update` as CUDA graphs, after one eager step at each size.

    Those eager steps compile kernels and make what no graph can hold (the optimizer's state, handles of
    libraries). A step that needs v_u on fewer rows than a size repeats rows to fill it.

    update: changes weights, optimizer and average in place, never synchronises, reads nothing else that
        changes.
    warmup: eager steps, at least.
    stream: to capture on; its own unless given.
    """

    def __init__(
        self,
        update: Update,
        batch: int,
        device: torch.device,
        guidance: Guidance | None = None,
        warmup: int = 0,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.update, self.device, self.guidance = update, device, guidance
        self.waiting = sizes_of_v_u(batch)[::-1]  # sizes not yet met, the largest first
        self.warm: list[int] = []
        self.eager_steps = max(warmup, len(self.waiting))  # that are left
        self.inputs: dict[int, tuple[Tensor, Tensor, StepDraws]] = {}
        self.recorded: dict[int, CudaGraph] = {}
        self.rates = torch.zeros((), device=device), torch.zeros((), device=device)
        # A single one: PyTorch's allocator reuses memory freed on a stream on that stream only.
        self.stream = stream or (torch.cuda.Stream(device) if device.type == "cuda" else None)

    def __call__(
        self, x: Tensor, y: Tensor, draws: Draws | StepDraws, rate: float, share: float, at_least: int = 0
    ) -> Tensor:
        """Returns the terms of a step.  at_least: rows on which other processes need v_u."""
        step = draws if isinstance(draws, StepDraws) else StepDraws.of(draws, self.guidance, self.device)
        needed = max(len(step.u_rows), at_least)
        for scalar, value in zip(self.rates, (rate, share), strict=True):
            scalar.fill_(value)
        if self.waiting and (size := self.waiting.pop(0)) >= needed:
            self.warm.append(size)
        else:
            size = min(n for n in self.warm if n >= needed)
        step = replace(step, u_rows=repeated(step.u_rows, size))
        if self.eager_steps:
            self.eager_steps -= 1
            with on_stream(self.stream):
                return self.update(x, y, step, *self.rates)
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


def _copy(step: StepDraws) -> StepDraws:
    def clones(values: StepDraws | Draws) -> dict[str, Any]:
        return {name: x.clone() for name, x in vars(values).items() if isinstance(x, Tensor)}

    return replace(step, draws=replace(step.draws, **clones(step.draws)), **clones(step))

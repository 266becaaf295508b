"""Training steps as CUDA graphs, so that the host replays a step instead of launching each kernel.

A graph has fixed shapes, addresses and numbers. So inputs are copied into tensors that stay, and there is one
graph for each size of the evaluation of v_u, see `sizes_of_v_u`. With DDP it holds the collectives too. All
processes capture the same size at the same step, as NCCL may exchange addresses of buffers meanwhile.

A graph holds one micro-step: forward and backward, and of the last one of a step AdamW and the average too.
Without accumulation that is the full step. With it there are two graphs per size, which add to gradients in
memory that stays. What checkpointing recomputes in backward is in the graph like everything else.

Source: "Accelerating PyTorch with CUDA Graphs" and the notes on CUDA semantics in PyTorch's documentation.
Graphs of one process have run on a GPU (docs/gpu.md), those with DDP, accumulation or checkpointing not yet:
tests replay the same steps from a recording of PyTorch's operators on the CPU.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from imf.objective.draws import Draws, Guidance, StepDraws, count_of_v_u, repeated, sizes_of_v_u

if TYPE_CHECKING:  # for the annotations
    from imf.distributed import DistributedContext
    from imf.training.config import TrainConfig

# The captured call: (x, y, draws on the device, learning rate, share of the weights in the average, whether
# it is the last one of its step) → terms.
MicroStep = Callable[[Tensor, Tensor, StepDraws, Any, Any, bool], Tensor]

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
    """Replays `micro_step` as CUDA graphs, after one eager call at each size.

    Those eager calls, of full steps, compile kernels and make what no graph can hold (the optimizer's
    state, gradients that stay, handles of libraries). A call that needs v_u on fewer rows than a size repeats
    rows to fill it.

    micro_step: changes gradients, weights, optimizer and average in place, never synchronises, reads nothing
        else that changes.
    batch: rows of a call.  accumulate: calls per step.
    warmup: eager steps, at least.
    stream: to capture on; its own unless given.
    """

    def __init__(
        self,
        micro_step: MicroStep,
        batch: int,
        device: torch.device,
        guidance: Guidance | None = None,
        accumulate: int = 1,
        warmup: int = 0,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.micro_step, self.device, self.guidance = micro_step, device, guidance
        self.waiting = sizes_of_v_u(batch)[::-1]  # sizes not yet met, the largest first
        self.warm: list[int] = []
        steps = max(warmup, math.ceil(len(self.waiting) / accumulate))
        self.eager_calls = steps * accumulate  # that are left
        self.inputs: dict[int, tuple[Tensor, Tensor, StepDraws]] = {}
        self.recorded: dict[tuple[int, bool], CudaGraph] = {}  # by size, and whether the last of a step
        self.rates = torch.zeros((), device=device), torch.zeros((), device=device)
        # A single one: PyTorch's allocator reuses memory freed on a stream on that stream only.
        self.stream = stream or (torch.cuda.Stream(device) if device.type == "cuda" else None)

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        draws: Draws | StepDraws,
        rate: float,
        share: float,
        last: bool = True,
        at_least: int = 0,
    ) -> Tensor:
        """Returns the terms of a micro-step.  at_least: rows on which other processes need v_u."""
        step = draws if isinstance(draws, StepDraws) else StepDraws.of(draws, self.guidance, self.device)
        needed = max(len(step.u_rows), at_least)
        for scalar, value in zip(self.rates, (rate, share), strict=True):
            scalar.fill_(value)
        if self.waiting and (size := self.waiting.pop(0)) >= needed:
            self.warm.append(size)
        else:
            size = min(n for n in self.warm if n >= needed)
        step = replace(step, u_rows=repeated(step.u_rows, size))
        if self.eager_calls:
            self.eager_calls -= 1
            with on_stream(self.stream):
                return self.micro_step(x, y, step, *self.rates, last)
        if size not in self.inputs:
            self.inputs[size] = x.clone(), y.clone(), _copy(step)
        own = own_x, own_y, own_step = self.inputs[size]
        for mine, new in zip((own_x, own_y, *own_step.tensors()), (x, y, *step.tensors()), strict=True):
            mine.copy_(new, non_blocking=True)
        if (size, last) not in self.recorded:
            self.recorded[size, last] = CudaGraph(
                lambda: self.micro_step(*own, *self.rates, last),
                self.device,
                self.stream,
                beside=next(iter(self.recorded.values()), None),
            )
        return self.recorded[size, last].replay().clone()


def rows_of_others(
    config: TrainConfig, context: DistributedContext, guidance: Guidance | None, micro_step: int
) -> int:
    """Returns the most rows on which another process needs v_u in a micro-step.

    Their draws are functions of the seed, the micro-step and the process, so nothing is communicated.
    """
    batch, settings = config.micro_batch_size // context.count, {"seed": config.seed, "step": micro_step}
    counts = (
        count_of_v_u(batch, guidance, process=process, **settings, **config.draws)
        for process in range(context.count)
        if process != context.rank
    )
    return max(counts, default=0)


def _copy(step: StepDraws) -> StepDraws:
    def clones(values: StepDraws | Draws) -> dict[str, Any]:
        return {name: x.clone() for name, x in vars(values).items() if isinstance(x, Tensor)}

    return replace(step, draws=replace(step.draws, **clones(step.draws)), **clones(step))

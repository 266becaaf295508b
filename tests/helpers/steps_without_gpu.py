"""Training steps on the GPU of tests/cuda_runtime, which is not there: what each of them asks of it.

`python -m tests.helpers.steps_without_gpu JOBS OUT` needs that runtime preloaded, as by
tests/training/test_without_gpu.py. JOBS: arguments of `record`, a list in JSON; OUT: a file for the records.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
import traceback
from pathlib import Path

import torch
from torch.nn.functional import silu

from imf import data
from imf.distributed import DistributedContext, initialized
from imf.model.config import PRESETS
from imf.training.config import DIGITS_NETWORK, TrainConfig
from imf.training.state import initial_state
from tests.helpers.tiny_run import one_step

NETWORKS = {"digits": DIGITS_NETWORK, **PRESETS}


class Log:
    """The runtime's log, with the lines of Python that asked for what is not a launch in its place."""

    def __init__(self) -> None:
        self._runtime, self._watched = ctypes.CDLL(None), []
        self._runtime.cuda_log.restype = ctypes.c_char_p
        self._callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(self._watch)
        self._runtime.cuda_watch(self._callback)

    def _watch(self, line: bytes) -> None:
        kind, _, name = line.decode().split("\t")
        stack = traceback.extract_stack()[-5:-1]
        self._watched.append((kind, f"{name}: {' > '.join(f'{at.filename}:{at.lineno}' for at in stack)}"))

    def take(self) -> dict:
        """Returns what came since the last call: numbers of launches, and the rest, [kind, name and lines].

        captured: launches inside of captures.  launches: the others.
        """
        lines = [line.split("\t") for line in self._runtime.cuda_log().decode().splitlines()]
        places = [place for kind, place, _ in lines if kind == "launch"]
        captured, rest, self._watched = places.count("inside"), self._watched, []
        return {"launches": len(places) - captured, "captured": captured, "rest": rest}


def cpu_seconds(call, times: int = 1) -> float:
    """Of all threads of this process."""
    began = time.process_time()
    for _ in range(times):
        call()
    return time.process_time() - began


def record(
    log: Log,
    context: DistributedContext,
    network: str,
    batch: int,
    steps: int,
    options: dict,
    fault: str = "",
) -> dict:
    """Trains; returns the log and CPU seconds of each step, those of a `silu`, and peaks of memory in bytes.

    batch: of a micro-step.  options: of TrainConfig.  fault: of FAULTS, added to each micro-step.
    """
    sizes, errors = NETWORKS[network], []
    config = TrainConfig(
        network=sizes, batch_size=batch * options.get("accumulate", 1), device="cuda", **options
    )

    def objective(*arguments):
        out = real(*arguments)
        if fault:
            FAULTS[fault](out.loss.detach()[None])
        return out

    def step():
        one_step(state, batches, config, context)

    with context.device:  # where making the weights takes no time
        state = initial_state(config, "bf16", context)
    real, state.objective = state.objective, objective
    x = torch.zeros(batch, sizes.in_channels, sizes.input_size, sizes.input_size)
    images = data.LabelledImages(x, torch.zeros(batch, dtype=torch.int64), ["all"])
    small, found = torch.zeros(4, device=context.device), []
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    log.take()
    with data.Batches(images, batch_size=batch, seed=0, device=context.device) as batches:
        try:
            for _ in range(steps):
                seconds = cpu_seconds(step)
                found.append(log.take() | {"seconds": seconds})
                found[-1]["silu"] = cpu_seconds(lambda: silu(small), 1000) / 1000
                log.take()
        except RuntimeError as error:
            found.append(log.take() | {"seconds": 0.0, "silu": 1.0})
            errors.append(str(error).splitlines()[0])
    state.graphs = state = batches = None
    gc.collect()
    peaks = {"reserved": torch.cuda.max_memory_reserved(), "allocated": torch.cuda.max_memory_allocated()}
    return {"steps": found, "errors": errors, **peaks}


def _busy(terms):
    end = time.process_time() + 0.5
    while time.process_time() < end:
        pass


def _streams_that_keep_memory(terms):
    for _ in range(4):
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.empty(2**28, device="cuda")


def _beside(terms, after=False):
    """Launches on another stream, in place: a capture refuses new memory of a stream outside of it."""
    stream = torch.cuda.Stream()
    if after:
        stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        terms.neg_()


# What a step must not do.
FAULTS = {
    "item": lambda terms: terms[0].item(),
    "synchronize": lambda terms: torch.cuda.synchronize(),
    "launches": lambda terms: [silu(terms) for _ in range(100)],
    "host": _busy,
    "memory": _streams_that_keep_memory,
    "outside": _beside,
    "not joined": lambda terms: _beside(terms, after=True),
}


if __name__ == "__main__":
    with initialized("cuda", cuda_graphs=True) as context:
        log = Log()
        records = [record(log, context, **job) for job in json.loads(sys.argv[1])]
    Path(sys.argv[2]).write_text(json.dumps(records))

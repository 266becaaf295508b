"""What a CUDA graph does, on the CPU: operators are recorded, and replayed on the same memory.

As on a GPU a replay runs no Python: numbers, shapes and addresses are those of the recording, and what would
make the host wait for the device is refused while recording.
"""

import sys
from typing import ClassVar

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")
# What looks into tensors on a CPU alone.
LOOK = ("check_batch", "check_inputs")


class RecordedGraph(TorchDispatchMode):
    """Stands for `imf.training.graphs.CudaGraph`; the first replay is the recording's own run."""

    made: ClassVar[list] = []

    def __init__(self, call, device, stream=None, beside=None):
        super().__init__()
        self.calls, self.replays, self.beside = [], 0, beside
        RecordedGraph.made.append(self)
        with self:
            self.result = call()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in WAITS and not _looks():
            raise RuntimeError(f"{name} makes the host wait: no CUDA graph can hold it")
        if name == "lift_fresh" or (name == "where" and any(x.dim() == 0 for x in _tensors(args))):
            raise RuntimeError(f"{name} copies a number from the host: no CUDA graph can hold it")
        kwargs = kwargs or {}
        outputs = function(*args, **kwargs)
        given = {_memory(x) for x in _tensors((args, kwargs))}
        fresh = [(i, y) for i, y in enumerate(_tensors(outputs)) if _memory(y) not in given]
        self.calls.append((function, args, kwargs, fresh))  # and with them the memory of the recording
        return outputs

    def replay(self):
        self.replays += 1
        if self.replays > 1:
            with torch.no_grad():
                for function, args, kwargs, fresh in self.calls:
                    outputs = function(*args, **kwargs)
                    if function.namespace == "c10d":  # on a GPU the stream waits
                        dist.Work.unbox(outputs[1]).wait()
                    outputs = _tensors(outputs)
                    for i, y in fresh:
                        y.copy_(outputs[i])
        return self.result


def _tensors(x):
    return [y for y in tree_leaves(x) if isinstance(y, torch.Tensor)]


def _memory(x):
    return x.untyped_storage().data_ptr()


def _looks():
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_name not in LOOK:
        frame = frame.f_back
    return frame is not None

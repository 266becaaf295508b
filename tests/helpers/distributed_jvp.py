"""A process of test_jvp_distributed.py: the gradients of a step with `jvp` on two processes against one's.

python -m tests.helpers.distributed_jvp ddp|fsdp RANK PROCESSES FILE
"""

import faulthandler
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import imf_kernels as ik
from tests.transforms.test_jvp import Block


def network():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), Block())


def loss(model, x, x_dot, through):
    """Of the output, of both, or of the tangent alone: what gradients flow through."""
    y, y_dot = ik.jvp(model, (x,), (x_dot,), differentiable=through != "output")
    if through == "output":
        return (y - y_dot.detach()).square().mean(), y_dot.detach()
    return (y_dot - (y if through == "both" else y.detach())).square().mean(), y_dot.detach()


def main():
    faulthandler.dump_traceback_later(240)  # says where a process hangs
    kind, rank, processes, file = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=processes)
    torch.manual_seed(1)
    x, x_dot = torch.randn(4, 6, 16), torch.randn(4, 6, 16)
    model = network()
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        for block in model:
            fully_shard(block)
        wrapped = fully_shard(model)
    mine = slice(rank * 4 // processes, (rank + 1) * 4 // processes)
    for through in ("output", "output", "both", "both", "tangent", "output"):  # a step meets what one left
        alone = network()
        whole, whole_dot = loss(alone, x, x_dot, through)
        whole.backward()
        wrapped.zero_grad()
        value, y_dot = loss(wrapped, x[mine], x_dot[mine], through)
        value.backward()
        torch.testing.assert_close(y_dot, whole_dot[mine])
        for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
            if q.grad is None:
                continue
            grad = p.grad.full_tensor() if kind == "fsdp" else p.grad
            torch.testing.assert_close(
                *(grad, q.grad), rtol=1e-4, atol=1e-6, msg=lambda m, about=(through, name): f"{about}: {m}"
            )
    dist.barrier()  # none may leave while another still reads what it sent
    dist.destroy_process_group()
    print("equal")


if __name__ == "__main__":
    main()

"""A process group in the test's own process."""

import contextlib

import torch.distributed as dist


@contextlib.contextmanager
def group_of_one(folder):
    """A group of gloo with this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        # PyTorch joins gloo's thread with the interpreter locked, for which that thread waits if it still has
        # a tensor to give back. Behind a barrier it has none.
        dist.barrier()
        dist.destroy_process_group()

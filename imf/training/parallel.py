"""Preparation of a network for training: compiled, recomputed in backward, inside DDP, sharded by FSDP2."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import imf_kernels as ik
from imf.distributed import sharded
from imf.training.graphs import on_stream

# FSDP2 and DTensor take a second to import, so only the functions that shard import them.
if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks of a network: the members of its outermost lists of modules."""
    if isinstance(model, nn.ModuleList):
        return list(model)
    return [block for child in model.children() for block in blocks(child)]


def wrap_for_training(
    model: nn.Module,
    ema: nn.Module,
    *,
    sharding: str | None,
    device: torch.device,
    compile: bool,
    checkpointing: bool,
    stream: torch.cuda.Stream | None = None,
) -> nn.Module:
    """Compiles, checkpoints and wraps a network and its average; returns the module that the objective calls.

    Each block's forward is one compiled graph (hooks of DDP and FSDP2 stay between the graphs, so that
    communication overlaps). DDP wraps the model, or FSDP2 shards both networks block by block, in place.

    sharding: "ddp" or "fsdp"; None for a process alone.  device: of the weights of "fsdp".
    stream: on which steps with DDP are captured; gradients accumulate on the stream of DDP's construction.
    """
    for block in blocks(model):
        if compile:
            block.forward = torch.compile(block.forward, fullgraph=True)
        if checkpointing:
            block.forward = functools.partial(ik.checkpoint, block.forward)
    if sharding is None:
        return model
    if sharding == "ddp":
        with on_stream(stream):
            return DDP(model, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh

    # `ik.checkpoint` returns views; nothing here writes into one.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for network in (model, ema):
        for module in (*blocks(network), network):
            _shard(module, mesh, keep_root=network is model)
    return model


def _shard(module: nn.Module, mesh: DeviceMesh, keep_root: bool) -> None:
    """Shards a module's fp32 weights over all processes; inputs pass uncast: h must not be rounded.

    keep_root: PyTorch's default, the root's weights stay gathered from forward to backward; False for a
        network that is never differentiated.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # FSDP2 looks for tensors in tuples, lists, dicts and dataclasses: a `Dual` passes its hooks as a tuple.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=None if keep_root else True)
    module.register_forward_pre_hook(lambda _, args: _as_tuples(args), prepend=True)
    module.register_forward_pre_hook(lambda _, args: _as_duals(args))
    module.register_forward_hook(lambda _, args, output: _as_tuples(output), prepend=True)
    module.register_forward_hook(lambda _, args, output: _as_duals(output))


_DUAL = object()  # marks the tuple that stands for a `Dual`


def _as_tuples(x: Any) -> Any:
    if isinstance(x, ik.Dual):
        return _DUAL, x.primal, x.tangent_rows, x.differentiable
    return tuple(map(_as_tuples, x)) if isinstance(x, tuple) else x


def _as_duals(x: Any) -> Any:
    if not isinstance(x, tuple):
        return x
    if x and x[0] is _DUAL:
        return ik.Dual(x[1], x[2], differentiable=x[3])
    return tuple(map(_as_duals, x))


@contextlib.contextmanager
def synchronising(wrapped: nn.Module, last: bool) -> Iterator[None]:
    """Surrounds a micro step's forward and backward: the `last` one of a step synchronises the gradients."""
    if sharded(wrapped):
        wrapped.set_requires_gradient_sync(last)
    with wrapped.no_sync() if isinstance(wrapped, DDP) and not last else contextlib.nullcontext():
        yield


def _is_dtensor(x: Tensor) -> TypeGuard[DTensor]:
    tensor = sys.modules.get("torch.distributed.tensor")  # absent: there is no DTensor
    return tensor is not None and isinstance(x, tensor.DTensor)


def local(x: Tensor) -> Tensor:
    """Returns this process's part of a tensor that FSDP2 shards; another tensor as it is."""
    return x.to_local() if _is_dtensor(x) else x


def whole(x: Tensor) -> Tensor:
    """Gathers a tensor that FSDP2 shards, which takes every process; returns another tensor as it is."""
    return x.full_tensor() if _is_dtensor(x) else x


def placed_like(x: Tensor, like: Tensor) -> Tensor:
    """Copies x, the same in every process, to the device of `like`, sharded as it is."""
    if _is_dtensor(like):
        from torch.distributed.tensor import distribute_tensor

        x = x.to(like.device_mesh.device_type)
        return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None).clone()
    return x.to(like.device, copy=True)

"""Context that eager PyTorch needs while `jvp` runs a function, for the modules that are loaded.

Calls of PyTorch reach `jvp` one by one, and follow PyTorch's forward-mode rules. Elsewhere a tangent would be
lost, or an error raised that the function did not cause: compiled code, functions of PyTorch that return
tensors unchanged but have no forward-mode rule, threads, collectives. Each is fixed or refused here during
the call.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
import torch.utils.checkpoint
import torch.utils.dlpack
from torch import Tensor
from torch.utils import _pytree as pytree

from imf_kernels.dual import not_a_view
from imf_kernels.transforms.checkpoint import checkpoint
from imf_kernels.transforms.dual_tensors import (
    can_move,
    inside,
    make_dual_tensor,
    refusing,
    unpack_dual_tensor,
)
from imf_kernels.transforms.packages import serve_packages
from imf_kernels.transforms.rules import REFUSED

Tangents = tuple[Tensor | None, ...]


def _views(ctx: Any, *tangents: Tensor | None) -> Tangents:
    """Applies the rule of functions that return their tensors: forward mode wants views of tangents."""
    return tuple(None if t is None else t.view_as(t) for t in tangents)


def _sink(ctx: Any, ddp: None, *tangents: Tensor | None) -> Tangents:
    cloned = ctx.ddp_weakref()._ddp_sink_clone
    return tuple(
        zeros if t is None else t.clone() if cloned else t.view_as(t)
        for t, zeros in zip(tangents, ctx.zeros, strict=True)
    )


def _zeros_like(y: Any) -> Tensor | None:
    return y.new_zeros(()).expand(y.shape) if can_move(y) else None


def _sink_with_zeros(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps zeros for DDP's function, which asks for none: without them outputs raise in forward mode."""

    @functools.wraps(forward)
    def call(ctx: Any, ddp: Any, *outputs: Any) -> Any:
        if fwAD._current_level >= 0:
            ctx.zeros = [_zeros_like(y) for y in outputs]
        return forward(ctx, ddp, *outputs)

    return call


def _all_reduced(ctx: Any, group: None, op: None, tangent: Tensor) -> Tensor:
    import torch.distributed as dist

    if ctx.op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
        raise NotImplementedError(f"imf_kernels.jvp: all_reduce by {ctx.op} is not linear, SUM and AVG are")
    tangent = tangent.clone()
    dist.all_reduce(tangent, op=ctx.op, group=ctx.group)
    return tangent


def _all_gathered(ctx: Any, group: None, tangent: Tensor) -> Tangents:
    import torch.distributed as dist

    gathered = [torch.empty_like(tangent) for _ in range(dist.get_world_size(ctx.group))]
    dist.all_gather(gathered, tangent.contiguous(), group=ctx.group)
    return tuple(gathered)


_FSDP = "torch.distributed.fsdp._fully_shard"
# Functions of PyTorch without a usable forward-mode rule, and a rule for each.
_MISSING: list[tuple[str, str, Callable[..., Any]]] = [
    (f"{_FSDP}._fsdp_param_group", "RegisterPostBackwardFunction", lambda ctx, _, *t: _views(ctx, *t)),
    ("torch.nn.modules._functions", "BackwardHookFunction", _views),
    ("torch.nn.parallel.distributed", "_DDPSink", _sink),
    ("torch.distributed.nn.functional", "_AllReduce", _all_reduced),
    ("torch.distributed.nn.functional", "_AllGather", _all_gathered),
]


class _Joint(torch.autograd.Function):
    """Identity on a primal and its tangent: in backward both gradients have arrived before one goes on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, x_dot: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return not_a_view(x, x.shape), not_a_view(x_dot, x_dot.shape)

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, dx_dot: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return dx, dx_dot


def _joined(values: Any, hook: Callable[[Tensor], Tensor] | None = None) -> Any:
    """Joins the gradients of each primal and its tangent, to which it adds a hook, if they have gradients."""
    if not inside.run.differentiable or not torch.is_grad_enabled():
        return values

    def of(y: Any) -> Any:
        primal, tangent = unpack_dual_tensor(y) if can_move(y) else (y, None)
        if tangent is None or not (primal.requires_grad or tangent.requires_grad):
            return y
        primal, tangent = _Joint.apply(primal, tangent)
        if hook is not None:
            tangent.register_hook(hook)
        return make_dual_tensor(primal, tangent)

    return pytree.tree_map(of, values)


def _joining_inputs(register: Callable[..., Any]) -> Callable[..., Any]:
    """Lets FSDP2 reduce gradients when those of a module's inputs and of their tangents are complete."""

    @functools.wraps(register)
    def call(group: Any, args: Any, kwargs: Any) -> Any:
        return _joined(register(group, args, kwargs))

    return call


def _joining_outputs(register: Callable[..., Any]) -> Callable[..., Any]:
    """Lets FSDP2 gather parameters when the gradient of a module's output or of its tangent arrives."""

    @functools.wraps(register)
    def call(state: Any, output: Any) -> Any:
        return register(state, _joined(output, state._pre_backward))

    return call


# Methods of PyTorch to wrap, by module and class.
_WRAPPED: list[tuple[str, str, str, Callable[..., Any]]] = [
    (f"{_FSDP}._fsdp_param_group", "FSDPParamGroup", "_register_post_backward_hook", _joining_inputs),
    (f"{_FSDP}._fsdp_state", "FSDPState", "_register_pre_backward_hook", _joining_outputs),
]

# Methods of a process group, and of its backends, that send none of the caller's tensors.
_SEND_NOTHING = {
    *("abort", "allocate_tensor", "barrier", "boxed", "eager_connect_single_device", "get_group_store"),
    *("merge_remote_group", "memory_stats", "monitored_barrier", "name", "rank", "resume", "set_timeout"),
    *("shrink", "shutdown", "size", "split_group", "suspend", "unbox"),
}
_COLLECTIVE = (
    "torch.distributed's collective {} would leave each rank its own tangent, or none; "
    "torch.distributed.nn.functional.all_reduce and all_gather have a tangent"
)
_patched: set[Any] = set()


def _without_plans(run: Callable[..., Any]) -> Callable[..., Any]:
    """Drops a script's execution plan, optimised outside of a jvp, whose tangents would be zeros."""

    @functools.wraps(run)
    def call(script: Any, *args: Any, **kwargs: Any) -> Any:
        if fwAD._current_level >= 0:
            script._debug_flush_compilation_cache()
        return run(script, *args, **kwargs)

    return call


def _complete_pytorch() -> None:
    """Gives PyTorch's loaded functions the rules that they lack, once per process."""
    for rule in [rule for rule in _MISSING if rule[0] in sys.modules]:
        module, name, jvp = rule
        _MISSING.remove(rule)
        if hasattr(sys.modules[module], name):
            function = getattr(sys.modules[module], name)
            function.jvp = staticmethod(jvp)
            if jvp is _sink:
                function.forward = staticmethod(_sink_with_zeros(function.forward))
    for wrapped in [wrapped for wrapped in _WRAPPED if wrapped[0] in sys.modules]:
        module, name, method, wrapper = wrapped
        _WRAPPED.remove(wrapped)
        kind = getattr(sys.modules[module], name)
        setattr(kind, method, wrapper(getattr(kind, method)))
    if torch.jit not in _patched:
        _patched.add(torch.jit)
        for script in (torch._C.ScriptFunction, torch._C.ScriptMethod):
            script.__call__ = _without_plans(script.__call__)  # type: ignore[method-assign]
    if torch.utils.dlpack not in _patched:
        _patched.add(torch.utils.dlpack)
        torch.utils.dlpack.to_dlpack = refusing(torch.utils.dlpack.to_dlpack, REFUSED[Tensor.__dlpack__])
    if "torch.distributed.distributed_c10d" in sys.modules and torch.distributed not in _patched:
        _patched.add(torch.distributed)
        for kind in (torch.distributed.ProcessGroup, torch._C._distributed_c10d.Backend):
            for name, method in list(vars(kind).items()):
                sends = name.startswith(("_allgather", "_reduce_scatter")) or not name.startswith("_")
                if sends and name not in _SEND_NOTHING and type(method).__name__ == "instancemethod":
                    setattr(kind, name, refusing(method, _COLLECTIVE.format(name.strip("_"))))


class Surroundings:
    """Context of the call of a function whose tensors carry tangents.

    Args:
        mode: makes the context in which a thread sees each call of PyTorch.
    """

    def __init__(self, mode: Callable[[], Any]) -> None:
        self.mode = mode

    def __enter__(self) -> None:
        _complete_pytorch()
        serve_packages()
        # Compiled code would drop tangents.
        self.stance = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else None
        if self.stance is not None:
            self.stance.__enter__()
        # Blocks may call PyTorch's checkpoint by name, which looks up its implementation here.
        self.pytorchs_checkpoint = _LOOKED_UP.get(_NAME)
        _LOOKED_UP[_NAME] = checkpoint
        self.start = threading.Thread.start
        threading.Thread.start = _starting(self.start, self.mode, threading.get_ident())  # type: ignore[method-assign,assignment]
        self.scripts_are_optimized = torch._C._get_graph_executor_optimize()
        torch._C._set_graph_executor_optimize(False)  # optimised scripts drop them too

    def __exit__(self, *raised: Any) -> None:
        torch._C._set_graph_executor_optimize(self.scripts_are_optimized)
        threading.Thread.start = self.start  # type: ignore[method-assign]
        _LOOKED_UP[_NAME] = self.pytorchs_checkpoint
        if self.stance is not None:
            self.stance.__exit__(*raised)


_pytorchs_checkpoint: Any = torch.utils.checkpoint.checkpoint
_LOOKED_UP, _NAME = _pytorchs_checkpoint.__wrapped__.__dict__, "__dynamo_disable"


def _starting(
    start: Callable[[threading.Thread], None], mode: Callable[[], Any], owner: int
) -> Callable[[threading.Thread], None]:
    """Wraps `Thread.start`, so that threads that `func` starts see their calls of PyTorch."""

    def started(thread: threading.Thread) -> None:
        if threading.get_ident() == owner:
            run = thread.run

            def run_inside() -> None:
                with mode():
                    run()

            thread.run = run_inside  # type: ignore[method-assign]
        start(thread)

    return started

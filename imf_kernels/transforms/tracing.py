"""Graph breaks where torch.compile would silently go wrong while it traces a call of `jvp`.

Other calls reach `jvp` one by one, as in eager mode. torch.compile follows these, or puts them into its
graph, without showing them to a TorchFunctionMode.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch.autograd.grad_mode import _enter_inference_mode, _exit_inference_mode

from imf_kernels.backends.dispatch import constant
from imf_kernels.transforms.dual_tensors import carries_tangent
from imf_kernels.transforms.rules import CONTROL_FLOW, REFUSED

_CONTROL_FLOW = {"cond", "while_loop", "scan", "map", "map_impl", "associative_scan"}
_UNSEEN = {torch.normal: REFUSED[torch.normal]}
_INFERENCE = (
    "torch.compile cannot follow tangents in torch.inference_mode; enter torch.no_grad in its place, or the "
    "mode outside of what is compiled"
)


@constant
def refuse_while_tracing() -> None:
    """Makes torch.compile refuse the calls of this file, from now on, in any `jvp` that it traces."""
    from torch._dynamo.exc import Unsupported
    from torch._dynamo.symbolic_convert import InstructionTranslator

    _wrap_dynamo()
    nodes = InstructionTranslator.current_tx().output.graph.nodes
    entered = {n for n in nodes if n.target is _enter_inference_mode and n.args[0]}
    if entered - {n.args[0] for n in nodes if n.target is _exit_inference_mode}:
        raise Unsupported(f"imf_kernels.jvp: {_INFERENCE}")


@functools.cache
def _wrap_dynamo() -> None:
    from torch._dynamo.output_graph import OutputGraph
    from torch._dynamo.variables.ctx_manager import InferenceModeVariable
    from torch._dynamo.variables.higher_order_ops import TorchHigherOrderOperatorVariable
    from torch._dynamo.variables.misc import AutogradFunctionVariable
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable

    def of_function(variable: Any, *arguments: Any) -> str | None:
        function = variable.fn_cls
        if function.__module__.startswith("torch.") or not _move(arguments):
            return None
        return (
            f"torch.compile would not call jvp of the autograd.Function {function.__qualname__}; without "
            "fullgraph=True it runs outside of the graph"
        )

    def of_unseen(variable: Any, *arguments: Any) -> str | None:
        reason = _UNSEEN.get(variable.value)
        return reason if reason and _move(arguments) else None

    def of_control_flow(variable: Any, *arguments: Any) -> str | None:
        return CONTROL_FLOW if variable.value.name() in _CONTROL_FLOW and _move(arguments) else None

    def of_mode(variable: Any) -> str | None:
        return _INFERENCE if variable.target_values[0] else None

    _refuse(AutogradFunctionVariable, "call_apply", of_function)
    _refuse(TorchInGraphFunctionVariable, "call_function", of_unseen)
    _refuse(TorchHigherOrderOperatorVariable, "call_function", of_control_flow)
    _refuse(InferenceModeVariable, "enter", of_mode)
    OutputGraph.call_user_compiler = _leaving_level(OutputGraph.call_user_compiler)  # type: ignore[method-assign]


def _leaving_level(compile: Callable[..., Any]) -> Callable[..., Any]:
    """Leaves the dual level that a compiler enters by running the graph, if it fails inside.

    A graph enters the level in C++, unknown to the module forward_ad.
    """

    @functools.wraps(compile)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return compile(*args, **kwargs)
        except BaseException:
            with contextlib.suppress(RuntimeError):  # not entered
                torch._C._exit_dual_level(level=fwAD._current_level + 1)
            raise

    return call


def _refuse(kind: type, method: str, why: Callable[..., str | None]) -> None:
    """Wraps the method by which a variable of torch.compile traces a call. `why` gets both."""
    from torch._dynamo.exc import Unsupported

    traced = getattr(kind, method)

    @functools.wraps(traced)
    def call(variable: Any, tx: Any, *arguments: Any) -> Any:
        if fwAD._current_level >= 0 and (reason := why(variable, *arguments)):
            raise Unsupported(f"imf_kernels.jvp: {reason}")
        return traced(variable, tx, *arguments)

    setattr(kind, method, call)


def _move(arguments: Any) -> bool:
    """Returns whether any of torch.compile's variables, at any depth, stands for a tensor with a tangent."""
    from torch._dynamo.variables.base import VariableTracker

    move = False

    def visit(value: Any) -> None:
        nonlocal move
        proxy = getattr(value, "proxy", None)
        if proxy is not None and carries_tangent(proxy.node.meta.get("example_value")):
            move = True

    VariableTracker.visit(visit, arguments)
    return move

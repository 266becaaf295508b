"""The operations as operators of `torch.library`: what `torch.compile` and `torch.export` put into a graph.

An operation has one operator for the whole of it, imf_kernels::rms_norm, and one for each function of its
kernels, imf_kernels::rms_norm_forward and imf_kernels::rms_norm_backward. The compiler's front end sees the
former alone. It is then taken apart by running the operation's `autograd.Function`, which saves and
differentiates what it does in eager mode; only its kernels are the latter, and stay in the graph.

Eager mode does without: an operator takes two to three times an `autograd.Function`'s time on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from imf_kernels.dispatch import Backend, always
from imf_kernels.layout import last_contiguous

_LIBRARY = torch.library.Library("imf_kernels", "DEF")


class Operation:
    """An operation that has kernels: defines its operators, and makes its backends.

    Args:
        name: of the operation.
        function: its `autograd.Function`. `forward` takes kernels and what `schema` lists, and returns the
            result and its tangent or `None`. A list, which may stand last in the schema, it takes as so many
            arguments. All work is PyTorch's or done by the functions of the kernels.
        schema: "(Tensor x, Tensor? x_dot, …)".
        kernels: the functions of the kernels by name, as schemas: Tensor(a!), Tensor(b!) … are those filled.
        fakes: for those of them that return tensors: the same function, but of tensors without memory.
        contiguous: whether kernels take contiguous tensors alone, not rows at any distance.
    """

    def __init__(
        self,
        name: str,
        function: type[torch.autograd.Function],
        schema: str,
        kernels: Mapping[str, str],
        fakes: Mapping[str, Callable[..., Any]] | None = None,
        contiguous: bool = False,
    ) -> None:
        self._function = function
        self._lay_out = Tensor.contiguous if contiguous else last_contiguous
        self._backends: dict[str, Any] = {}
        self._kernels: dict[str, Any] = {}
        self._read: dict[str, list[bool]] = {}  # of each kernel's arguments, whether it only reads them
        self._operator = _define(name, f"{schema} -> Tensor[]")
        _LIBRARY.impl(name, self._compose, "CompositeImplicitAutograd")
        *single, last, _ = self._operator._schema.arguments  # the last one is the backend
        self._before_list = len(single) if isinstance(last.type, torch.ListType) else None
        for kernel, kernel_schema in kernels.items():
            qualified = f"{name}_{kernel}"
            self._kernels[kernel] = _define(qualified, kernel_schema)
            self._read[kernel] = [a.alias_info is None for a in self._kernels[kernel]._schema.arguments]
            _LIBRARY.impl(qualified, partial(self._launch, kernel), "CompositeExplicitAutograd")
            fake = (fakes or {}).get(kernel, _fills)
            torch.library.register_fake(f"imf_kernels::{qualified}", partial(_fake, fake), lib=_LIBRARY)

    def backend(
        self,
        name: str,
        kernels: Any,
        unavailable: Any,
        default: bool = True,
        on_request: Any = always,
        also: tuple[str, ...] = (),
    ) -> Backend:
        """The backend of that name, which runs on these kernels; the rest is as in `Backend`."""
        self._backends[name] = kernels
        # Not what `Function.apply` does for transforms of torch.func, in which no kernel runs: 2 µs a call.
        eager = partial(super(torch.autograd.Function, self._function).apply, kernels)  # type: ignore[misc]
        return Backend(name, eager, unavailable, default, partial(self._traced, name), on_request, also)

    def _traced(self, backend: str, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        """The operator, called like the `autograd.Function`. An operator cannot return `None`."""
        if self._before_list is not None:
            arguments = (*arguments[: self._before_list], list(arguments[self._before_list :]))
        y, *y_dot = self._operator(*arguments, backend=backend)
        return y, y_dot[0] if y_dot else None

    def _compose(self, *arguments: Any, backend: str) -> list[Tensor]:
        if self._before_list is not None:
            arguments = (*arguments[: self._before_list], *arguments[self._before_list])
        kernels = {name: partial(operator, backend=backend) for name, operator in self._kernels.items()}
        y, y_dot = self._function.apply(SimpleNamespace(**kernels), *arguments)
        return [y] if y_dot is None else [y, y_dot]

    def _launch(self, kernel: str, *arguments: Any, backend: str) -> Any:
        """Lays out again what compiled code hands over in another order than it was traced with."""
        laid_out = [self._lay_out(x) if isinstance(x, Tensor) else x for x in arguments]
        result = getattr(self._backends[backend], kernel)(*laid_out)
        # The backend stands last in the schema.
        for x, used, is_read in zip(arguments, laid_out, self._read[kernel], strict=False):
            if used is not x and not is_read:
                x.copy_(used)
        return result


def _define(name: str, schema: str) -> Any:
    """The operator imf_kernels::name, which takes the name of a backend besides what the schema says."""
    arguments, _, results = schema.partition(") -> ")
    # What a kernel was traced with it gets: the compiler may not lay out a tensor in another way.
    _LIBRARY.define(f"{name}{arguments}, *, str backend) -> {results}", tags=torch.Tag.needs_exact_strides)
    return getattr(torch.ops.imf_kernels, name).default


def _fake(function: Callable[..., Any], *arguments: Any, backend: str) -> Any:
    return function(*arguments)


def _fills(*arguments: Any) -> None:
    """The fake of a kernel that fills tensors and returns none."""

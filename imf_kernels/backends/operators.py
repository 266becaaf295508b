"""Operations: how a public function reaches its kernels, in eager mode and in graphs.

In eager mode a call runs the operation's `autograd.Function` on the kernels of a backend. The backend is
chosen and the arguments are checked once per kind of call (shapes, strides, dtypes, devices, options and
PyTorch's settings); later calls look the choice up.

In the graphs of `torch.compile` and `torch.export` an operation has one operator as a unit,
imf_kernels::rms_norm, and one per kernel function, imf_kernels::rms_norm_forward and
imf_kernels::rms_norm_backward. The compiler's front end sees only the former, which is then decomposed by
running the operation's `autograd.Function`: it saves and differentiates as in eager mode, and its kernels,
the latter, stay in the graph. Eager mode does without operators, which take two to three times an
`autograd.Function`'s time on the host.

Gradients flow through a tangent if it is asked for, by `Dual(..., differentiable=True)`. Such calls run a
second `autograd.Function`, of the pair (y, ẏ) = (f(x), J ẋ) with J = f′(x): the same kernel forward, and the
cotangents of both backward. Its derivation is one for all operations. Let B(x, c) = Jᵀ c be the primal's
backward. From dy and dẏ follow
    dẋ = Jᵀ dẏ = B(x, dẏ),
    dx = Jᵀ dy + ∂/∂x ⟨dẏ, J ẋ⟩ = B(x, dy) + ∂B/∂x (x, dẏ) · ẋ, because second derivatives of f commute.
B is linear in c, so (dẋ, dx) is B of the dual numbers (x, ẋ) and (dẏ, dy), its value and its tangent: the
same formula, in the arithmetic of `Dual`s. So are the gradients of weights, whose tangents are 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, Generic, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionMeta

from imf_kernels import _C
from imf_kernels.backends import cpu, sources, triton_launch, verified
from imf_kernels.backends.dispatch import (
    Asked,
    Backend,
    choose,
    default,
    in_graph,
    traced_default,
    without_autocast,
)
from imf_kernels.backends.layout import in_channel_order, last_contiguous, without_memory
from imf_kernels.dual import Dual, align, is_differentiable, stored, unchecked

_LIBRARY = torch.library.Library("imf_kernels", "DEF")
_SOURCES = sources.of_package()  # at import: compilers would trace a call
MOST_CHOICES = 1024  # that an operation remembers
Result = tuple[Any, ...]  # tensors, then the tangent of each, all `None` without tangents

# All operations by name; each adds itself.
OPERATIONS: dict[str, Operation[Any]] = {}


def profiled_names(kind: str) -> tuple[str, ...]:
    """Returns the profiled names of the operations of a kind: autograd's functions and operators."""
    found = [(o.function.__name__, o.kernels) for o in OPERATIONS.values() if o.kind == kind and o.function]
    return *(function for function, _ in found), *(kernels for _, kernels in found)


class Operation(Generic[Asked]):
    """An operation that maps duals to a dual.

    Its arguments are primals, each followed by its tangent or `None`, then all others.

    Args:
        name: of the operation and its operator.
        reference: the definition in plain PyTorch, `reference(differentiable, *arguments)`: the results, then
            their tangents or `None`. Gradients flow through tangents only if they are to be differentiable.
        check: raises for arguments that do not fit, and returns those that backends inspect, mostly tensors.
        backends: those with kernels, best first.
        forward, backward: of its `autograd.Function`, `None` without kernels: `forward(ctx, kernels,
            *arguments)` returns what the reference does; its annotations give the operator's schema. PyTorch
            or the functions of `kernels` do all the work.
        pair_backward: of the pair, with kernels: `pair_backward(call, dy, dy_dot)` returns the gradients of
            the arguments of a `PairCall`, `None` for those without; a cotangent may be `None`. Of several
            results it takes all cotangents, then those of their tangents. It runs on
            backends that have a kernel `pair_backward`; on all others, and by default, PyTorch
            differentiates the reference. `pair_needs_kernel=False`: on all with kernels.
        results: their number.
        kind: of its work, in profiles: "rows", "attention" or "products".
        public, kernels: name of the public function and prefix of the kernels, `name` by default.
        schemas: of the kernels by name, if they are not in the compiled module; `fakes`: the same functions
            for tensors without memory.
        lay_out: converts a tensor to the layout of the kernels, in graphs, whose tensors may come in another
            memory order than they were traced with. Kernels that are told `channels_last` get images so.
        reference_unavailable: why the reference cannot run.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Result],
        check: Callable[..., Asked],
        backends: Sequence[Backend[Asked]] = (),
        forward: Callable[..., Result] | None = None,
        backward: Callable[..., Any] | None = None,
        pair_backward: Callable[..., Any] | None = None,
        *,
        results: int = 1,
        pair_needs_kernel: bool = True,
        kind: str = "rows",
        public: str | None = None,
        kernels: str | None = None,
        schemas: Mapping[str, str] | None = None,
        fakes: Mapping[str, Callable[..., Any]] | None = None,
        lay_out: Callable[[Tensor], Tensor] = last_contiguous,
        reference_unavailable: Callable[[Asked], str | None] | None = None,
        reference_aliases: tuple[str, ...] = (),
    ) -> None:
        self.name, self.kind, self.public, self.results = name, kind, public or name, results
        self.reference, self._check = reference, check
        plain: Any = {} if reference_unavailable is None else {"unavailable": reference_unavailable}
        self.backends = (
            *(replace(b, opt_in=partial(verified.on_request, self.public, b.name)) for b in backends),
            Backend[Asked]("reference", aliases=reference_aliases, **plain),
        )
        for b in backends:
            if isinstance(b.kernels, triton_launch.Kernels):
                sources.MODULES.setdefault(self.public, set()).add(b.kernels.module)
        self.choices: dict[bytes | None, Callable[..., Result]] = {}
        self.kernels = kernels or name
        self.function: type[torch.autograd.Function] | None = None
        if forward is not None and backward is not None:
            methods = {
                "forward": staticmethod(forward),
                "backward": staticmethod(first_derivatives(self.public, backward, results)),
            }
            function: Any = FunctionMeta(f"_{name}", (torch.autograd.Function,), methods)
            self.function = function
            # Skips `Function.apply`'s work for transforms of torch.func, where no kernel runs: 2 µs per call,
            # and its choice between backward and vjp.
            function._backward_cls.apply = function.backward
            base: Any = super(torch.autograd.Function, function)
            self._forward, self._apply = forward, base.apply
            pair: Any = FunctionMeta(
                f"_{name}_pair",
                (torch.autograd.Function,),
                {
                    "forward": staticmethod(self._pair_forward),
                    "backward": staticmethod(
                        first_derivatives(self.public, self._pair_backward, 2 * results)
                    ),
                },
            )
            self.pair_function = pair
            base = super(torch.autograd.Function, pair)
            self._apply_pair = base.apply
            self._backward_of_pair, self._pair_needs_kernel = pair_backward, pair_needs_kernel
            self._operator = _define(name, f"({_parameters(forward)}, bool differentiable) -> Tensor[]")
            _LIBRARY.impl(name, self._compose, "CompositeImplicitAutograd")
        self._kernel_operators = {
            kernel.removeprefix(f"{self.kernels}_"): _KernelOperator.of(
                kernel, schema, (fakes or {}).get(kernel), lay_out
            )
            for kernel, schema in (schemas or _C.schemas).items()
            if kernel.removeprefix(f"{self.kernels}_") in _FUNCTIONS
        }
        for kernel, operator in self._kernel_operators.items():
            for backend in backends:
                operator.backends.setdefault(backend.name, (backend.kernels, kernel))
        OPERATIONS[name] = self

    def __call__(self, backend: str | None, inputs: Sequence[Tensor | Dual], *others: Any) -> Any:
        """Returns the result for tensors or `Dual`s and all other arguments, a `Dual` if an input is one."""
        arguments: list[Any] = []
        moves = differentiable = False
        for x in inputs:
            if isinstance(x, Dual):
                moves = True
                differentiable = differentiable or x._differentiable
                arguments += (x._primal, x._tangent)
            else:
                arguments += (x, None)
        if differentiable:
            differentiable = is_differentiable(*inputs)
        results = self.run(backend, (*arguments, *others), differentiable, len(inputs))
        if self.results == 1:
            return unchecked(results[0], results[1], differentiable) if moves else results[0]
        ys, ys_dot = results[: self.results], results[self.results :]
        return (
            tuple(unchecked(y, y_dot, differentiable) for y, y_dot in zip(ys, ys_dot, strict=True))
            if moves
            else ys
        )

    def run(
        self, backend: str | None, arguments: tuple[Any, ...], differentiable: bool = False, duals: int = 0
    ) -> Result:
        """Returns the results and their tangents, by the named backend or the one chosen for such calls.

        duals: the number of primals at the beginning whose stored tangents may be of different samples.
        """
        if torch.compiler.is_compiling():
            backend = traced_default() if backend is None else backend
            return self._decided(backend, arguments, differentiable, duals)(*arguments)
        backend = default.backend if backend is None else backend
        key = _C.key((backend, differentiable, *arguments))
        run = self.choices.get(key)
        if run is None:
            run = self._decided(backend, arguments, differentiable, duals)
            if key is not None:
                if len(self.choices) >= MOST_CHOICES:
                    self.choices.clear()
                self.choices[key] = run
        return run(*arguments)

    def backend_for(
        self, backend: str | None, *arguments: Any, differentiable: bool = False
    ) -> Backend[Asked]:
        """Returns the backend that would run a call, after checking its arguments."""
        asked = self._check(*arguments)
        chosen = choose(self.public, self.backends, backend, asked, differentiable)
        verified.warn_unverified(self.public, chosen.name, asked)
        return chosen

    def _decided(
        self, wanted: str | None, arguments: tuple[Any, ...], differentiable: bool, duals: int
    ) -> Callable[..., Result]:
        # Compared, not hashed: a hash makes constants of sizes that a compiler follows as symbols.
        rows = [t.shape[:1] for t in arguments[1 : 2 * duals : 2] if t is not None]
        if any(other != rows[0] for other in rows[1:]):
            aligned = _aligned(duals, *arguments)
            run = self._decided(wanted, aligned, differentiable, 0)
            return lambda *arguments: run(*_aligned(duals, *arguments))
        backend = self.backend_for(wanted, *arguments, differentiable=differentiable)
        if backend.kernels is None:
            run = backend.function or partial(self.reference, differentiable)
        elif reason := next(
            filter(None, (without_memory(x) for x in arguments if isinstance(x, Tensor))), None
        ):
            raise RuntimeError(
                f"{self.public}: backend {backend.name!r} cannot run: it takes tensors that lie in memory, "
                f"got {reason}"
            )
        elif in_graph():
            run = partial(self._traced, backend.name, differentiable)
        elif (
            torch.is_grad_enabled() or torch._C._get_tracing_state() or torch._C._autograd._profiler_enabled()
        ):
            run = partial(self._apply_pair if differentiable else self._apply, backend.kernels)
        else:
            run = partial(self._forward, _NO_GRAPH, backend.kernels)
        if not torch._C._is_any_autocast_enabled():
            return run
        return partial(_outside_autocast, run)

    def _traced(self, backend: str, differentiable: bool, *arguments: Any) -> Result:
        """Calls the operator like the `autograd.Function`; an operator cannot return `None`."""
        results = self._operator(*arguments, differentiable, backend=f"{backend} {_SOURCES}")
        return *results, *(None,) * (2 * self.results - len(results))

    def _compose(self, *arguments_and_kind: Any, backend: str) -> list[Tensor]:
        *arguments, differentiable = arguments_and_kind
        function = self.pair_function if differentiable else self.function
        assert function is not None
        backend = backend.partition(" ")[0]
        chosen = next(b.kernels for b in self.backends if b.name == backend)
        kernels = {
            name: partial(k, backend=backend)
            for name, k in self._kernel_operators.items()
            if hasattr(chosen, name)
        }
        if hasattr(chosen, "shares"):
            kernels["shares"] = chosen.shares
        results = function.apply(SimpleNamespace(**kernels), *arguments)
        return [y for y in results if y is not None]

    def _pair_forward(self, ctx: Any, kernels: Any, *arguments: Any) -> Result:
        """Runs the forward, and saves its arguments and what it saves for backward."""
        recorder = _Recorder()
        results = self._forward(recorder, kernels, *arguments)
        tensors = [x if isinstance(x, Tensor) else None for x in arguments]
        ctx.save_for_backward(*tensors, *recorder.saved)
        ctx.others = [None if isinstance(x, Tensor) else x for x in arguments]
        ctx.kernels = kernels
        ctx.set_materialize_grads(False)
        return results

    def _pair_backward(self, ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        saved, count = ctx.saved_tensors, len(ctx.others)
        arguments = [other if x is None else x for x, other in zip(saved[:count], ctx.others, strict=True)]
        call = PairCall(ctx.kernels, arguments, saved[count:], ctx.needs_input_grad[1:])
        backward = self._backward_of_pair
        if backward and not (self._pair_needs_kernel and not hasattr(ctx.kernels, "pair_backward")):
            return (None, *backward(call, *cotangents))
        return (None, *_differentiated(self.reference, call, cotangents))


class PairCall(NamedTuple):
    """A call of an operation that is to be differentiated through its result and its tangent.

    Attributes:
        kernels: of its backend.
        arguments: of the operation.
        saved: what its forward saves for the primal's backward.
        needed: which arguments' gradients are needed.
    """

    kernels: Any
    arguments: list[Any]
    saved: Sequence[Any]
    needed: Sequence[bool]


def _differentiated(
    reference: Callable[..., Result], call: PairCall, cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Returns the gradients of a call by PyTorch's autograd through the operation's reference."""
    with torch.enable_grad():
        leaves = [
            x.detach().requires_grad_() if needed else x
            for x, needed in zip(call.arguments, call.needed, strict=True)
        ]
        results = reference(True, *leaves)
    given = [
        (y, cotangent)
        for y, cotangent in zip(results, cotangents, strict=True)
        if y is not None and y.requires_grad and cotangent is not None
    ]
    if not given:
        return [None] * len(leaves)
    ys, cotangents_of_ys = zip(*given, strict=True)
    wanted = [x for x, needed in zip(leaves, call.needed, strict=True) if needed]
    gradients = iter(torch.autograd.grad(ys, wanted, cotangents_of_ys, allow_unused=True))
    return [next(gradients) if needed else None for needed in call.needed]


_FUNCTIONS = ("forward", "backward", "pair_backward", "grad_input", "grad_weight")


def compiled(
    kernels: str, *, reduces: bool = False, triton: tuple[str, str | None] | None = None
) -> tuple[Backend[Sequence[Tensor]], ...]:
    """Returns the `cpu` and `triton` backends of kernels of one name.

    Args:
        reduces: whether they hold complete rows of the first tensor in registers, whose number is limited.
        triton: module of the Triton kernels and name in it, by default the module `kernels`.
    """
    return (
        cpu.backend(kernels),
        triton_launch.backend(*(triton or (kernels, None)), triton_launch.WIDEST if reduces else None),
    )


def first_derivatives(operation: str, backward: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Wraps the backward of kernels, which takes the first `count` cotangents.

    It raises if it would have to be differentiated itself (PyTorch's `once_differentiable` silently leaves
    out second derivatives if no cotangent requires grad), returns no gradients without a cotangent, and
    runs outside `torch.autocast`, like its forward.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *cotangents: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{operation}: create_graph=True asks for second derivatives, which the kernels do not have; "
                "backend='reference' does"
            )
        given: Any = cotangents[:count]
        first = given[0] if count == 1 else stored(*given)
        if first is None:
            return (None,) * len(ctx.needs_input_grad)
        if count > 1 or first.is_neg():
            given = [dy.resolve_neg() if dy is not None and dy.is_neg() else dy for dy in given]
        try:
            if not torch._C._is_any_autocast_enabled():
                return backward(ctx, *given)
            with without_autocast(first.device):
                return backward(ctx, *given)
        except RuntimeError as error:
            if all(dy is None or torch._C._has_storage(dy) for dy in given):
                raise
            raise RuntimeError(
                f"{operation}: kernels cannot read a batch of cotangents (is_grads_batched=True, "
                "jacobian(vectorize=True), vmap); pass them one by one, or use backend='reference'"
            ) from error

    return wrapper


class _NoGraph:
    """A stand-in for an autograd.Function's context where no graph is recorded."""

    def __setattr__(self, name: str, value: Any) -> None: ...

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


_NO_GRAPH = _NoGraph()


class _Recorder(_NoGraph):
    """A stand-in for it that keeps what is to be saved."""

    saved: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        vars(self)["saved"] = tensors


def _aligned(duals: int, *arguments: Any) -> tuple[Any, ...]:
    """Pads the stored tangents of the first primals to the samples of the longest."""
    result = [*arguments]
    result[1 : 2 * duals : 2] = align(*arguments[1 : 2 * duals : 2])
    return tuple(result)


def _outside_autocast(run: Callable[..., Result], x: Tensor, *arguments: Any) -> Result:
    """Runs with `torch.autocast` off: the inputs' dtypes determine the computation."""
    with without_autocast(x.device):
        return run(x, *arguments)


class _KernelOperator:
    """The operator of a kernel function on any backend, such as imf_kernels::rms_norm_forward.

    A kernel fills tensors; its operator takes their layouts and returns them. Where Inductor (PyTorch 2.13)
    fuses loops of different shapes, it reads too early what an operator fills.
    """

    _made: ClassVar[dict[str, _KernelOperator]] = {}

    @classmethod
    def of(
        cls, name: str, schema: str, fake: Callable[..., Any] | None, lay_out: Callable[[Tensor], Tensor]
    ) -> _KernelOperator:
        """Returns the operator of that name: operations may share kernels."""
        if name not in cls._made:
            cls._made[name] = cls(name, schema, fake, lay_out)
        return cls._made[name]

    def __init__(
        self, name: str, schema: str, fake: Callable[..., Any] | None, lay_out: Callable[[Tensor], Tensor]
    ) -> None:
        self.backends: dict[str, tuple[Any, str]] = {}  # kernels, and the name of their function
        given, _, returned = schema.removeprefix("(").partition(") -> ")
        parameters = [parameter.rpartition(" ")[::2] for parameter in given.split(", ")]
        self._fills = ["!" in kind for kind, _ in parameters]
        names = [name for _, name in parameters]
        self._channels_last = names.index("channels_last") if "channels_last" in names else None
        self._lay_out = lay_out
        if any(self._fills):  # sizes and strides, and the dtype
            of_each = (
                f"SymInt[]? {name}, ScalarType? {name}_dtype" if "!" in kind else f"{kind} {name}"
                for kind, name in parameters
            )
            given, returned = ", ".join(of_each), "Tensor[]"
        self.operator = _define(name, f"({given}) -> {returned}")
        _LIBRARY.impl(name, self._launch, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")  # differentiated above
        fake = fake or (lambda *given: self._allocated(given)[1])
        torch.library.register_fake(f"imf_kernels::{name}", partial(_fake, fake), lib=_LIBRARY)

    def __call__(self, *arguments: Any, backend: str) -> Any:
        """Calls the operator like the kernel function; its results become the tensors to be filled."""
        given, filled = list[Any](), list[Tensor]()
        for x, fills in zip(arguments, self._fills, strict=True):
            if not fills:
                given.append(x)
            elif x is None:
                given += (None, None)
            else:
                given += ([*x.shape, *x.stride()], x.dtype)
                filled.append(x)
        results = self.operator(*given, backend=backend)
        for x, result in zip(filled, results if filled else (), strict=True):
            (x.copy_ if x._is_view() else x.set_)(result)
        return results

    def _allocated(self, given: Sequence[Any]) -> tuple[list[Any], list[Tensor]]:
        """Returns the kernel function's arguments, and those of them that it fills."""
        device = next(x.device for x in given if isinstance(x, Tensor))
        values, arguments, filled = iter(given), list[Any](), list[Tensor]()
        for x, fills in zip(values, self._fills, strict=False):
            if fills and (dtype := next(values)) is not None:
                dims = len(x) // 2
                x = torch.empty_strided(x[:dims], x[dims:], dtype=dtype, device=device)
                filled.append(x)
            arguments.append(x)
        return arguments, filled

    def _launch(self, *given: Any, backend: str) -> Any:
        """Restores the layout of tensors that compiled code passes in another than it was traced with."""
        arguments, filled = self._allocated(given)
        lay_out = self._lay_out
        if self._channels_last is not None:
            lay_out = partial(in_channel_order, channels_last=arguments[self._channels_last])
        laid_out = [
            lay_out(x.resolve_neg()) if isinstance(x, Tensor) and not fills else x
            for x, fills in zip(arguments, self._fills, strict=True)
        ]
        kernels, function = self.backends[backend]
        result = getattr(kernels, function)(*laid_out)
        return filled or result


# Types of a schema by annotation.
_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "bool": "bool",
    "float": "float",
    "int": "SymInt",
    "int | None": "SymInt?",
    "str": "str",
    "torch.dtype | None": "ScalarType?",
}


def _parameters(forward: Any) -> str:
    """Returns an operator's parameters: those of `forward` after `ctx` and `kernels`."""
    code, annotations = forward.__code__, forward.__annotations__
    return ", ".join(f"{_TYPES[annotations[name]]} {name}" for name in code.co_varnames[2 : code.co_argcount])


def _define(name: str, schema: str) -> Any:
    """Defines the operator imf_kernels::name, with the name of a backend as a further argument."""
    arguments, _, results = schema.partition(") -> ")
    # Kernels get dimensions in the trace's memory order.
    tags = torch.Tag.needs_fixed_stride_order
    _LIBRARY.define(f"{name}{arguments}, *, str backend) -> {results}", tags=tags)
    return getattr(torch.ops.imf_kernels, name).default


def _fake(function: Callable[..., Any], *arguments: Any, backend: str) -> Any:
    return function(*arguments)

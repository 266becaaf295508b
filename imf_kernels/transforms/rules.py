"""Rules by which operations of this library serve calls of PyTorch inside `imf_kernels.jvp`.

A rule has the signature of the function that it serves. It is called if an argument carries a tangent, with a
`Dual` instead of each such tensor, and returns `Dual`s too; or `NotServed`, if PyTorch's own forward-mode
rule must serve. Rules serve only calls that an operation takes as PyTorch does: PyTorch's own errors stay
PyTorch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from inspect import unwrap
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from imf_kernels.backends.dispatch import autocasts, cached_constant, traced_default
from imf_kernels.backends.layout import last_contiguous
from imf_kernels.dual import Dual, is_differentiable, map_both, tangent_graph, unpack
from imf_kernels.ops import attention, check, elementwise, group_norm, layer_norm, linear, rms_norm

Rule = Callable[..., Any]


class NotServed:
    """Result of a rule where PyTorch's own must serve, and why."""

    def __init__(self, why: str) -> None:
        self.why = why


_PARAMETER = NotServed("a parameter has a tangent, or is of a subclass of Tensor")
_DTYPE = NotServed("not of one dtype of float32, bfloat16 and float16")
_SHAPE = NotServed("a shape that PyTorch may take or refuse")
_ALSO = NotServed("a case that PyTorch sees to")
RULES: dict[Any, Rule] = {}
# Calls that would silently lose the tangent of an argument, and why or what to do.
REFUSED: dict[Any, str] = {}

# Operations on `Dual`s: PyTorch's dual tensors are unpacked before a rule is called.
_linear_of_dual = unwrap(linear.linear)
_attention_of_duals = unwrap(attention.scaled_dot_product_attention)
_gelu_of_dual = unwrap(elementwise.gelu)
_group_norm_of_dual = unwrap(group_norm.group_norm)
_layer_norm_of_dual = unwrap(layer_norm.layer_norm)
_rms_norm_of_dual = unwrap(rms_norm.rms_norm)
_silu_of_dual = unwrap(elementwise.silu)

# Dtypes that are served. Others, float64 first of all, stay with PyTorch.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def serves(*functions: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


def _plain(*tensors: Any, like: Tensor | None = None) -> bool:
    """Returns whether an operation takes these tensors (or `None`): of no subclass, without a tangent."""
    for x in tensors:  # a generator takes twice the time
        if x is not None and (
            type(x) not in (Tensor, torch.nn.Parameter) or (like is not None and x.dtype != like.dtype)
        ):
            return False
    return True


def _autocast_to(device: torch.device) -> torch.dtype | None:
    """Returns the dtype that `torch.autocast` casts products to on this device; `None` where it is off."""
    return torch.get_autocast_dtype(device.type) if autocasts(device) else None


def _cast(x: Any, dtype: torch.dtype | None) -> Any:
    if x is None or dtype is None or x.dtype not in _DTYPES or x.dtype == dtype:
        return x
    return map_both(lambda t: t.to(dtype), x)


@serves(F.linear)
def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(input, Dual) or not _plain(weight, bias):
        return _PARAMETER
    x, w, b = input, weight, bias
    if (dtype := _autocast_to(input.device)) is not None:
        x, w, b = _cast(x, dtype), _cast(w, dtype), _cast(b, dtype)
    if x.dtype not in _DTYPES or w.dtype != x.dtype or (b is not None and b.dtype != x.dtype):
        return _DTYPE
    if weight.dim() != 2 or not input.dim() or input.shape[-1] != weight.shape[1]:
        return _SHAPE
    if bias is not None and bias.shape != weight.shape[:1]:
        return _SHAPE
    return _linear_of_dual(x, w, b)


@serves(F.scaled_dot_product_attention)
def _scaled_dot_product_attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    dtype = _autocast_to(query.device)
    q, k, v = (_cast(x, dtype) for x in (query, key, value))
    if attn_mask is not None and (not _plain(attn_mask) or attn_mask.requires_grad):
        return NotServed("a mask that requires grad or has a tangent")
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32, q.dtype):
        return NotServed("a mask that is neither of bool nor of float32 nor of the query's dtype")
    if dropout_p:
        return NotServed("dropout of the weights")
    if is_causal and attn_mask is not None:
        return _ALSO
    if q.dtype not in _DTYPES or any(x.dtype != q.dtype for x in (k, v)):
        return _DTYPE
    sizes = [tuple(x.shape[:-2]) for x in (q, k, v)]  # (..., H); none of two dimensions
    if enable_gqa:
        if () in sizes or not sizes[1][-1] or sizes[0][-1] % sizes[1][-1]:
            return _SHAPE
        if sizes[1][-1] != sizes[2][-1]:
            return NotServed("key and value of different numbers of heads")
        batch, (heads, kv_heads, _) = _broadcast(*(s[:-1] for s in sizes)), (s[-1] for s in sizes)
        lead = None if batch is None else (*batch, heads)
    else:
        lead = _broadcast(*sizes)
        batch, heads = (lead[:-1], lead[-1]) if lead else (lead, 1)
        kv_heads = 1 if all(s[-1:] in ((), (1,)) for s in sizes[1:]) else heads
    if lead is None or batch is None:
        return _SHAPE
    if attn_mask is not None and _broadcast(attn_mask.shape[:-2], lead) != lead:
        return _SHAPE  # PyTorch refuses it
    if attn_mask is not None and len(batch) > 1 and attn_mask.dim() > 3:
        attn_mask = attn_mask.expand(*batch, *attn_mask.shape[-3:]).flatten(0, -4)
    q, k, v = (map_both(last_contiguous, x) for x in (q, k, v))
    q, k, v = (_of_four_dims(x, batch, n) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    out = _attention_of_duals(q, k, v, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=True)
    return out if len(lead) == 2 else map_both(lambda t: t.reshape(*lead, *t.shape[-2:]), out)


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns what shapes broadcast to, `None` where they do not."""
    if all(shape == shapes[0] for shape in shapes):
        return shapes[0]
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        return None


def _of_four_dims(x: Any, batch: tuple[int, ...], heads: int) -> Any:
    """Returns x [..., L, D] as [B, H, L, D], broadcast to sizes of the batch and heads."""
    shape = (*batch, heads, *x.shape[-2:])
    if len(batch) == 1 and tuple(x.shape) == shape:
        return x
    return map_both(lambda t: t.expand(shape).reshape(math.prod(batch), *shape[-3:]), x)


def _fusible() -> str | None:
    """Returns the backend of calls that torch.compile fuses with their neighbours: "reference" while it
    traces, unless another is set.

    Kernels would take results of their own, in a memory order of their own, and keep them for backward.
    """
    return "reference" if torch.compiler.is_compiling() and traced_default() is None else None


@serves(F.silu)
def _silu(input: Any, inplace: bool = False) -> Any:
    if inplace:
        return NotServed("in place")
    return _silu_of_dual(input, backend=_fusible()) if input.dtype in _DTYPES else _DTYPE


@serves(F.gelu)
def _gelu(input: Any, approximate: str = "none") -> Any:
    if input.dtype not in _DTYPES:
        return _DTYPE
    return _gelu_of_dual(input, approximate=approximate, backend=_fusible())


@serves(F.layer_norm)
def _layer_norm(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    """Serves float64 too: torch.compile cannot trace PyTorch's own rule."""
    if not isinstance(input, Dual) or not _plain(weight, bias):
        return _PARAMETER
    if _autocast_to(input.device) is not None and _autocast_widens_layer_norm(input.device.type):
        input, weight, bias = (_cast(x, torch.float32) for x in (input, weight, bias))
    dims, mixed = len(normalized_shape), input.device.type == "cpu" and input.dtype in check.HALVES
    for parameter in (weight, bias):
        if not _plain(parameter, like=input.primal) and not (mixed and parameter.dtype == torch.float32):
            return _DTYPE
    if not dims or tuple(normalized_shape) != tuple(input.shape[-dims:]):
        return _SHAPE
    if dims == 1:
        x = map_both(last_contiguous, input)
        return _layer_norm_of_dual(x, list(normalized_shape), weight, bias, eps, backend=_fusible())
    x = map_both(lambda t: last_contiguous(t.reshape(*t.shape[:-dims], -1)), input)
    weight, bias = (None if p is None else p.reshape(-1) for p in (weight, bias))
    y = _layer_norm_of_dual(x, [x.shape[-1]], weight, bias, eps, backend=_fusible())
    return map_both(lambda t: t.reshape(input.shape), y)


@cached_constant
def _autocast_widens_layer_norm(device: str) -> bool:
    """Returns whether `torch.autocast` computes layer norms of 16-bit tensors in fp32 on this device type."""
    x = torch.zeros(1, 1, dtype=torch.bfloat16, device=device)
    with torch.autocast(device, torch.bfloat16):
        return F.layer_norm(x, (1,)).dtype == torch.float32


@serves(F.rms_norm, torch.rms_norm)
def _rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    if not isinstance(input, Dual) or not _plain(weight):
        return _PARAMETER
    if input.dtype not in _DTYPES or not _plain(weight, like=input.primal):
        return _DTYPE
    dims = len(normalized_shape)
    if not dims or tuple(normalized_shape) != tuple(input.shape[-dims:]):
        return _SHAPE
    if weight is not None and weight.shape != input.shape[-dims:]:
        return _SHAPE
    if eps is None:
        eps = _default_eps_of_rms_norm(input.dtype)
    x = map_both(lambda t: last_contiguous(t.flatten(-dims)), input)
    weight = input.primal.new_ones(x.shape[-1]) if weight is None else weight.flatten()
    y = _rms_norm_of_dual(x, weight, eps, backend=_fusible())
    return y if dims == 1 else map_both(lambda t: t.reshape(input.shape), y)


@cached_constant
def _default_eps_of_rms_norm(dtype: torch.dtype) -> float:
    """Returns what F.rms_norm adds by default: the epsilon of a dtype, or of float32 which it computes in."""
    small = 2.0**-20
    y = F.rms_norm(torch.full((1,), small, dtype=dtype, device="cpu"), (1,)).item()
    choices = (torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    return min(choices, key=lambda eps: abs(small / math.sqrt(small**2 + eps) - y))


@serves(F.group_norm)
def _group_norm(input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    """Serves float64 too: PyTorch's rule fails on non-contiguous inputs."""
    if not isinstance(input, Dual) or not _plain(weight, bias):
        return _PARAMETER
    if _autocast_to(input.device) is not None and _autocast_widens_group_norm(input.device.type):
        input, weight, bias = (_cast(x, torch.float32) for x in (input, weight, bias))
    if not _takes_parameters(input, weight, bias):
        return _DTYPE
    if (
        len(input.shape) < 2
        or num_groups < 1
        or input.shape[1] % num_groups
        or not _per_channel(input, weight, bias)
    ):
        return _SHAPE
    if input.shape[0] * (input.shape[1] // num_groups) * math.prod(input.shape[2:]) == 1:
        return _SHAPE
    if not _group_norm_keeps_channels_last(input.device.type):
        input = map_both(Tensor.contiguous, input)
    return _group_norm_of_dual(input, num_groups, weight, bias, eps)


def _takes_parameters(input: Dual, *parameters: Tensor | None) -> bool:
    """Returns whether PyTorch's norms take parameters of these dtypes: the input's, or float32 on CPUs."""
    if all(_plain(p, like=input.primal) for p in parameters):
        return True
    mixed = input.device.type == "cpu" and input.dtype in check.HALVES
    return mixed and all(p is None or p.dtype == torch.float32 for p in parameters)


def _per_channel(input: Dual, *parameters: Tensor | None) -> bool:
    return all(p is None or p.shape == input.shape[1:2] for p in parameters)


@cached_constant
def _autocast_widens_group_norm(device: str) -> bool:
    """Returns whether `torch.autocast` computes group norms of 16-bit tensors in fp32 on this device type."""
    x = torch.zeros(1, 2, dtype=torch.bfloat16, device=device)
    with torch.autocast(device, torch.bfloat16):
        return F.group_norm(x, 1).dtype == torch.float32


@cached_constant
def _group_norm_keeps_channels_last(device: str) -> bool:
    """Returns whether F.group_norm of images with their channels last gives such ones on this device type."""
    x = torch.zeros(1, 2, 2, 2, device=device).contiguous(memory_format=torch.channels_last)
    return F.group_norm(x, 1).is_contiguous(memory_format=torch.channels_last)


@serves(F.instance_norm)
def _instance_norm(
    input: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
    use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    if not isinstance(input, Dual) or not _plain(running_mean, running_var, weight, bias):
        return _PARAMETER
    if not _takes_parameters(input, weight, bias):
        return _DTYPE
    if len(input.shape) < 3 or not _per_channel(input, running_mean, running_var, weight, bias):
        return _SHAPE
    input = map_both(Tensor.contiguous, input)  # as PyTorch does
    if not use_input_stats:
        if running_mean is None or running_var is None:
            return _SHAPE
        return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    if math.prod(input.shape[2:]) < 2 or not input.shape[1]:
        return _SHAPE
    update_running_statistics(input.primal, running_mean, running_var, momentum)
    return _group_norm_of_dual(input, input.shape[1], weight, bias, eps)


@torch.no_grad()
def update_running_statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> None:
    """Moves them towards the statistics of x [N, C, ...], of each instance, as F.instance_norm does."""
    if running_mean is None and running_var is None:
        return
    var, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)).flatten(2), -1)
    for running, now in ((running_mean, mean), (running_var, var)):
        if running is not None:
            running.lerp_(now.mean(0).to(running.dtype), momentum)


@serves(F.batch_norm)
def _batch_norm(
    input: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    """Calls PyTorch's kernels for the tangent, which torch.compile cannot trace inside PyTorch's rule.

    In training the derivative of the normalised channels is a symmetric matrix, and weights are the same for
    a channel's values: the tangent is what backward makes of ẋ. In evaluation the function is linear in x.
    """
    if not isinstance(input, Dual) or not _plain(running_mean, running_var, weight, bias):
        if training and is_differentiable(input, weight, bias):
            raise NotImplementedError(
                "imf_kernels.jvp: in training, the tangent of batch_norm along its parameters has a wrong "
                "gradient in PyTorch; without a tangent of theirs it has a right one"
            )
        return _PARAMETER
    x, x_dot = cast(tuple[Tensor, Tensor], unpack(input))
    differentiable = input.differentiable
    if not training:
        y = F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
        with tangent_graph(differentiable):
            no_mean = torch.zeros_like(running_mean)
            y_dot = F.batch_norm(x_dot, no_mean, running_var, weight, None, False, momentum, eps)
            return Dual(y, y_dot, differentiable=differentiable)
    if eps <= 0 or len(x.shape) < 2 or math.prod(x.shape) == x.shape[1]:
        return _SHAPE
    if differentiable:
        y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        in_channels, in_channels_dot = (part.movedim(1, 0).flatten(1) for part in (x, x_dot))
        _, n_dot = layer_norm.normalize(True, in_channels, in_channels_dot, eps)
        if weight is not None:
            n_dot = cast(Tensor, n_dot) * weight.unsqueeze(1)
        y_dot = cast(Tensor, n_dot).reshape(x.movedim(1, 0).shape).movedim(0, 1).contiguous()
        return Dual(y, y_dot.to(y.dtype), differentiable=True)
    options = weight, running_mean, running_var
    y, mean, rstd, reserve, kind = torch._batch_norm_impl_index(
        x, weight, bias, running_mean, running_var, training, momentum, eps, torch.backends.cudnn.enabled
    )
    with torch.no_grad():
        y_dot, _, _ = torch.ops.aten._batch_norm_impl_index_backward(
            kind, x, x_dot, *options, mean, rstd, training, eps, [True, False, False], reserve
        )
        return Dual(y, y_dot)


# While torch.compile traces they get zeros, at the cost of filling them: see pointwise.py.
ZEROS_WHILE_COMPILING = (
    *(torch.cat, torch.concat, torch.stack, torch.hstack, torch.vstack),
    *(torch.maximum, torch.minimum, Tensor.maximum, Tensor.minimum),
)


# Functions that PyTorch's forward mode, and so torch.func.jvp, silently gets wrong: found by
# tests/transforms/test_jvp_sweep.py, and refused here. Not every release of PyTorch has all of them.
_WITHOUT_DERIVATIVE = [
    *("airy_ai", "bessel_j0", "bessel_j1", "bessel_y0", "bessel_y1", "spherical_bessel_j0"),
    *("modified_bessel_i0", "modified_bessel_i1", "modified_bessel_k0", "modified_bessel_k1"),
    *("scaled_modified_bessel_k0", "scaled_modified_bessel_k1"),
    *(f"chebyshev_polynomial_{kind}" for kind in "tuvw"),
    *(f"shifted_chebyshev_polynomial_{kind}" for kind in "tuvw"),
    *("hermite_polynomial_h", "hermite_polynomial_he", "laguerre_polynomial_l", "legendre_polynomial_p"),
]
_STATISTICS = (
    "native_layer_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_batch_norm_with_update",
)
_LEAVES_PYTORCH = (
    *("numpy", "__array__", "__dlpack__", "__deepcopy__", "storage", "untyped_storage", "data_ptr"),
    *("apply_", "map_", "map2_"),
)
CONTROL_FLOW = "torch.cond, while_loop, scan and map have no forward-mode rule; Python's own if and for do"
_WRITES_TRUTH_VALUES = ("logical_not_", "logical_and_", "logical_or_", "logical_xor_")


def _named(module: Any, *names: str) -> Iterator[tuple[str, Any]]:
    return ((name, getattr(module, name)) for name in names if hasattr(module, name))


for _name, _function in _named(torch.special, *_WITHOUT_DERIVATIVE):
    REFUSED[_function] = f"torch.special.{_name} has no derivative in PyTorch, which would give zeros"
for _module in (torch, torch.ops.aten):
    for _name, _function in _named(_module, *_STATISTICS):
        REFUSED[_function] = (
            f"{_name} gives its statistics no tangent; use the function of torch.nn.functional"
        )
for _name, _function in _named(Tensor, *_WRITES_TRUTH_VALUES):
    REFUSED[_function] = f"torch.Tensor.{_name} would keep the tangent of what it overwrites"
for _name, _function in _named(F, "linear_cross_entropy"):
    REFUSED[_function] = f"torch.nn.functional.{_name} has no forward-mode rule; cross_entropy(linear(x)) has"
REFUSED[torch.normal] = (
    "torch.normal gives no tangent to its parameters; mean + std * torch.randn_like(mean) does"
)
WITHOUT_RULE = dict(REFUSED)
for _name, _function in _named(Tensor, *_LEAVES_PYTORCH):
    REFUSED[_function] = (
        f"torch.Tensor.{_name} would leave the tangent behind; call it on x.detach(), where none is needed"
    )
REFUSED_WHILE_COMPILING = dict(REFUSED)  # torch.compile cannot look up the next key
REFUSED[Tensor.data.__set__] = (  # type: ignore[attr-defined]
    "the data of a tensor is set, which would keep the tangent it had; write with copy_"
)
for _function in (torch.autograd.grad, torch.autograd.backward, Tensor.backward):
    REFUSED[_function] = (
        f"{_function.__qualname__} of what has a tangent gives a gradient without one; torch.func.grad and "
        "torch.func.vjp inside give it one"
    )
if hasattr(Tensor, "__cuda_array_interface__"):
    REFUSED[Tensor.__cuda_array_interface__.__get__] = (
        "what reads __cuda_array_interface__ would leave the tangent behind; hand it x.detach()"
    )


def _refuse_if(case: Callable[..., bool], reason: str) -> Rule:
    """Makes a rule that refuses some of a function's calls and leaves all others to PyTorch."""

    def rule(*args: Any, **kwargs: Any) -> Any:
        if case(*args, **kwargs):
            raise NotImplementedError(f"imf_kernels.jvp: {reason}")
        return _ALSO

    return rule


RULES |= {
    **dict.fromkeys(
        (torch.scatter_reduce, Tensor.scatter_reduce, Tensor.scatter_reduce_),
        _refuse_if(
            lambda input, dim, index, src, reduce, **options: reduce == "prod",
            "scatter_reduce with reduce='prod' has no tangent in PyTorch, which would give zeros",
        ),
    ),
    torch.linalg.lstsq: _refuse_if(
        lambda A, B, rcond=None, *, driver=None: driver in ("gelss", "gelsd"),
        "linalg.lstsq with driver='gelss' or 'gelsd' gives its singular values no tangent; the other drivers "
        "return none",
    ),
    **dict.fromkeys(
        (F.nll_loss, F.cross_entropy),
        _refuse_if(
            lambda input, target, weight=None, *args, **kwargs: isinstance(weight, Dual),
            "PyTorch would leave out the tangent of a loss's class weights; detach the weights, or write the "
            "weighted sum",
        ),
    ),
    F.embedding: _refuse_if(
        lambda input, weight, padding_idx=None, max_norm=None, *args, **kwargs: max_norm is not None,
        "embedding with max_norm scales its table in place, which PyTorch leaves out of its tangent",
    ),
}

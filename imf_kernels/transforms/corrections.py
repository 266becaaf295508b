"""Rules for calls whose own rule in PyTorch (2.13) silently gives a wrong tangent."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from imf_kernels.dual import Dual, is_differentiable, pack, tangent_graph, unpack
from imf_kernels.transforms.dual_tensors import carries_tangent, primal_of
from imf_kernels.transforms.rules import WITHOUT_RULE, NotServed, serves, update_running_statistics


def _of(x: Any) -> tuple[Tensor, Tensor]:
    """Returns primal and tangent, zeros for none."""
    x, x_dot = unpack(x)
    return x, torch.zeros_like(x) if x_dot is None else x_dot


def _factored(factor: Tensor, tangent: Tensor, upper: bool) -> Tensor:
    """Returns the tangent of A = L Lᴴ, or Uᴴ U, for the triangle that PyTorch reads."""
    L, L_dot = (t.triu().mH if upper else t.tril() for t in (factor, tangent))
    half = L_dot @ L.mH
    return half + half.mH


@serves(torch.cholesky_inverse, Tensor.cholesky_inverse)
def _cholesky_inverse(input: Any, upper: bool = False) -> Any:
    L, L_dot = _of(input)
    y = torch.cholesky_inverse(L, upper)
    with tangent_graph(input.differentiable):
        return pack(y, -y @ _factored(L, L_dot, upper) @ y, input)


@serves(torch.cholesky_solve, Tensor.cholesky_solve)
def _cholesky_solve(input: Any, input2: Any, upper: bool = False) -> Any:
    (b, b_dot), (L, L_dot) = _of(input), _of(input2)
    y = torch.cholesky_solve(b, L, upper)
    with tangent_graph(is_differentiable(input, input2)):
        y_dot = torch.cholesky_solve(b_dot - _factored(L, L_dot, upper) @ y, L, upper)
        return pack(y, y_dot, input, input2)


@serves(torch.logcumsumexp, Tensor.logcumsumexp)
def _logcumsumexp(input: Any, dim: int) -> Any:
    """Computes ẏ_i = exp(y_{i−1} − y_i) ẏ_{i−1} + exp(x_i − y_i) ẋ_i, by a parallel scan.

    PyTorch's exp(x − max) is 0 for spread logits. After steps 1, 2, 4 … position i spans as many values.
    """
    x, x_dot = cast(tuple[Tensor, Tensor], unpack(input))
    y = torch.logcumsumexp(x, dim)
    if x.dim() == 0:
        return pack(y, x_dot, input)
    with tangent_graph(input.differentiable):
        x, x_dot, whole = (t.movedim(dim, -1) for t in (x, x_dot, y))
        # Where all values so far are -inf the weights are NaN, and become 0.
        weight, y_dot = torch.zeros_like(x), (x - whole).exp().nan_to_num(0.0) * x_dot
        weight[..., 1:] = (whole[..., :-1] - whole[..., 1:]).exp().nan_to_num(0.0)
        step = 1
        while step < x.shape[-1]:
            taken = y_dot[..., step:] + weight[..., step:] * y_dot[..., :-step]
            reach = weight[..., step:] * weight[..., :-step]
            y_dot = torch.cat((y_dot[..., :step], taken), -1)
            weight = torch.cat((weight[..., :step], reach), -1)
            step *= 2
        return pack(y, y_dot.movedim(-1, dim).contiguous(), input)


@serves(torch.linalg.det, torch.det, Tensor.det)
def _det(A: Any) -> Any:
    """Computes ẏ = Σ adj(A)ᵀ ⊙ Ȧ, the adjugate by the singular values: right even if A has no inverse.

    Singular values that are equal have no gradients: a differentiable ẏ is y tr(A⁻¹ Ȧ), of matrices with an
    inverse.
    """
    differentiable = is_differentiable(A)
    A, A_dot = cast(tuple[Tensor, Tensor], unpack(A))
    y = torch.linalg.det(A)
    if differentiable:
        trace = torch.linalg.solve(A, A_dot).diagonal(dim1=-2, dim2=-1).sum(-1)
        return Dual(y, y * trace, differentiable=True)
    with torch.no_grad():
        U, s, Vh = torch.linalg.svd(A)
        n = s.shape[-1]
        others = s.unsqueeze(-2).expand(*s.shape[:-1], n, n).clone()
        others.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        cofactors = ((U * others.prod(-1).unsqueeze(-2)) @ Vh).conj()
        return Dual(y, torch.linalg.det(U @ Vh) * (cofactors * A_dot).sum((-2, -1)))


@serves(torch.cdist)
def _cdist(
    x1: Any, x2: Any, p: float = 2.0, compute_mode: str = "use_mm_for_euclid_dist_if_necessary"
) -> Any:
    """Serves Euclidean distances, which have no rule; by matrix products where PyTorch uses them."""
    if p != 2:
        return NotServed("of another p than 2")
    (a, a_dot), (b, b_dot) = _of(x1), _of(x2)
    y = torch.cdist(a, b, p, compute_mode)
    many = compute_mode == "use_mm_for_euclid_dist_if_necessary" and max(a.shape[-2], b.shape[-2]) > 25
    differentiable = is_differentiable(x1, x2)
    with tangent_graph(differentiable), torch.autocast(y.device.type, enabled=False):
        a, a_dot, b, b_dot = (t.to(y.dtype) for t in (a, a_dot, b, b_dot))
        if many or compute_mode == "use_mm_for_euclid_dist":
            own = (a * a_dot).sum(-1).unsqueeze(-1) + (b * b_dot).sum(-1).unsqueeze(-2)
            y_dot = own - a_dot @ b.mT - a @ b_dot.mT
        else:
            apart = (t.unsqueeze(-2) - u.unsqueeze(-3) for t, u in ((a, b), (a_dot, b_dot)))
            y_dot = torch.linalg.vecdot(*apart)
        y_dot = y_dot / torch.where(y > 0, y, 1.0)  # without 0 / 0, whose gradient is NaN
        return Dual(y, torch.where(y > 0, y_dot, 0.0), differentiable=differentiable)


# The functions corrected above. Inside a vmap or grad a tensor cannot be made a `Dual`.
WRONG_IN_PYTORCH: list[Any] = [
    *(torch.cholesky_inverse, Tensor.cholesky_inverse, torch.cholesky_solve, Tensor.cholesky_solve),
    *(torch.logcumsumexp, Tensor.logcumsumexp, torch.linalg.det, torch.det, Tensor.det),
]
REFUSED_INSIDE_TRANSFORMS = {
    **WITHOUT_RULE,
    **{
        function: f"{function.__name__} inside a transform of torch.func (vmap, grad …) has a wrong rule in "
        "PyTorch; outside of the transform it is corrected"
        for function in WRONG_IN_PYTORCH
    },
}

# Replacements with correct rules, for calls that no rule of ours serves.
REWRITTEN: dict[Any, Callable[..., Any]] = {}


def _silu(input: Tensor, inplace: bool = False) -> Tensor:
    if not input.is_complex():
        return F.silu(input, inplace)
    y = input * torch.sigmoid(input)  # the rule of silu leaves out a conjugate
    return input.copy_(y) if inplace else y


def _triangular_solve(
    input: Tensor, A: Tensor, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> Any:
    """Calls solve_triangular: the rule of triangular_solve ignores both options."""
    of = A.mT if transpose else A
    x = torch.linalg.solve_triangular(of, input, upper=upper != transpose, unitriangular=unitriangular)
    return torch.return_types.triangular_solve((x, A.clone()))


REWRITTEN[F.silu] = REWRITTEN[torch._C._nn.silu] = _silu
REWRITTEN[torch._C._nn.silu_] = partial(_silu, inplace=True)
REWRITTEN[torch.triangular_solve] = REWRITTEN[Tensor.triangular_solve] = _triangular_solve


def _without_libraries(func: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a recurrent layer on PyTorch's own kernels: those of oneDNN and cuDNN have no rule."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not any(map(carries_tangent, pytree.tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        mkldnn, cudnn = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        torch._C._set_cudnn_enabled(False)
        try:
            return func(*args, **kwargs)
        finally:
            torch._C._set_mkldnn_enabled(mkldnn)
            torch._C._set_cudnn_enabled(cudnn)

    return call


for _func in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu):
    REWRITTEN[_func] = _without_libraries(_func)


# PyTorch (2.13) takes parts of these rules for constants, or divides by zero in their backward: a gradient
# through their tangents would be wrong, and is refused. Found by tests/transforms/test_differentiable.py.
_CONSTANT_PARTS = {
    **dict.fromkeys(
        (torch.linalg.solve, torch.linalg.solve_ex, torch.linalg.tensorsolve),
        "torch.linalg.inv(A) @ B has a right one",
    ),
    **dict.fromkeys(
        (torch.slogdet, torch.linalg.slogdet, torch.logdet, Tensor.slogdet, Tensor.logdet),
        "torch.linalg.det(A) has a right one",
    ),
    **dict.fromkeys(
        (torch.linalg.householder_product, torch.orgqr, Tensor.orgqr, torch.linalg.eigh),
        "differentiate without it",
    ),
    **dict.fromkeys(
        (F.layer_norm, torch.layer_norm),
        "with parameters that have no tangent, over the last dimensions, it has a right one",
    ),
    torch.batch_norm: "that of torch.nn.functional.batch_norm has a right one",
    torch.instance_norm: "that of torch.nn.functional.instance_norm has a right one",
}
REFUSED_IF_DIFFERENTIABLE = {
    function: f"the tangent of {function.__name__} has a wrong gradient in PyTorch; {instead}"
    for function, instead in _CONSTANT_PARTS.items()
}


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    a, b = input.chunk(2, dim)
    return a * torch.sigmoid(b)


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    y = F.hardtanh(input / 6 + 0.5, 0.0, 1.0)
    return input.copy_(y) if inplace else y


def _instance_norm(
    input: Tensor, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
    use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Of parameters with a tangent."""
    if not use_input_stats or math.prod(input.shape[2:]) < 2:  # linear in x, or refused by PyTorch
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    update_running_statistics(primal_of(input), running_mean, running_var, momentum)
    return F.group_norm(input, input.shape[1], weight, bias, eps)


# Replacements for calls whose rule in PyTorch has no derivative of its own, or a wrong one.
REWRITTEN_IF_DIFFERENTIABLE: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((F.glu, torch._C._nn.glu), _glu),
    F.instance_norm: _instance_norm,
    **dict.fromkeys((F.hardsigmoid, torch._C._nn.hardsigmoid), _hardsigmoid),
}
# Calls with rules that write into what their own backward needs, unless a dispatch mode is active.
WRITES_INTO_ITS_GRAPH = {
    *(torch.softmax, Tensor.softmax, F.softmax, F.softmin, F.gumbel_softmax, torch.special.softmax),
    *(torch.log_softmax, Tensor.log_softmax, F.log_softmax, torch.special.log_softmax),
    *(torch.logsumexp, Tensor.logsumexp, torch.special.logsumexp, F.cross_entropy, F.normalize),
    *(F.scaled_dot_product_attention, F.multi_head_attention_forward),
}


# While torch.compile traces, PyTorch's rules (2.13) multiply the zeros of an operand without a tangent by
# these factors, which makes compiled code crash: the factors are multiplied in before.
REWRITTEN_WHILE_COMPILING: dict[Any, Callable[..., Any]] = {}


def _factored_in(
    func: Any, names: tuple[str, ...], factors: tuple[str, ...], plain: Callable[..., Any]
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        given = [kwargs.get(name, 1) for name in factors]
        known = len(args) <= len(names) and {*kwargs} <= {*names, *factors}
        if not known or all(factor == 1 for factor in given):
            return func(*args, **kwargs)
        return plain(*args, *(kwargs[name] for name in names[len(args) :]), *given)

    return call


def _added(sign: int) -> Callable[..., Any]:
    return lambda x, y, alpha: x + (sign * alpha) * y


def _added_in_place(sign: int) -> Callable[..., Any]:
    return lambda x, y, alpha: x.add_((sign * alpha) * y)


def _product_added_in_place(product: Callable[..., Any]) -> Callable[..., Any]:
    def plain(x: Tensor, a: Tensor, b: Tensor, beta: Any, alpha: Any) -> Tensor:
        return (x.mul_(beta) if beta != 0 else x.zero_()).add_(alpha * product(a, b))

    return plain


def _complete(name: str, names: tuple[str, ...], factors: tuple[str, ...], plain: Any, in_place: Any) -> None:
    for func in (getattr(torch, name), getattr(Tensor, name)):
        REWRITTEN_WHILE_COMPILING[func] = _factored_in(func, names, factors, plain)
    func = getattr(Tensor, f"{name}_")
    REWRITTEN_WHILE_COMPILING[func] = _factored_in(func, names, factors, in_place)


for _name, _sign in (("add", 1), ("sub", -1), ("subtract", -1)):
    _complete(_name, ("input", "other"), ("alpha",), _added(_sign), _added_in_place(_sign))
_complete(
    "addcmul",
    ("input", "tensor1", "tensor2"),
    ("value",),
    lambda x, a, b, value: x + value * (a * b),
    lambda x, a, b, value: x.add_(value * (a * b)),
)
for _name, _operands, _product in (
    ("addmm", ("mat1", "mat2"), torch.mm),
    ("baddbmm", ("batch1", "batch2"), torch.bmm),
    ("addbmm", ("batch1", "batch2"), lambda a, b: torch.bmm(a, b).sum(0)),
    ("addmv", ("mat", "vec"), torch.mv),
    ("addr", ("vec1", "vec2"), torch.outer),
):
    # Out of place products.py serves them.
    REWRITTEN_WHILE_COMPILING[getattr(Tensor, f"{_name}_")] = _factored_in(
        getattr(Tensor, f"{_name}_"),
        ("input", *_operands),
        ("beta", "alpha"),
        _product_added_in_place(_product),
    )

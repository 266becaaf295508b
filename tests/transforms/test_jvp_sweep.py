"""Every call in PyTorch's own database of operators inside `imf_kernels.jvp`: right, or a clear error.

The truth is differences in float64 and complex128. A call is tried as a function, as a method and in place,
with every floating-point or complex tensor among its arguments moving; what raises must raise an error that
says why. At edges (zeros, ties, infinities and the like) the tangent has to lie between the differences of
both sides.
"""

from __future__ import annotations

import collections
import functools
import itertools
import sys
import warnings

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import imf_kernels as ik

pytest.importorskip("expecttest", reason="PyTorch's database of operators needs expecttest")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

# What cannot be compared: values that nobody wrote, or that lie outside the tensor.
NO_VALUES = {
    *("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"),
    *("resize_", "resize_as_", "as_strided.partial_views"),
}
# Further arguments are labels or thresholds: results jump with them.
FIRST_MOVES = {
    *("nn.functional.hinge_embedding_loss", "nn.functional.cosine_embedding_loss"),
    *("linalg.pinv", "linalg.matrix_rank"),
}

OPS = [
    op for op in op_db
    if torch.float64 in op.dtypes and not {op.name, f"{op.name}.{op.variant_test_name}"} & NO_VALUES
]  # fmt: skip
MOVING = (torch.float64, torch.complex128)
STEP = 1e-6
NEARBY = 60


def _with_infinity(x):
    return (
        x.reshape(-1).index_fill(0, torch.zeros(min(x.numel(), 1), dtype=int), float("inf")).reshape(x.shape)
    )


# What a sample's tensors that move become.
EDGES = {
    "zeros": torch.zeros_like,
    "equal": torch.ones_like,  # ties; matrices are singular
    "ties": lambda x: torch.complex(x.real.round(), x.imag.round()) if x.is_complex() else x.round(),
    "far apart": lambda x: 200 * x,
    "infinity": _with_infinity,
    "empty": lambda x: x[:0] if x.dim() else x,
}
VARIANTS = {
    "function": lambda op: op.op,
    "method": lambda op: op.method_variant,
    "in place": lambda op: op.inplace_variant,
}


class Moving:
    """A call as a function of those of its arguments that move."""

    def __init__(self, op, call, sample, in_place, edge=None):
        # The wrapper keeps matrices symmetric or triangular that are taken to be, and the sample says what of
        # a result is defined: not the phases of eigenvectors.
        self.defined = sample.output_process_fn_grad
        self.call, self.in_place = functools.partial(op.gradcheck_wrapper, call), in_place
        leaves, self.structure = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        self.leaves = [x.detach() if isinstance(x, Tensor) else x for x in leaves]
        self.places = [
            i for i, x in enumerate(self.leaves)
            if type(x) is Tensor and x.dtype in MOVING and x.layout == torch.strided
            and (i == 0 or op.name not in FIRST_MOVES)
        ]  # fmt: skip
        self.edge = edge
        self.primals = tuple(EDGES[edge](self.leaves[i]) if edge else self.leaves[i] for i in self.places)
        generator = torch.Generator().manual_seed(0)
        self.tangents = tuple(torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in self.primals)

    def __call__(self, *moving):
        leaves = list(self.leaves)
        for i, x in zip(self.places, moving, strict=True):
            leaves[i] = x.clone() if self.in_place else x
        first, args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        torch.manual_seed(0)
        result = self.defined(self.call(first, *args, **kwargs))
        return tuple(y for y in pytree.tree_leaves(result) if isinstance(y, Tensor) and y.dtype in MOVING)

    def at(self, step, away=0.0, seed=0):
        """Along the tangents, from the primals or from a place nearby."""
        generator = torch.Generator().manual_seed(seed)
        return self(
            *(
                x + step * x_dot + away * torch.randn(x.shape, generator=generator, dtype=x.dtype)
                for x, x_dot in zip(self.primals, self.tangents, strict=True)
            )
        )


def outcome(function):
    """ "right", "wrong: …", "refused: …" of a call, or `None` where there is nothing to compare."""
    if function.edge and sum(x.numel() for x in function.primals) > NEARBY:
        return None  # not each of so many would come first nearby
    try:
        slopes = [differences(function)] if function.edge is None else _around(function)
    except Exception:
        return None  # not a sample that moves
    if not function.primals or not slopes[0]:
        return None
    try:
        _, tangents = ik.jvp(function, function.primals, function.tangents)
    except Exception as error:
        return f"refused: {type(error).__name__}: {error}"
    for got, *found in zip(tangents, *slopes, strict=True):
        got, around = _real(got), torch.stack([_real(x) for x in found])
        known = around.isfinite().all(0) & got.isfinite()
        if not known.any():
            continue
        got, around = got[known], around[:, known]
        low, high, scale = around.amin(0), around.amax(0), around.abs().max()
        error = torch.maximum(low - got, got - high).max()
        if error > 1e-4 * (1 + scale):
            return f"wrong: off by {error:.2g} of {scale:.2g}"
    return "right"


def differences(function, *place):
    above, below = function.at(STEP, *place), function.at(-STEP, *place)
    return [(a - b) / (2 * STEP) for a, b in zip(above, below, strict=True)]


def _around(function):
    """Slopes on the two sides of an edge, and at places nearby, where each of what is tied comes first."""
    here, above, below = function.at(0.0), function.at(STEP), function.at(-STEP)
    sides = [
        [(b - a) / STEP for a, b in zip(first, second, strict=True)]
        for first, second in ((below, here), (here, above))
    ]
    return [*sides, *(differences(function, 100 * STEP, seed) for seed in range(NEARBY))]


def _real(x):
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def outcomes(op, samples, edges=False):
    """Of each variant, dtype and sample; edges are tried of the function alone."""
    found = {}
    for (name, variant), dtype in itertools.product(VARIANTS.items(), MOVING):
        call = variant(op)
        if call is None or dtype not in op.dtypes or (edges and name != "function"):
            continue
        for i, sample in enumerate(itertools.islice(op.sample_inputs("cpu", dtype), samples)):
            for edge in EDGES if edges else (None,):
                result = outcome(Moving(op, call, sample, name == "in place", edge))
                if result is not None:
                    found[", ".join([name, str(dtype), f"sample {i}", *([edge] if edge else [])])] = result
    return found


# Where the slope at an edge tells nothing: an epsilon below the step is in the formula; matrices of equal
# elements have no such factors; values differ by more than float64 resolves; at one point PyTorch takes a
# number of its own; PyTorch reads past an empty tensor.
NO_EDGES = {
    *("nn.functional.normalize", "nn.functional.triplet_margin_loss", "nn.functional.cosine_embedding_loss"),
    *("nn.functional.triplet_margin_with_distance_loss", "qr", "linalg.qr", "svd_lowrank", "pca_lowrank"),
    *("masked.normalize", "linalg.eig", "linalg.eigvals", "linalg.householder_product"),
    *("frexp", "nextafter", "nn.functional.softshrink", "nn.functional.hardshrink", "_segment_reduce"),
}


# What has no forward-mode rule, in PyTorch or here; everything else must be right in every sample tried.
REFUSED = {
    "_batch_norm_with_update", "_chunk_cat", "_native_batch_norm_legit", "_segment_reduce", "acosh",
    "addbmm", "asinh", "atanh", "cdist", "cholesky", "floor_divide", "geqrf", "grid_sampler_2d",
    "grid_sampler_3d", "heaviside", "histogram", "histogramdd", "igamma", "igammac", "index_reduce",
    "linalg.ldl_factor", "linalg.ldl_factor_ex", "linalg.ldl_solve", "linalg.lstsq", "logical_and",
    "logical_not", "logical_or", "logical_xor", "native_batch_norm", "native_dropout_backward",
    "native_layer_norm", "nn.functional.batch_norm", "nn.functional.binary_cross_entropy",
    "nn.functional.binary_cross_entropy_with_logits", "nn.functional.cross_entropy",
    "nn.functional.ctc_loss", "nn.functional.embedding", "nn.functional.embedding_bag",
    "nn.functional.grid_sample", "nn.functional.linear_cross_entropy", "nn.functional.multi_margin_loss",
    "nn.functional.multilabel_margin_loss", "nn.functional.nll_loss", "nn.functional.pdist",
    "nn.functional.rrelu", "nn.functional.soft_margin_loss", "normal", "ormqr", "scatter", "scatter_reduce",
    "sparse.mm", "sparse.sampled_addmm", "to_sparse", "unique", "unique_consecutive",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
}  # fmt: skip
if torch.__version__ < (2, 13):
    REFUSED |= {"aminmax", "narrow_copy", "nextafter"}


def name_of(op):
    return f"{op.name}.{op.variant_test_name}".rstrip(".")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", OPS, ids=name_of)
def test_right_or_refused(op):
    check(op, outcomes(op, samples=1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", [op for op in OPS if op.name not in NO_EDGES], ids=name_of)
def test_edges(op):
    check(op, outcomes(op, samples=2, edges=True))


def check(op, found):
    wrong = {name: result for name, result in found.items() if result.startswith("wrong")}
    assert not wrong
    refused = {name: result for name, result in found.items() if result.startswith("refused")}
    for name, result in refused.items():
        assert "forward AD" in result or "forward-mode" in result or "imf_kernels.jvp" in result, (
            name,
            result,
        )
    assert not refused or op.name in REFUSED or op.name.startswith("special."), refused


def main(samples):
    """Prints what is not right, and how many operators there are of each kind."""
    count = collections.Counter()
    for op in OPS:
        found = outcomes(op, samples)
        if op.name not in NO_EDGES:
            found |= outcomes(op, min(samples, 4), edges=True)
        kinds = {result.partition(":")[0] for result in found.values()}
        kind = next((k for k in ("wrong", "refused", "right") if k in kinds), "nothing to compare")
        count[kind] += 1
        for name, result in found.items():
            if not result.startswith("right"):
                print(f"{op.name} {op.variant_test_name} {name}: {result}".replace("\n", " ")[:200])
    print(dict(count))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4)

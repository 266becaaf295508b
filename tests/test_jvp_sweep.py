"""Every call in PyTorch's own database of operators inside `imf_kernels.jvp`: right, or a clear error.

The truth is central differences in float64. A call is tried as a function, as a method and in place, with
every floating-point tensor among its arguments moving; what raises must raise an error that says why.
"""

from __future__ import annotations

import collections
import functools
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
STEP = 1e-6
VARIANTS = {
    "function": lambda op: op.op,
    "method": lambda op: op.method_variant,
    "in place": lambda op: op.inplace_variant,
}


class Moving:
    """A call as a function of those of its arguments that move."""

    def __init__(self, op, call, sample, in_place):
        # The wrapper keeps matrices symmetric or triangular that are taken to be.
        self.call, self.in_place = functools.partial(op.gradcheck_wrapper, call), in_place
        leaves, self.structure = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        self.leaves = [x.detach() if isinstance(x, Tensor) else x for x in leaves]
        self.places = [
            i for i, x in enumerate(self.leaves)
            if type(x) is Tensor and x.dtype == torch.float64 and x.layout == torch.strided
            and (i == 0 or op.name not in FIRST_MOVES)
        ]  # fmt: skip
        self.primals = tuple(self.leaves[i] for i in self.places)
        generator = torch.Generator().manual_seed(0)
        self.tangents = tuple(torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in self.primals)

    def __call__(self, *moving):
        leaves = list(self.leaves)
        for i, x in zip(self.places, moving, strict=True):
            leaves[i] = x.clone() if self.in_place else x
        first, args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        torch.manual_seed(0)
        result = self.call(first, *args, **kwargs)
        return tuple(
            y for y in pytree.tree_leaves(result) if isinstance(y, Tensor) and y.dtype == torch.float64
        )

    def at(self, step):
        return self(*(x + step * x_dot for x, x_dot in zip(self.primals, self.tangents, strict=True)))


def outcome(function):
    """ "right", "wrong: …", "refused: …" of a call, or `None` where there is nothing to compare."""
    try:
        function(*function.primals)
        above, below = function.at(STEP), function.at(-STEP)
    except Exception:
        return None  # not a sample that moves
    if not function.primals or not above:
        return None
    try:
        _, tangents = ik.jvp(function, function.primals, function.tangents)
    except Exception as error:
        return f"refused: {type(error).__name__}: {error}"
    for got, a, b in zip(tangents, above, below, strict=True):
        wanted = (a - b) / (2 * STEP)
        known = wanted.isfinite() & got.isfinite()
        scale = wanted[known].abs().max() if known.any() else torch.tensor(0.0)
        if (got - wanted)[known].abs().max() > 1e-4 * (1 + scale) if known.any() else False:
            return f"wrong: off by {(got - wanted)[known].abs().max():.2g} of {scale:.2g}"
    return "right"


def outcomes(op, samples):
    found = {}
    for name, variant in VARIANTS.items():
        call = variant(op)
        if call is None:
            continue
        for i, sample in enumerate(op.sample_inputs("cpu", torch.float64)):
            if i == samples:
                break
            result = outcome(Moving(op, call, sample, name == "in place"))
            if result is not None:
                found[f"{name}, sample {i}"] = result
    return found


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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", OPS, ids=lambda op: f"{op.name}.{op.variant_test_name}".rstrip("."))
def test_right_or_refused(op):
    found = outcomes(op, samples=1)
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
        kinds = {result.partition(":")[0] for result in found.values()}
        kind = next((k for k in ("wrong", "refused", "right") if k in kinds), "nothing to compare")
        count[kind] += 1
        for name, result in found.items():
            if not result.startswith("right"):
                print(f"{op.name} {op.variant_test_name} {name}: {result}".replace("\n", " ")[:200])
                break
    print(dict(count))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4)

"""Cases of every operation: shapes, data, tangents, work. Tests and benchmarks share the list.

`case.draw(generator, dtype)` makes a case's inputs, `case.run(...)` calls the operation on them. Small cases
are at the edges of the kernels' blocks and vectors and are checked on every backend; large ones have the
shapes of training runs and are for benchmarks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor

import imf_kernels

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
Dtype = torch.dtype | None
Options = Mapping[str, Any] | None  # of an input


@dataclass(frozen=True)
class Input:
    """One tensor argument, drawn from a normal distribution.

    Attributes:
        shape: as the operation takes it.
        dtype: `None` for that of the case.
        offset, scale: mean and standard deviation of the values.
        outlier: added to the last row.
        rounded: the operation rounds it, and its gradient, to the case's dtype: it is drawn already rounded,
            and the gradient is checked against the error of that dtype.
        positions_first: [B, H, L, D] in the memory order [B, L, H, D], as projections leave it.
        channels_last: [N, C, H, W] or [N, C, D, H, W] with its channels last in memory.
        differentiable: False for tables of constants.
        true: for a mask of bool, the share of True. If it has several rows the first is False.
    """

    shape: tuple[int, ...]
    dtype: Dtype = None
    offset: float = 0.0
    scale: float = 1.0
    outlier: float = 0.0
    rounded: bool = False
    positions_first: bool = False
    channels_last: bool = False
    differentiable: bool = True
    true: float | None = None

    def draw(self, generator: Generator, dtype: torch.dtype) -> Tensor:
        own = self.dtype or dtype
        if self.true is not None:
            mask = torch.rand(self.shape, generator=generator, device="cpu") < self.true
            if self.shape[-2] > 1:
                mask[..., 0, :] = False
            return mask
        x = torch.randn(self.shape, generator=generator, dtype=torch.float64, device="cpu")
        x = x * self.scale + self.offset
        if self.outlier:
            x[..., -1, :] += self.outlier
        x = x.to(dtype if self.rounded else own).to(own)
        return self.laid_out(x)

    def laid_out(self, x: Tensor) -> Tensor:
        """Returns x in the memory order of this input."""
        if self.channels_last:
            return x.movedim(1, -1).contiguous().movedim(-1, 1)
        return x.transpose(1, 2).contiguous().transpose(1, 2) if self.positions_first else x


@dataclass(frozen=True, eq=False)
class Case:
    """One call of an operation.

    Attributes:
        operation: its name in `imf_kernels`.
        name: of the case, unique within the operation.
        inputs: by argument, in the operation's order.
        outputs: shapes.
        flops: multiplications and additions of the primal; e^x, √x, sines and quotients count as one.
        tangent_flops: additional work if the tangents of all samples are given.
        options: further keyword arguments.
        tangents: names of the inputs that carry one.
        tangent_rows: number of samples, the last of the batch, with a tangent; `None`: all.
        dtypes: of the case; the first one is the natural one.
        output_dtype: passed as `dtype`, if it is not that of the first input.
        backward_flops: of the primal's backward, products alone.
        backward_inputs: those that backward reads in addition to the cotangents, and whose gradients it
            writes; `None`: every input.
        large: of a training run's size, for benchmarks.
        refused_by: the backends that cannot run it, and say so.
    """

    operation: str
    name: str
    inputs: Mapping[str, Input]
    outputs: tuple[tuple[int, ...], ...]
    flops: int
    tangent_flops: int
    options: Mapping[str, Any] = field(default_factory=dict)
    tangents: tuple[str, ...] = ()
    tangent_rows: int | None = None
    dtypes: tuple[torch.dtype, ...] = (FP32, BF16, FP16)
    output_dtype: Dtype = None
    backward_flops: int = 0
    backward_inputs: tuple[str, ...] | None = None
    large: bool = False
    refused_by: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.operation} {self.name}"

    @property
    def batch(self) -> int:
        return next(iter(self.inputs.values())).shape[0]

    @property
    def output_options(self) -> dict[str, torch.dtype]:
        """The keyword argument for the output's dtype, if needed."""
        return {"dtype": self.output_dtype} if self.output_dtype else {}

    @property
    def differentiable(self) -> tuple[str, ...]:
        return tuple(name for name, x in self.inputs.items() if x.differentiable)

    def draw(self, generator: Generator, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Draws primals and stored tangents, by argument."""
        primals = {name: x.draw(generator, dtype) for name, x in self.inputs.items()}
        tangents = {}
        for name in self.tangents:
            whole = replace(self.inputs[name], offset=0.0, scale=1.0, outlier=0.0, rounded=False).draw(
                generator, dtype
            )
            rows = whole.shape[0] if self.tangent_rows is None else self.tangent_rows
            tangents[name] = whole[whole.shape[0] - rows :]
        return primals, tangents

    def run(self, arguments: Mapping[str, Any], backend: str | None, **options: Any) -> tuple[Any, ...]:
        """Calls the operation on tensors or `Dual`s and returns its results as a tuple."""
        call = getattr(imf_kernels, self.operation)
        if self.operation == "prepend_tokens":
            x, *rest = arguments.values()
            result = call(x, list(zip(rest[0::2], rest[1::2], strict=True)), backend=backend)
        else:
            result = call(**arguments, **{**self.options, **options}, backend=backend)
        return result if isinstance(result, tuple) else (result,)

    def with_rows(self, rows: int | None) -> Case:
        """Returns this case with tangents for only the last `rows` samples of the batch."""
        return replace(self, name=f"{self.name} last {rows}", tangent_rows=rows)

    def count_flops(self, dual: bool) -> int:
        share = 1.0 if self.tangent_rows is None else self.tangent_rows / self.batch
        return self.flops + (round(self.tangent_flops * share) if dual else 0)

    def count_bytes(self, dtype: torch.dtype, dual: bool) -> int:
        """Returns the minimum traffic in bytes: every input and output once."""
        sizes, out = self._sizes(dtype)
        share = 1.0 if self.tangent_rows is None else self.tangent_rows / self.batch
        moved = sum(sizes.values()) + out
        return moved + (round((sum(sizes[n] for n in self.tangents) + out) * share) if dual else 0)

    def count_backward_bytes(self, dtype: torch.dtype) -> int:
        sizes, out = self._sizes(dtype)
        inputs = self.inputs if self.backward_inputs is None else self.backward_inputs
        return out + sum(sizes[n] * (2 if self.inputs[n].differentiable else 1) for n in inputs)

    def _sizes(self, dtype: torch.dtype) -> tuple[dict[str, int], int]:
        """Returns the bytes of each input, and of all outputs."""
        sizes = {n: math.prod(x.shape) * (x.dtype or dtype).itemsize for n, x in self.inputs.items()}
        out_dtype = self.output_dtype or next(iter(self.inputs.values())).dtype or dtype
        return sizes, sum(math.prod(shape) for shape in self.outputs) * out_dtype.itemsize


def _weight(*shape: int, dtype: Dtype = FP32) -> Input:
    return Input(shape, dtype, offset=1.0, scale=0.25)


def _rows(
    operation: str, name: str, shape: tuple[int, ...], stream: Dtype, x: Options, others: Mapping[str, Input],
    flops: tuple[int, int], **more: Any,
) -> Case:  # fmt: skip
    """Returns a case of rows x and a result of one shape, with so many operations per element."""
    inputs, n = {"x": Input(shape, stream, **(x or {})), **others}, math.prod(shape)
    more = {"tangents": ("x",), **more}
    return Case(operation, name, inputs, (shape,), flops[0] * n, flops[1] * n, **more)


def linear(
    name: str, *lead: int, width: int, out: int, bias: bool = True, fp32_weights: bool = True, **more: Any
) -> Case:
    dtype, scale, rows = FP32 if fp32_weights else None, max(width, 1) ** -0.5, math.prod(lead)
    inputs = {"x": Input((*lead, width)), "weight": Input((out, width), dtype, scale=scale, rounded=True)}
    if bias:
        inputs["bias"] = Input((out,), dtype, rounded=True)
    flops = 2 * rows * width * out
    more = {"tangents": ("x",), "backward_flops": 2 * flops, **more}
    return Case("linear", name, inputs, ((*lead, out),), flops, flops, **more)


def rms_norm(
    name: str, *lead: int, width: int, stream: Dtype = None, weights: Dtype = FP32, x: Options = None,
    **more: Any,
) -> Case:  # fmt: skip
    weight = {"weight": _weight(width, dtype=weights)}
    return _rows("rms_norm", name, (*lead, width), stream, x, weight, (4, 7), **more)


def layer_norm(
    name: str, *lead: int, width: int, stream: Dtype = None, weights: Dtype = FP32,
    affine: Sequence[str] = ("weight", "bias"), x: Options = None, **more: Any,
) -> Case:  # fmt: skip
    parameters = {"weight": _weight(width, dtype=weights), "bias": Input((width,), weights)}
    more = {"options": {"normalized_shape": (width,)}, **more}
    chosen = {name: parameters[name] for name in affine}
    return _rows("layer_norm", name, (*lead, width), stream, x, chosen, (8, 10), **more)


def layer_norm_modulate(
    name: str, *lead: int, width: int, stream: Dtype = None, modulation: Dtype = None,
    tangents: tuple[str, ...] = ("x", "shift", "scale"), x: Options = None, **more: Any,
) -> Case:  # fmt: skip
    row = Input((lead[0], width), modulation, scale=0.5)
    more = {"tangents": tangents, "backward_inputs": ("x", "scale"), **more}
    rows = {"shift": row, "scale": row}
    return _rows("layer_norm_modulate", name, (*lead, width), stream, x, rows, (8, 12), **more)


def group_norm(
    name: str, *shape: int, groups: int, weights: Dtype = FP32, affine: Sequence[str] = ("weight", "bias"),
    silu: bool = False, x: Options = None, **more: Any,
) -> Case:  # fmt: skip
    parameters = {"weight": _weight(shape[1], dtype=weights), "bias": Input((shape[1],), weights)}
    options = {"num_groups": groups} | ({"activation": "silu"} if silu else {})
    inputs, n = (
        {"input": Input(shape, **(x or {}))} | {name: parameters[name] for name in affine},
        math.prod(shape),
    )
    more = {"options": options, "tangents": ("input",), **more}
    flops = (8 + 4 * silu) * n, (10 + 5 * silu) * n
    return Case("group_norm", name, inputs, (shape,), *flops, **more)


def qk_norm_rope(
    name: str, batch: int, heads: int, length: int, width: int, kv_heads: int | None = None,
    matrix: bool = False, **more: Any,
) -> Case:  # fmt: skip
    options = {} if kv_heads is None else {"kv_heads": kv_heads}
    kv_heads = heads if kv_heads is None else kv_heads
    row = (heads + 2 * kv_heads) * width
    table = Input((length, width // 2), FP32, differentiable=False)
    inputs = {
        "qkv": Input((batch * length, row) if matrix else (batch, length, row)),
        "q_weight": _weight(width),
        "k_weight": _weight(width),
        "cos": table,
        "sin": table,
    }
    q, k = ((batch, n, length, width) for n in (heads, kv_heads))
    n, more = math.prod(q) + math.prod(k), {"options": options, "tangents": ("qkv",), **more}
    return Case("qk_norm_rope", name, inputs, (q, k, k), 7 * n, 10 * n, **more)


def attention(
    name: str, batch: int, heads: int, queries: int, width: int, keys: int | None = None,
    value_width: int | None = None, tangents: tuple[str, ...] = ("query", "key", "value"),
    positions_first: bool = True, q: Options = None, k: Options = None, v: Options = None,
    kv_heads: int | None = None, mask: Input | None = None, is_causal: bool = False, **more: Any,
) -> Case:  # fmt: skip
    keys = queries if keys is None else keys
    value_width = width if value_width is None else value_width
    kv_heads = heads if kv_heads is None else kv_heads
    first: dict[str, Any] = {"positions_first": positions_first}
    inputs = {
        "query": Input((batch, heads, queries, width), **first, **(q or {})),
        "key": Input((batch, kv_heads, keys, width), **first, **(k or {})),
        "value": Input((batch, kv_heads, keys, value_width), **first, **(v or {})),
    }
    if mask is not None:
        inputs["attn_mask"] = replace(mask, differentiable=False)
    options = {"is_causal": True} if is_causal else {}
    if kv_heads != heads:
        options["enable_gqa"] = True
    more["options"] = options | more.get("options", {})
    seen = sum(min(i + 1, keys) for i in range(queries)) if is_causal else queries * keys
    pairs = 2 * batch * heads * seen
    logits = sum(name in tangents for name in ("query", "key"))
    products = width * logits + value_width * ((logits > 0) + ("value" in tangents))
    more |= {"tangents": tangents, "backward_flops": pairs * (3 * width + 2 * value_width)}
    outputs, flops = ((batch, heads, queries, value_width),), pairs * (width + value_width)
    return Case("scaled_dot_product_attention", name, inputs, outputs, flops, pairs * products, **more)


def swiglu(name: str, *lead: int, width: int, x: Options = None, **more: Any) -> Case:
    n, inputs = math.prod(lead) * width, {"x": Input((*lead, 2 * width), **(x or {}))}
    return Case("swiglu", name, inputs, ((*lead, width),), 5 * n, 7 * n, tangents=("x",), **more)


def gated_residual(
    name: str, *lead: int, width: int, stream: Dtype = None, gate_a_sample: bool = False,
    tangents: tuple[str, ...] = ("x", "branch"), **more: Any,
) -> Case:  # fmt: skip
    shape = (*lead, width)
    gate = Input((lead[0], width)) if gate_a_sample else _weight(width)
    flops = 2, 2 * (1 + ("gate" in tangents))
    more = {"tangents": tangents, "backward_inputs": ("branch", "gate"), **more}
    others = {"branch": Input(shape), "gate": gate}
    return _rows("gated_residual", name, shape, stream, None, others, flops, **more)


def gated_residual_rms_norm(
    name: str, *lead: int, width: int, stream: Dtype = None, tangents: tuple[str, ...] = ("x", "branch"),
    x: Options = None, **more: Any,
) -> Case:  # fmt: skip
    # The stream is normalised, and its gradients are summed, as rounded to its dtype.
    shape, weight = (*lead, width), replace(_weight(width), rounded=stream is None)
    inputs = {
        "x": Input(shape, stream, **(x or {})),
        "branch": Input(shape),
        "gate": weight,
        "weight": weight,
    }
    n = math.prod(shape)
    more = {"tangents": tangents, "backward_inputs": ("x", "branch", "gate", "weight"), **more}
    return Case("gated_residual_rms_norm", name, inputs, (shape, shape), 6 * n, 10 * n, **more)


def gelu(name: str, *shape: int, approximate: str = "none", x: Options = None, **more: Any) -> Case:
    more = {"options": {"approximate": approximate}, **more}
    return _rows("gelu", name, shape, None, x, {}, (4, 5), **more)


def silu(name: str, *shape: int, x: Options = None, **more: Any) -> Case:
    return _rows("silu", name, shape, None, x, {}, (4, 5), **more)


def sinusoidal_embedding(name: str, batch: int, dim: int, scale: float = 1.0, **more: Any) -> Case:
    n, inputs = batch * dim, {"t": Input((batch,), scale=scale)}
    more = {"options": {"dim": dim}, "tangents": ("t",), **more}
    return Case("sinusoidal_embedding", name, inputs, ((batch, dim),), 2 * n, 2 * n, **more)


def prepend_tokens(
    name: str, batch: int, length: int, width: int, counts: Sequence[int], without: Sequence[str] = (),
    **more: Any,
) -> Case:  # fmt: skip
    inputs = {"x": Input((batch, length, width))}
    for i, count in enumerate(counts):
        inputs |= {f"tokens_{i}": Input((count, width)), f"embedding_{i}": Input((batch, width))}
    carriers = tuple(n for n in inputs if not n.startswith("tokens") and n not in without)
    total = sum(counts)
    more = {"tangents": carriers, "backward_inputs": (), **more}
    shape = (batch, total + length, width)
    return Case("prepend_tokens", name, inputs, (shape,), batch * total * width, 0, **more)


def _small() -> list[Case]:
    offset = {"offset": 2.0}, {"offset": 4.0}
    last = {"channels_last": True}
    large = {"offset": 35.0, "scale": 0.2}
    # Queries of one sign and a key far on the other: a row of huge values without any weight.
    weightless: dict[str, Any] = {"q": offset[0], "k": {"outlier": -1e4}, "v": {"outlier": 1e5}}
    own_gates: dict[str, Any] = {"gate_a_sample": True}
    in_fp16 = {**weightless, "v": {"outlier": 3e4}, "dtypes": (FP16,)}
    weightless["dtypes"] = (FP32, BF16)
    return [
        linear("square", 5, 3, width=16, out=16),
        linear("no bias", 7, width=33, out=5, bias=False),
        linear("weights of x's dtype", 2, 3, 4, width=24, out=40, fp32_weights=False),
        linear("measured", 2, 600, width=32, out=32, dtypes=(FP32,)),
        linear("one row", 1, width=9, out=1),
        rms_norm("width 1", 5, width=1),
        rms_norm("width 33", 3, 7, width=33),
        rms_norm("width 128", 4, 36, width=128),
        rms_norm("weights of x's dtype", 4, 2, width=48, weights=None),
        rms_norm("fp32 stream", 4, 9, width=72, stream=FP32, dtypes=(BF16,), output_dtype=BF16),
        rms_norm("fp32 stream to fp16", 4, 9, width=72, stream=FP32, dtypes=(FP16,), output_dtype=FP16),
        rms_norm("offset", 4, 5, width=64, x={"offset": 4.0}),
        rms_norm("small values", 3, 4, width=40, x={"scale": 1e-3}),
        rms_norm("one value, width 106", 4, width=106, x={"offset": 1.35, "scale": 0.0}),
        rms_norm("one value, width 5000", 3, width=5000, x={"offset": 1 / 3, "scale": 0.0}),
        rms_norm("3000 rows", 3000, width=8),
        layer_norm("width 1", 5, width=1),
        layer_norm("width 33", 3, 7, width=33),
        layer_norm("weights of x's dtype", 4, 2, width=48, weights=None),
        layer_norm("no bias", 4, 5, width=40, affine=("weight",)),
        layer_norm("no weights", 3, 7, width=24, affine=()),
        layer_norm("fp32 stream", 4, 9, width=72, stream=FP32, dtypes=(BF16,), output_dtype=BF16),
        layer_norm("offset 4", 4, 5, width=64, x={"offset": 4.0}),
        layer_norm("offset 100", 2, 3, width=4096, x={"offset": 100.0}),
        layer_norm("small values", 3, 4, width=40, x={"scale": 1e-3}),
        layer_norm("width 5000", 3, width=5000),
        group_norm("one position", 4, 24, groups=3),
        group_norm("one group", 3, 5, 7, groups=1),
        group_norm("sequence", 3, 24, 37, groups=4),
        group_norm("instances", 2, 6, 5, 9, groups=6),
        group_norm("image", 2, 24, 9, 11, groups=3),
        group_norm("image with silu", 2, 8, 5, 7, groups=2, silu=True),
        group_norm("channels last", 2, 40, 9, 11, groups=4, x=last),
        group_norm("channels last with silu", 2, 12, 5, 7, groups=2, silu=True, x=last),
        group_norm("volume, channels last", 2, 12, 3, 4, 5, groups=3, x=last),
        group_norm("weights of x's dtype", 4, 24, 9, 2, groups=3, weights=None, silu=True),
        group_norm("no bias", 3, 24, 5, 5, groups=3, affine=("weight",)),
        group_norm("no weights", 3, 24, 5, 5, groups=3, affine=()),
        group_norm("no weights, silu, channels last", 3, 24, 5, 5, groups=3, affine=(), silu=True, x=last),
        *(
            group_norm(f"{name}several chunks{order}", 1, 6, 45, 47, groups=2, silu=not x, x=x | of_order)
            for name, x in (("", {}), ("offset 100, ", {"offset": 100.0}))
            for order, of_order in (("", {}), (", channels last", last))
        ),
        group_norm("small values", 3, 8, 5, 5, groups=2, x={"scale": 1e-3}),
        layer_norm_modulate("width 1", 5, 2, width=1),
        layer_norm_modulate("width 33", 3, 7, width=33),
        layer_norm_modulate("one position", 5, width=40),
        layer_norm_modulate("positions in two dimensions", 2, 3, 4, width=24, modulation=FP32),
        layer_norm_modulate("fp32 stream", 4, 9, width=72, stream=FP32, dtypes=(BF16,), output_dtype=BF16),
        layer_norm_modulate("offset 100", 3, 5, width=600, x={"offset": 100.0}),
        *(layer_norm_modulate(f"only {n}", 3, 4, width=24, tangents=(n,)) for n in ("x", "shift", "scale")),
        qk_norm_rope("width 2", 2, 3, 4, 2),
        qk_norm_rope("digits", 2, 2, 36, 64),
        qk_norm_rope("fewer heads of keys", 3, 4, 5, 72, kv_heads=1),
        qk_norm_rope("matrix", 2, 2, 7, 40, matrix=True),
        qk_norm_rope("length 1", 3, 1, 1, 18),
        qk_norm_rope("length 700", 1, 2, 700, 8),
        *(attention(f"width {d}", 2, 2, 5, d, keys=9) for d in (1, 2, 7, 40, 64, 72, 80, 128, 256)),
        attention("digits", 2, 2, 36, 64),
        attention("length 1", 3, 2, 1, 24),
        attention("length 276", 1, 2, 276, 64),
        attention("length 600", 1, 1, 50, 8, keys=600),
        attention("one key", 2, 1, 50, 16, keys=1),
        attention("other value width", 2, 3, 17, 24, keys=33, value_width=41),
        attention("heads first", 2, 2, 19, 32, positions_first=False),
        attention("offset 2", 2, 2, 40, 64, k=offset[0], v=offset[0]),
        attention("offset 4", 2, 2, 40, 64, k=offset[1], v=offset[1]),
        attention("offset 4, two blocks", 1, 2, 40, 64, keys=276, k=offset[1], v=offset[1]),
        attention("offset 4 of keys, tangents of q", 2, 2, 40, 64, tangents=("query",), k=offset[1]),
        attention("outlier without weight", 2, 2, 20, 64, **weightless),
        attention("outlier without weight, two blocks", 1, 2, 20, 64, keys=276, **weightless),
        attention("outlier without weight, fp16", 2, 2, 20, 64, **in_fp16),
        attention("outlier without weight, two blocks, fp16", 1, 2, 20, 64, keys=276, **in_fp16),
        attention("logits of 1e4", 2, 2, 20, 64, q=large, k=large),
        attention("logits far apart", 2, 2, 20, 16, q={"scale": 5.0}, k={"scale": 5.0}),
        attention("scale 0.3", 2, 2, 9, 16, options={"scale": 0.3}),
        attention("causal", 1, 2, 40, 16, is_causal=True),
        attention("causal, more queries", 1, 1, 100, 24, keys=70, is_causal=True),
        attention("causal, more keys", 1, 1, 40, 24, keys=100, is_causal=True, tangents=("query",)),
        attention("causal, offset 4", 1, 1, 100, 64, is_causal=True, k=offset[1], v=offset[1]),
        attention("causal, two blocks", 1, 1, 270, 16, is_causal=True),
        attention("mask of bool", 2, 3, 21, 24, keys=37, mask=Input((2, 3, 21, 37), true=0.7)),
        attention("mask of bool, two blocks", 1, 2, 60, 16, keys=300, mask=Input((60, 300), true=0.1)),
        attention("mask of bool for keys", 2, 1, 21, 24, keys=70, mask=Input((2, 1, 1, 70), true=0.7)),
        attention("mask added", 1, 3, 21, 24, keys=37, mask=Input((3, 21, 37), scale=2.0)),
        attention("mask added, in fp32", 1, 2, 70, 24, keys=40, mask=Input((70, 1), FP32, scale=2.0)),
        attention("fewer heads of keys", 1, 6, 21, 24, keys=37, value_width=40, kv_heads=2),
        attention("one head of keys, causal", 2, 2, 40, 72, kv_heads=1, is_causal=True, tangents=("key",)),
        attention("fewer heads of keys, mask", 1, 6, 9, 8, keys=5, kv_heads=3, mask=Input((9, 5), true=0.7)),
        *(
            attention(f"tangents of {'+'.join(names)}", 3, 2, 21, 24, keys=18, value_width=16, tangents=names)
            for names in (("query",), ("key",), ("value",), ("query", "key"), ("key", "value"))
        ),
        swiglu("width 1", 6, width=1),
        swiglu("width 37", 3, 5, width=37),
        swiglu("digits", 4, 6, width=341),
        swiglu("wide values", 4, 8, width=64, x={"scale": 30.0}),
        gated_residual("width 1", 5, width=1),
        gated_residual("width 45", 3, 4, width=45),
        gated_residual("fp32 stream", 4, 9, width=128, stream=FP32, dtypes=(BF16, FP16)),
        gated_residual("only x", 3, 4, width=24, tangents=("x",)),
        gated_residual("only branch", 3, 4, width=24, tangents=("branch",)),
        gated_residual("fp32 stream, only branch", 3, 4, width=24, stream=FP32, tangents=("branch",)),
        gated_residual("a gate a sample", 3, 4, width=45, tangents=("x", "branch", "gate"), **own_gates),
        gated_residual("one position", 5, width=24, tangents=("branch", "gate"), **own_gates),
        gated_residual("only a sample's gate", 3, 4, width=24, tangents=("gate",), **own_gates),
        gated_residual("3000 rows", 3000, width=8),
        gated_residual("1500 positions", 2, 1500, width=8, tangents=("x", "gate"), **own_gates),
        gated_residual_rms_norm("vector", width=33),
        # Near 0 the gradient of x / |x| has no bound on its condition: rows get an offset.
        gated_residual_rms_norm("width 1", 5, width=1, x={"offset": 8.0}),
        gated_residual_rms_norm("width 45", 3, 4, width=45),
        gated_residual_rms_norm("fp32 stream", 4, 9, width=128, stream=FP32, dtypes=(BF16, FP16)),
        gated_residual_rms_norm("offset 100", 3, 5, width=67, x={"offset": 100.0}),
        gated_residual_rms_norm("only x", 3, 4, width=24, tangents=("x",)),
        gated_residual_rms_norm("only branch", 3, 4, width=24, stream=FP32, tangents=("branch",)),
        gated_residual_rms_norm("3000 rows", 3000, width=8, x={"offset": 8.0}),
        gelu("vector", 67),
        gelu("matrix", 5, 128),
        gelu("wide values", 8, 50, x={"scale": 30.0}),
        gelu("tanh", 5, 128, approximate="tanh"),
        gelu("tanh, wide values", 8, 50, approximate="tanh", x={"scale": 30.0}),
        silu("vector", 67),
        silu("matrix", 5, 128),
        silu("wide values", 8, 50, x={"scale": 30.0}),
        sinusoidal_embedding("dim 2", 5, 2),
        sinusoidal_embedding("dim 256", 6, 256),
        sinusoidal_embedding("period 100", 6, 12, scale=300.0, options={"dim": 12, "max_period": 100.0}),
        prepend_tokens("one group", 3, 4, 8, (2,)),
        prepend_tokens("four groups", 4, 5, 33, (8, 4, 0, 1)),
        prepend_tokens("x without a tangent", 4, 5, 16, (3, 2), without=("x",)),
        prepend_tokens("one embedding without", 4, 5, 16, (3, 2), without=("embedding_0",)),
        prepend_tokens("no group", 2, 3, 5, ()),
    ]


BIG: dict[str, Any] = {"large": True}


def rows(name: str, batch: int, length: int, width: int, heads: int, mlp: int) -> list[Case]:
    """Returns the memory-bound operations of a block, in their shapes there."""
    d = width // heads
    stream: dict[str, Any] = {"stream": FP32, "dtypes": (BF16,), **BIG}
    return [
        rms_norm(f"{name}", batch, length, width=width, **BIG),
        rms_norm(f"{name} fp32 stream", batch, length, width=width, output_dtype=BF16, **stream),
        qk_norm_rope(f"{name}", batch, heads, length, d, **BIG),
        swiglu(f"{name}", batch, length, width=mlp, **BIG),
        gated_residual(f"{name}", batch, length, width=width, **BIG),
        gated_residual(f"{name} fp32 stream", batch, length, width=width, **stream),
        gated_residual_rms_norm(f"{name}", batch, length, width=width, **BIG),
        gated_residual_rms_norm(f"{name} fp32 stream", batch, length, width=width, **stream),
        prepend_tokens(f"{name}", batch, length - 20, width, (8, 4, 2, 2, 4), **BIG),
    ]


def model(name: str, batch: int, length: int, width: int, heads: int, mlp: int) -> list[Case]:
    """Returns the operations of a network's blocks and embeddings, in their shapes there."""
    d = width // heads
    return [
        linear(f"{name} qkv", batch, length, width=width, out=3 * width, bias=False, **BIG),
        linear(f"{name} mlp in", batch, length, width=width, out=2 * mlp, bias=False, **BIG),
        linear(f"{name} mlp out", batch, length, width=mlp, out=width, bias=False, **BIG),
        attention(f"{name}", batch, heads, length, d, **BIG),
        attention(f"{name} tangents of q", batch, heads, length, d, tangents=("query",), **BIG),
        *rows(name, batch, length, width, heads, mlp),
        silu(f"{name}", batch, width, **BIG),
        sinusoidal_embedding(f"{name}", batch, 256, **BIG),
    ]


def adaln(name: str, batch: int, length: int, width: int) -> list[Case]:
    """Returns the memory-bound operations of a DiT block, with shift, scale and gate per sample."""
    stream: dict[str, Any] = {"stream": FP32, "dtypes": (BF16,), "output_dtype": BF16, **BIG}
    gates: dict[str, Any] = {"gate_a_sample": True, "tangents": ("x", "branch", "gate"), **BIG}
    return [
        layer_norm(f"{name}", batch, length, width=width, **BIG),
        layer_norm_modulate(f"{name}", batch, length, width=width, **BIG),
        layer_norm_modulate(f"{name} fp32 stream", batch, length, width=width, **stream),
        gated_residual(f"{name}", batch, length, width=width, **gates),
        gelu(f"{name}", batch, length, 4 * width, **BIG),
        gelu(f"{name} tanh", batch, length, 4 * width, approximate="tanh", **BIG),
    ]


def unet(name: str, batch: int, channels: int, side: int) -> list[Case]:
    """Returns the norms of a U-Net's block, in their shapes there."""
    shape = batch, channels, side, side
    last: dict[str, Any] = {"x": {"channels_last": True}}
    return [
        group_norm(f"{name}", *shape, groups=32, **BIG),
        group_norm(f"{name} with silu", *shape, groups=32, silu=True, **BIG),
        group_norm(f"{name} channels last", *shape, groups=32, **last, **BIG),
    ]


SMALL = _small()
LARGE = [
    *model("digits", 128, 36, 128, 2, 341),
    *model("B/2", 4, 276, 768, 12, 2048),
    *model("XL/2", 2, 276, 1024, 16, 2730),
    *model("head dim 72", 2, 276, 1152, 16, 3072),
    *rows("beyond the cache", 48, 256, 768, 12, 1024),
    *adaln("DiT-XL/2", 4, 256, 1152),
    *adaln("DiT-S/2", 4, 256, 384),
    *unet("128 channels, 32 x 32", 8, 128, 32),
    *unet("256 channels, 16 x 16", 8, 256, 16),
    *unet("64 channels, 64 x 64", 2, 64, 64),
    attention("length 1024", 1, 12, 1024, 64, large=True),
    attention("length 4096", 1, 2, 4096, 64, large=True),
    attention("length 1024, causal", 1, 12, 1024, 64, is_causal=True, large=True),
    attention("length 1024, 3 heads of keys", 1, 12, 1024, 64, kv_heads=3, large=True),
    attention("B/2 with a mask", 4, 12, 276, 64, mask=Input((4, 1, 1, 276), true=0.8), large=True),
]
# Sums of so many terms that their rounding errors would show if they grew with the number.
LONG = [
    *(
        attention(f"{queries:,} queries, {keys:,} keys", 1, 1, queries, 64, keys=keys, large=True)
        for n in (2048, 4096, 16384, 65536)
        for queries, keys in ((16, n), (n, 16))
    ),
    attention("1,100 queries and keys, causal", 1, 1, 1100, 8, is_causal=True, large=True),
    attention(
        *("16 queries, 4,096 keys, two heads of queries", 1, 2, 16, 64),
        keys=4096,
        kv_heads=1,
        mask=Input((1, 4096), true=0.5),
        large=True,
    ),
    *(
        make(f"width {width:,}{name}", 4, width=width, x=x, large=True, refused_by=refused_by)
        for width, refused_by in ((4096, ()), (16384, ()), (65536, ("triton",)))
        for make, name, x in (
            (rms_norm, "", {}),
            (rms_norm, ", one value", {"offset": 0.7, "scale": 0.0}),
            (rms_norm, ", another value", {"offset": 1 / 3, "scale": 0.0}),
            (layer_norm, "", {}),
            (layer_norm, ", offset 4", {"offset": 4.0}),
        )
    ),
    *(
        group_norm(f"{n:,} values{name}", 1, 4, n // 8, 4, groups=2, x=x, large=True)
        for n in (16384, 1048576)
        for name, x in (
            ("", {}),
            (", channels last", {"channels_last": True}),
            (", offset 100", {"offset": 100.0}),
            (", offset 100, channels last", {"offset": 100.0, "channels_last": True}),
            (", one value", {"offset": 1 / 3, "scale": 0.0}),
        )
    ),
    layer_norm_modulate("width 65,536", 2, 2, width=65536, large=True, refused_by=("triton",)),
    swiglu("width 65,536", 4, width=65536, large=True),
    qk_norm_rope("width 4,096", 1, 2, 3, 4096, large=True),
    linear("65,536 rows", 65536, width=16, out=8, large=True),
    rms_norm("65,536 rows", 65536, width=24, large=True),
    layer_norm("65,536 rows", 65536, width=24, large=True),
    layer_norm_modulate("32,768 positions", 2, 32768, width=24, large=True),
    gated_residual("65,536 rows", 65536, width=24, large=True),
    gated_residual(
        *("32,768 positions", 2, 32768), width=24, gate_a_sample=True, tangents=("x", "gate"), large=True
    ),
    qk_norm_rope("length 32,768", 1, 2, 32768, 24, large=True),
    prepend_tokens("65,536 samples", 65536, 1, 8, (2,), large=True),
    sinusoidal_embedding("65,536 frequencies", 4, 131072, large=True),
]
# Sums over nothing are zeros, not what was in memory.
EMPTY = [
    linear("no rows", 0, width=8, out=4),
    rms_norm("no rows", 0, width=8),
    layer_norm("no rows", 0, width=8),
    group_norm("no positions", 2, 8, 0, groups=2),
    group_norm("no samples", 0, 8, 3, 3, groups=2),
    layer_norm_modulate("no positions", 2, 0, width=8),
    qk_norm_rope("no samples", 0, 2, 3, 8),
    attention("no samples", 0, 2, 3, 8),
    attention("no queries", 2, 2, 0, 8, keys=3),
    attention("no queries, causal", 2, 2, 0, 8, keys=3, is_causal=True),
    attention("no keys", 2, 2, 3, 8, keys=0),
    swiglu("no rows", 0, width=8),
    gated_residual("no rows", 0, width=8),
    gated_residual_rms_norm("no rows", 0, width=8),
    gelu("no rows", 0, 8),
    silu("no rows", 0, 8),
    sinusoidal_embedding("no samples", 0, 8),
    prepend_tokens("no samples", 0, 3, 8, (2,)),
]
OPERATIONS = tuple(dict.fromkeys(case.operation for case in SMALL))


def select(operation: str | None = None, *, large: bool = False) -> list[Case]:
    """Returns the small or the large cases, of one operation or of all."""
    return [case for case in (LARGE if large else SMALL) if operation in (None, case.operation)]

"""`replace`: swaps modules of a network for those of `imf_kernels.nn` where both compute the same."""

from __future__ import annotations

import copy
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from imf_kernels.nn import attention, blocks, calls, modules


@dataclass
class Swap:
    """A module that `replace` swapped, or left alone.

    Attributes:
        name: as `named_modules` names it.
        was: its class, as module.class.
        now: its class in `imf_kernels.nn`; "" if it was left alone.
        why: the reason why it was left alone.
    """

    name: str
    was: str
    now: str = ""
    why: str = ""


@dataclass
class _Candidate:
    """What a module could become.

    Attributes:
        kind: class in `imf_kernels.nn`.
        inputs: makes sample arguments of its forward.
        attributes: that the class needs and the module lacks.
    """

    kind: type[nn.Module]
    inputs: Callable[[Any], list[tuple[Any, ...]]]
    attributes: dict[str, Any]


def replace(network: nn.Module) -> list[Swap]:
    """Swaps modules in place for those of `imf_kernels.nn`, and prints one line per kind.

    A module is a candidate by its class: `torch.nn.RMSNorm`, `torch.nn.LayerNorm` and `torch.nn.GroupNorm`;
    by its name and children: RMSNorm with a `weight`, SwiGLU, rotary embeddings with tables as buffers,
    attention in timm's and Stable Diffusion's form, DiT's blocks. It is swapped if on a small random input,
    with noise on its parameters, its outputs equal the new ones under the error rule of docs/accuracy.md, in
    float32 and its own dtype, in evaluation and training, and if no part with hooks would no longer be
    called; otherwise it is left alone. Only the class of the object changes: parameters, tied ones too,
    buffers, parts, hooks, dtype, device and training flag are what they were. A part that the new class does
    not call, such as dropout that drops nothing, raises if it is hooked or changed later. Call it before
    `torch.compile`, DDP and FSDP.

    Args:
        network: any module; if it is a candidate itself it is swapped too.

    Returns:
        What was swapped or left alone, in the order of `named_modules`.

    Raises:
        TypeError: a network that is not a module.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"replace: network must be a torch.nn.Module, got {type(network).__name__}")
    swaps = swapped(network)
    for (was, now, why), count in Counter((s.was, s.now, s.why) for s in swaps).items():
        print(f"{count} × {was} " + (f"→ imf_kernels.nn.{now}" if now else f"left alone: {why}"))
    return swaps


def swapped(network: nn.Module) -> list[Swap]:
    """Does what `replace` does, without a word."""
    swaps, verdicts = [], {}
    for name, module in reversed(list(network.named_modules())):  # parts before the whole
        found = _candidates(module)
        if isinstance(found, list) and not found:
            continue
        swap = Swap(name, f"{type(module).__module__}.{type(module).__qualname__}")
        swaps.append(swap)
        if isinstance(found, str):
            swap.why = found
            continue
        key = (type(module), repr(module), repr(sorted(_plain(module).items())))
        if key not in verdicts:
            verdicts[key] = _verdict(module, found)
        index, swap.why, missed = verdicts[key]
        swap.why = swap.why or _lost(module, found[index], missed)
        if not swap.why:
            _become(module, found[index])
            if missed:
                module.skipped = tuple(missed)
            swap.now = found[index].kind.__name__
    return swaps[::-1]


def _lost(module: nn.Module, candidate: _Candidate, missed: list[str]) -> str:
    """Returns why parts that the candidate does not call forbid it; "" if none does."""
    parts = {name: getattr(module, name) for name in missed}
    hooked = [name for name, part in parts.items() if any(map(calls.has_own_hooks, part.modules()))]
    if hooked:
        return f"hooks of {', '.join(hooked)}, which would no longer be called"
    # Those of PyTorch that did nothing go on doing nothing, unless they are changed, which is noticed.
    others = [
        name for name, part in parts.items()
        if not hasattr(candidate.kind, "skipped") or type(part) not in (nn.Identity, nn.Dropout)
    ]  # fmt: skip
    return f"it calls {', '.join(others)}, which would no longer be called" if others else ""


def _become(module: nn.Module, candidate: _Candidate) -> None:
    for name, value in candidate.attributes.items():
        setattr(module, name, value)
    module.__class__ = candidate.kind


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _plain(module: nn.Module) -> dict[str, Any]:
    """Returns the attributes by which modules of equal layers may differ, those of their parts too."""
    values = {
        f"{name}.{k}": v
        for name, part in module.named_modules()
        for k, v in vars(part).items()
        if k not in _OF_EVERY_MODULE
    }
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {**values, **{f".{name}": (t.dtype, t.device, tuple(t.shape)) for name, t in tensors}}


def _candidates(module: nn.Module) -> list[_Candidate] | str:
    """Returns what a module could become, or why it is left alone."""
    kind = type(module)
    if kind.__module__.startswith(f"{__package__}.") or isinstance(module, torch.jit.ScriptModule):
        return []
    for theirs, ours in _OF_PYTORCH.items():
        if isinstance(module, theirs):
            if kind is not theirs:
                return f"a subclass of torch.nn.{theirs.__name__}"
            return _checked(module, [_Candidate(ours, _inputs_of_norm(module), {})])
    for pattern, make in _BY_NAME:
        if re.search(pattern, kind.__name__):
            found = list(make(module))
            if found:
                return _checked(module, found)
    return []


def _checked(module: nn.Module, found: list[_Candidate]) -> list[_Candidate] | str:
    if "forward" in vars(module):
        return "its forward was set on the object"
    if nn.utils.parametrize.is_parametrized(module):
        return "it has parametrizations"
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_meta:
            return "it has no values yet, on the meta device"
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"its parameters are of {type(tensor).__name__}; replace before the network is sharded"
    return found


_OF_PYTORCH: dict[type[nn.Module], type[nn.Module]] = {
    nn.RMSNorm: modules.RMSNorm,
    nn.LayerNorm: modules.LayerNorm,
    nn.GroupNorm: modules.GroupNorm,
}
_SCALES = 10.0 ** torch.arange(-4.0, 2.0)  # small rows tell one eps from another


def _rows_of(shape: Any) -> Callable[[Any], list[tuple[Any, ...]]]:
    return lambda draw: [(draw(2, len(_SCALES), *shape) * _SCALES.view(-1, *[1] * len(shape)),)]


def _inputs_of_norm(module: Any) -> Callable[[Any], list[tuple[Any, ...]]]:
    if isinstance(module, nn.GroupNorm):
        return lambda draw: [(draw(len(_SCALES), module.num_channels, 3, 5) * _SCALES.view(-1, 1, 1, 1),)]
    return _rows_of(module.normalized_shape)


def _rms_norms(module: nn.Module) -> Iterator[_Candidate]:
    eps = next((v for k, v in vars(module).items() if "eps" in k and isinstance(v, float)), None)
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 1 and eps is not None:
        shape = tuple(weight.shape)
        attributes = {"normalized_shape": shape, "eps": eps, "elementwise_affine": True}
        yield _Candidate(modules.RMSNorm, _rows_of(shape), attributes)


_SWIGLU_NAMES = (
    ("w1", "w3", "w2"),
    ("gate_proj", "up_proj", "down_proj"),
    ("fc1_g", "fc1_x", "fc2"),
    ("w12", "w3"),
    ("fc1", "fc2"),
)


def _swiglus(module: nn.Module) -> Iterator[_Candidate]:
    children = {n for n, c in module.named_children() if not isinstance(c, (nn.Identity, nn.Dropout))}
    for names in _SWIGLU_NAMES:
        layers = [child for name, child in module.named_children() if name in names]
        if children != {*names} or not all(isinstance(layer, nn.Linear) for layer in layers):
            continue
        first, last = getattr(module, names[0]), getattr(module, names[-1])
        if first.out_features == last.in_features * (4 - len(names)):
            yield _Candidate(modules.SwiGLU, _rows_of((first.in_features,)), {"names": names})


def _rotary(module: nn.Module) -> Iterator[_Candidate]:
    tables = {name: b for name, b in module.named_buffers(recurse=False) if b.dim() == 2}
    if any(True for _ in module.parameters()):
        return
    if len(tables) == 1 and all(table.is_complex() for table in tables.values()):
        layouts, width = ["complex"], 2
    elif len(tables) == 2 and len({table.shape for table in tables.values()}) == 1:
        layouts, width = ["interleaved", "half"], 1
    else:
        return
    names = tuple(sorted(tables))  # cos before sin
    length, columns = tables[names[0]].shape
    for layout in layouts:
        yield _Candidate(
            attention.RotaryEmbedding,
            lambda draw: [(draw(2, 3, length, columns * width),)],
            {"layout": layout, "names": names},
        )


def _cross_attentions(module: nn.Module) -> Iterator[_Candidate]:
    heads, layers = getattr(module, "heads", None), dict(module.named_children())
    arguments = list(inspect.signature(module.forward).parameters)
    to_out = layers.get("to_out")
    if not isinstance(heads, int) or set(layers) != {"to_q", "to_k", "to_v", "to_out"}:
        return
    if not isinstance(to_out, nn.Sequential) or arguments != ["x", "context", "mask"][: len(arguments)]:
        return
    d, width = (getattr(layers[name], "in_features", 0) for name in ("to_q", "to_k"))

    def inputs(draw: Any) -> list[tuple[Any, ...]]:
        x, context = draw(2, 6, d), draw(2, 5, width)
        mask = torch.arange(5, device=draw.device).expand(2, 5) != 2
        alone = [(x,)] if d == width else []
        return [*alone, *((x, context, mask)[:n] for n in range(2, len(arguments) + 1))]

    yield _Candidate(attention.CrossAttention, inputs, {})


def _attentions(module: nn.Module) -> Iterator[_Candidate]:
    qkv, proj = getattr(module, "qkv", None), getattr(module, "proj", None)
    heads = getattr(module, "num_heads", None) or getattr(module, "heads", None)
    if not (isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear) and isinstance(heads, int)):
        return
    dim, width = qkv.in_features, proj.in_features // heads
    arguments = list(inspect.signature(module.forward).parameters)
    if qkv.out_features != 3 * heads * width or proj.in_features != heads * width:
        return
    drops = [n for n, c in module.named_children() if isinstance(c, nn.Dropout) and "attn" not in n]
    attributes: dict[str, Any] = {"num_heads": heads}
    attributes |= {name: nn.Identity() for name in ("q_norm", "k_norm", "norm") if not hasattr(module, name)}
    if drops:
        attributes["name_of_dropout"] = drops[0]
    elif not hasattr(module, "proj_drop"):
        attributes["proj_drop"] = nn.Identity()
    shape = 2, 6, dim
    if arguments == ["x"]:
        yield _Candidate(attention.Attention, lambda draw: [(draw(*shape),)], attributes)
    elif arguments in (["x", "attn_mask"], ["x", "attn_mask", "is_causal"]):

        def inputs(draw: Any) -> list[tuple[Any, ...]]:
            x, mask = draw(*shape), draw(2, heads, 6, 6)
            causal = [(x, (mask > 0).logical_or_(torch.eye(6) > 0)), (x, None, True)]
            return [(x,), (x, mask), *(causal if len(arguments) == 3 else [])]

        yield _Candidate(attention.Attention, inputs, attributes)
    elif arguments == ["x", "rope"] and not width % 2:
        yield _Candidate(
            attention.RopeAttention,
            lambda draw: [(draw(*shape),), (draw(*shape), draw.module(_rope(width)))],
            attributes,
        )


def _rope(width: int) -> attention.RotaryEmbedding:
    return attention.RotaryEmbedding(6, width)


def _blocks(module: nn.Module) -> Iterator[_Candidate]:
    names = ("norm1", "norm2", "attn", "mlp", "adaLN_modulation")
    norm1, norm2, attn, mlp, modulation = (getattr(module, name, None) for name in names)
    plain = all(isinstance(n, nn.LayerNorm) and n.weight is None for n in (norm1, norm2))
    if not plain or not isinstance(modulation, nn.Sequential) or not isinstance(attn, nn.Module):
        return
    last, arguments = modulation[-1], list(inspect.signature(module.forward).parameters)
    if not isinstance(last, nn.Linear) or {*names} != {name for name, _ in module.named_children()}:
        return
    (dim,) = norm1.normalized_shape  # type: ignore[union-attr]

    def inputs(draw: Any) -> list[tuple[Any, ...]]:
        alone = draw(2, 6, dim), draw(2, last.in_features)
        if arguments == ["x", "c"]:
            return [alone]
        rope = draw.module(_rope(dim // attn.num_heads))
        return [alone, (draw(2, 6, dim), draw(2, last.in_features), rope)]

    if arguments == ["x", "c"] or (arguments == ["x", "c", "feat_rope"] and hasattr(attn, "num_heads")):
        if in_order := _in_order(mlp):
            yield _Candidate(blocks.AdaLNBlock, inputs, {"in_order": (type(mlp), in_order)})
        yield _Candidate(blocks.AdaLNBlock, inputs, {})


def _in_order(mlp: Any) -> tuple[str, ...]:
    """Returns the names of an MLP's layers if they are timm's, in its order."""
    names = tuple(name for name, _ in mlp.named_children())
    timms = tuple(n for n in ("fc1", "act", "drop1", "norm", "fc2", "drop2") if n in names)
    return names if names == timms and {"fc1", "fc2"} <= {*names} else ()


_BY_NAME: tuple[tuple[str, Callable[[nn.Module], Iterator[_Candidate]]], ...] = (
    (r"(?i)rms_?norm", _rms_norms),
    (r"(?i)swiglu|feed_?forward|ffn|mlp", _swiglus),
    (r"(?i)rotary|rope", _rotary),
    (r"(?i)attention|attn", _attentions),
    (r"(?i)attention|attn", _cross_attentions),
    (r"(?i)block|layer", _blocks),
)


class _Draw:
    """Random inputs, the same for each run, in one dtype."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.dtype, self.device = dtype, device

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def module(self, module: nn.Module) -> nn.Module:
        return _cast(module, self.dtype).to(self.device)

    def arguments(self, candidate: _Candidate, rounded: torch.dtype) -> list[tuple[Any, ...]]:
        """Returns samples that are values of the dtype `rounded`."""

        def placed(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return (x.to(rounded).to(self.dtype) if x.is_floating_point() else x).to(self.device)

        return [tuple(map(placed, arguments)) for arguments in candidate.inputs(self)]


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)


def _verdict(module: nn.Module, candidates: list[_Candidate]) -> tuple[int, str, list[str]]:
    """Returns which candidate computes what the module does, or why none does; and parts that it misses."""
    why = ""
    for i, candidate in enumerate(candidates):
        difference = _difference(module, candidate)
        if not difference:
            return i, "", _missed(module, candidate)
        why = why or difference
    return 0, why, []


def _own(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Returns a module's dtype, that of its first floating-point tensor, and its device."""
    tensors = [*module.parameters(), *module.buffers()]
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    return dtype, next((t.device for t in tensors), torch.device("cpu"))


def _difference(module: nn.Module, candidate: _Candidate) -> str:
    from imf_kernels.testing import errors

    own, device = _own(module)
    try:
        bare = _bare(copy.deepcopy(module))
        for rounded in {torch.float32, own}:
            for training in (False, True):
                theirs, ours, exact = (
                    _outputs(bare, candidate, swapped, dtype, rounded, training, device)
                    for swapped, dtype in ((False, rounded), (True, rounded), (False, torch.float64))
                )
                for got, wanted, true in zip(ours, theirs, exact, strict=True):
                    if not isinstance(wanted, Tensor):
                        return f"it returns {type(wanted).__name__}, not a tensor"
                    if got.dtype != wanted.dtype:
                        return f"the results' dtypes differ: {wanted.dtype}, now {got.dtype}"
                    true = true.double()
                    errors.check("the output", got, true, errors.Yardstick.of(wanted, true))
    except AssertionError as error:
        return f"the results differ: {str(error).splitlines()[0]}"
    except Exception as error:  # of code of other people, which may expect anything
        return f"it cannot be called by itself: {type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def _missed(module: nn.Module, candidate: _Candidate) -> list[str]:
    """Returns the names of the parts that the candidate's forward does not call in evaluation or training."""
    called: set[str] = set()
    bare = _bare(copy.deepcopy(module))
    for name, part in bare.named_children():
        for inner in part.modules():
            inner.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    own, device = _own(module)
    for training in (False, True):
        _outputs(bare, candidate, True, own, own, training, device)
    return [name for name, _ in module.named_children() if name not in called]


@torch.no_grad()
def _bare(module: nn.Module) -> nn.Module:
    """Removes the hooks, and adds noise: a layer of zeros would hide what follows it."""
    for part in module.modules():
        for name, hooks in vars(part).items():
            if name.endswith("_hooks") and hooks:
                hooks.clear()
    generator = torch.Generator().manual_seed(1)
    for p in module.parameters():
        noise = torch.randn(p.shape, generator=generator) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 0.1)
        p.add_(noise.to(p.device, p.dtype))
    return module


def _outputs(
    bare: nn.Module, candidate: _Candidate, swapped: bool, dtype: torch.dtype, rounded: torch.dtype,
    training: bool, device: torch.device,
) -> list[Any]:  # fmt: skip
    module = _cast(_cast(copy.deepcopy(bare), rounded), dtype).train(training)
    if swapped:
        _become(module, copy.deepcopy(candidate))
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)  # of dropout
        return [module(*x) for x in _Draw(dtype, device).arguments(candidate, rounded)]

"""Networks of other people under the objectives: what an objective asks of a network, and how yours gives it.

An objective, `imf.generate` and the trainer call every network in one form, `Network`: those of this package
and, through `adapt`, any module that predicts velocities from (z, t, r, labels). The module stays as it is;
du/dt is taken by `imf_kernels.jvp`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import imf_kernels as ik
from imf.distributed import sharded
from imf.model.config import AdaptedConfig
from imf.model.layers import check_forms
from imf.model.pretrained import Pretrained
from imf.program import UserError
from imf_kernels import Dual

# What `call` takes after the labels, by what guidance is to the network.
GUIDANCE = {"fixed": (), "omega": ("omega",), "interval": ("omega", "t_min", "t_max")}
LOWER_PRECISIONS = (torch.bfloat16, torch.float16)


class NetworkConfig(Protocol):
    """What an objective and a sampler know of a network.

    num_classes: labels are 0 … num_classes − 1, and num_classes is the null label, of a dropped one.
    in_channels, input_size: of its images [in_channels, input_size, input_size].
    has_v_head: whether it predicts v beside u; without, v(z, t) = u(z, t, t).
    omega_input, interval_input: whether the guidance scale ω and the guidance interval are inputs.
    """

    @property
    def num_classes(self) -> int: ...
    @property
    def in_channels(self) -> int: ...
    @property
    def input_size(self) -> int: ...
    @property
    def has_v_head(self) -> bool: ...
    @property
    def omega_input(self) -> bool: ...
    @property
    def interval_input(self) -> bool: ...


class Network(Protocol):
    """A network as objectives, samplers and the trainer call it: `IMF`, `DiT` and `Adapted` are such.

    config: what they know of it.
    compute_dtype: torch.bfloat16 for products in it; torch.float32 or None for the weights' own dtype.
    """

    config: NetworkConfig
    compute_dtype: torch.dtype | None

    def __call__(
        self,
        z: Tensor | Dual,
        t: Tensor | Dual,
        h: Tensor | Dual,
        omega: Tensor,
        t_min: Tensor,
        t_max: Tensor,
        y: Tensor,
        heads: str = "u",
    ) -> Any:
        """Returns u, v, or (u, v) for heads "uv", each as z [B, C, H, W]; u is a `Dual` where z, t or h is.

        t, h = t − r, omega, t_min, t_max: [B] as z; y: [B] in int64 or int32. Rows do not depend on each
        other.
        """
        ...


def positional(network: nn.Module, z: Tensor, t: Tensor, r: Tensor, labels: Tensor, *guidance: Tensor) -> Any:
    """Calls network(z, t, r, labels, *guidance): what `adapt` does unless told otherwise."""
    return network(z, t, r, labels, *guidance)


def adapt(
    network: nn.Module,
    *,
    num_classes: int,
    call: Callable[..., Any] = positional,
    v_head: bool = False,
    guidance: str = "fixed",
    shape: tuple[int, int, int] | None = None,
) -> Adapted:
    """Makes a module that predicts velocities a `Network`, for objectives, sampling and the trainer.

    The network is checked by two rows, with labels 0 and num_classes: at once where `shape` is given, else
    when the first batch comes. It must compute its rows independently, with float32 weights; autocast rounds,
    see `Adapted.compute_dtype`.

    Args:
        network: any module made of PyTorch's calls that `imf_kernels.jvp` can differentiate.
        num_classes: labels are 0 … num_classes − 1. The network must also take num_classes, the null label of
            dropped labels: its embedding has num_classes + 1 rows.
        call: returns u, or (u, v) with a v-head, from (network, z, t, r, labels, *guidance). z [B, C, H, W]
            and t, r [B] are float32, 0 ≤ r ≤ t ≤ 1, t = 1 noise; labels [B] int64. u is differentiated along
            (v, 1, 0) in (z, t, r), so none of them may be rounded or detached; a network of h is called with
            t − r. It must use the network that it is given, not one that it closes over: the moving average
            is a copy.
        v_head: whether call returns (u, v).
        guidance: "fixed" in training; "omega": call takes omega [B], the guidance scale, after the labels;
            "interval": omega, t_min, t_max.
        shape: (C, H, H) of the images.

    Raises:
        TypeError, ValueError: an argument, or a network that cannot be trained; the message says what to do.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"adapt: network must be a torch.nn.Module, got {type(network).__name__}")
    if isinstance(getattr(network, "config", None), AdaptedConfig):
        raise TypeError("adapt: network must be your own module, got one that is adapted already")
    if guidance not in GUIDANCE:
        raise ValueError(f"adapt: guidance must be one of {', '.join(GUIDANCE)}, got {guidance!r}")
    if type(num_classes) is not int or num_classes < 1:
        raise ValueError(
            f"adapt: num_classes must be an integer of at least 1, got {num_classes!r}; it does not count "
            f"the null label, and data without labels have one class"
        )
    if not callable(call):
        raise TypeError(
            f"adapt: call must be a function of (network, z, t, r, labels), got {type(call).__name__}"
        )
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm):
            raise ValueError(
                f"adapt: {name or 'network'} must compute rows independently, got a {type(module).__name__}, "
                f"whose statistics mix them; use nn.GroupNorm or nn.LayerNorm"
            )
    for name, x in network.named_parameters():
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"adapt: weights must be float32, got {name} of {x.dtype}; pass network.float(): autocast "
                f"rounds products, AdamW and the average need all digits"
            )
    kind = type(network)
    config = AdaptedConfig(
        custom=f"{kind.__module__}.{kind.__qualname__}",
        num_classes=num_classes,
        has_v_head=v_head,
        omega_input=guidance != "fixed",
        interval_input=guidance == "interval",
    )
    adapted = Adapted(network, call, config)
    if shape is not None:
        adapted.check(shape)
    return adapted


class Adapted(Pretrained):
    """A `Network` made of another module, `network`, by `adapt`; weights have its names after "network.".

    It draws by labels as networks of this package do, see `imf.model.pretrained.Pretrained.generate`.

    config: what is known of it.
    compute_dtype: torch.bfloat16 or torch.float16 to run it under autocast; else as the code around it.
    unused: names of weights without influence on its outputs, once it is checked.
    """

    def __init__(self, network: nn.Module, call: Callable[..., Any], config: AdaptedConfig) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.unused: tuple[str, ...] = ()
        self._call = call

    def forward(
        self,
        z: Tensor | Dual,
        t: Tensor | Dual,
        h: Tensor | Dual,
        omega: Tensor,
        t_min: Tensor,
        t_max: Tensor,
        y: Tensor,
        heads: str = "u",
    ) -> Any:
        """Velocities at z, as of `Network`; rows in front that carry no tangent are evaluated without.

        Raises: ValueError or TypeError for inputs that do not fit, and as `adapt` does for the network.
        """
        has_v = self.config.has_v_head
        if heads not in ("u", "v", "uv") or ("v" in heads and not has_v):
            wanted = "'u', 'v' or 'uv'" if has_v else "'u' (adapted without v_head=True)"
            raise ValueError(f"{self._name}: heads must be {wanted}, got {heads!r}")
        if not self.config.in_channels and not torch.compiler.is_compiling():
            self.check(tuple(z.shape[1:]))
        scalars = {"t": t, "h": h, "omega": omega, "t_min": t_min, "t_max": t_max}
        check_forms(self._name, self.config, z, y, scalars)
        rest = (y.long(), *(omega, t_min, t_max)[: len(GUIDANCE[self.config.form])])
        duals = [x for x in (z, t, h) if isinstance(x, Dual)]
        n = max((len(x.tangent_rows) for x in duals if x.tangent_rows is not None), default=0)
        (z, z_dot), (t, t_dot), (h, h_dot) = map(_unpacked, (z, t, h))
        r = t - h
        if heads == "v":
            n = 0
        first, last = slice(0, len(z) - n), slice(len(z) - n, None)
        parts, u_dot = [], z.new_zeros(0, *z.shape[1:])
        if n < len(z) or not n:
            parts.append(self._velocities(z[first], t[first], r[first], *(x[first] for x in rest)))
        if n:
            r_dot = _difference(t_dot, h_dot)
            along = tuple(x if x is None else x[last] for x in (z_dot, t_dot, r_dot))
            conditions = [x[last] for x in rest]
            outputs, tangents = ik.jvp(
                lambda *moved: self._velocities(*moved, *conditions), (z[last], t[last], r[last]), along
            )
            parts.append(outputs)
            u_dot = tangents[0].detach()
        u, *v = (torch.cat(x) if len(x) > 1 else x[0] for x in zip(*parts, strict=True))
        if heads == "v":
            return v[0]
        if duals:
            u = Dual(u, u_dot)
        return (u, v[0]) if heads == "uv" else u

    def save_pretrained(self, folder: Any, **options: Any) -> None:
        """Raises UserError: a folder holds no code, so none is written for a network of your own."""
        raise UserError(
            f"save_pretrained: a folder cannot hold {self.config.custom}, which is code of your own; keep "
            f"a checkpoint, for imf.load(path, network=imf.adapt(…)), or save network.state_dict()"
        )

    @property
    def _name(self) -> str:
        return f"adapted {self.config.custom.rpartition('.')[2]}"

    def _velocities(self, z: Tensor, t: Tensor, r: Tensor, *conditions: Tensor) -> tuple[Tensor, ...]:
        """Returns (u,) or (u, v), in z's dtype."""
        with self._autocast(z.device.type):
            outputs = self._call(self.network, z, t, r, *conditions)
        has_v, name = self.config.has_v_head, self._name
        if isinstance(outputs, tuple) is not has_v or (has_v and len(outputs) != 2):
            got = f"{len(outputs)} of them" if isinstance(outputs, tuple) else f"one {type(outputs).__name__}"
            wanted = "the pair (u, v), with v_head=True" if has_v else "the tensor u, without v_head=True"
            raise TypeError(f"{name}: call must return {wanted}, got {got}")
        velocities = outputs if has_v else (outputs,)
        for head, x in zip("uv", velocities, strict=has_v):
            if not isinstance(x, Tensor):
                hint = "; return its .sample" if hasattr(x, "sample") else ""
                raise TypeError(f"{name}: {head} must be a tensor, got {type(x).__name__}{hint}")
            if x.shape != z.shape or not x.is_floating_point():
                hint = ""
                if x.dim() == 4 and x.shape[1] == 2 * z.shape[1]:
                    hint = (
                        "; twice the channels: a network that also predicts a variance? Set its out_channels"
                    )
                raise ValueError(
                    f"{name}: {head} must be {list(z.shape)} of floating-point type like z, "
                    f"got {list(x.shape)} of {x.dtype}{hint}"
                )
        return tuple(x.to(z.dtype) for x in velocities)

    def _autocast(self, device: str) -> contextlib.AbstractContextManager[Any]:
        if self.compute_dtype in LOWER_PRECISIONS:
            return torch.autocast(device, self.compute_dtype)
        return contextlib.nullcontext()

    def check(self, shape: tuple[int, ...]) -> None:
        """Checks the network by two rows of images of this shape, and remembers it.

        It must take the null label and return velocities of the right form; u must depend on z, t, r and
        guidance by a chain of differentiable calls, whatever the values of its weights.
        Raises: TypeError, ValueError, saying what to do.
        """
        name = self._name
        if len(shape) != 3 or shape[1] != shape[2] or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(f"{name}: shape must be (C, H, W) with H = W, got {tuple(shape)}")
        if sharded(self) or sharded(self.network):
            raise ValueError(
                f"{name}: pass shape={tuple(shape)} to imf.adapt: FSDP2 has sharded it unchecked"
            )
        weight = next((p for p in self.parameters()), torch.zeros(()))
        device, dtype = weight.device, weight.dtype
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
            inputs = {
                "z": noise.to(device),
                "t": torch.tensor([0.7, 0.9], dtype=dtype, device=device),
                "r": torch.tensor([0.3, 0.4], dtype=dtype, device=device),
            }
            labels = torch.tensor([0, self.config.num_classes], device=device)
            values = [(2.0, 3.0), (0.1, 0.2), (0.8, 0.9)]
            for key, pair in zip(GUIDANCE[self.config.form], values, strict=False):
                inputs[key] = torch.tensor(pair, dtype=dtype, device=device)
            for x in inputs.values():
                x.requires_grad_()
            z, t, r, *guidance = inputs.values()
            with self._watched_embeddings():
                outputs = self._velocities(z, t, r, labels, *guidance)
            u = outputs[0]
            if not u.requires_grad:
                raise ValueError(f"{name}: u must have a graph; is call under torch.no_grad, or detached?")
            weights = dict(self.named_parameters())
            wanted = [*inputs.values(), *(p for p in weights.values() if p.requires_grad)]
            total = torch.stack([x.double().sum() for x in outputs]).sum()
            of_u = torch.autograd.grad(u.sum(), list(inputs.values()), retain_graph=True, allow_unused=True)
            of_all = torch.autograd.grad(total, wanted, allow_unused=True)[len(inputs) :]
        for key, gradient in zip(inputs, of_u, strict=True):
            if gradient is None:
                raise ValueError(f"{name}: u must depend on {key}; {_ADVICE.get(key, _OF_GUIDANCE)}")
        trained = [key for key, p in weights.items() if p.requires_grad]
        self.unused = tuple(key for key, g in zip(trained, of_all, strict=True) if g is None)
        self.config = replace(self.config, in_channels=shape[0], input_size=shape[1])

    @contextlib.contextmanager
    def _watched_embeddings(self) -> Iterator[None]:
        """Raises ValueError, naming it, for an embedding that is too small for the indices it gets."""

        def watch(path: str, module: nn.Embedding, args: Any) -> None:
            found, rows = [x for x in args if isinstance(x, Tensor) and x.numel()], module.num_embeddings
            if found and int(found[0].max()) >= rows:
                n = self.config.num_classes
                raise ValueError(
                    f"{self._name}: the embedding {path} has {rows} rows, got index {int(found[0].max())}; "
                    f"labels go from 0 to num_classes = {n}, the null label: make it of {n + 1} rows"
                )

        hooks = [
            module.register_forward_pre_hook(functools.partial(watch, path))
            for path, module in self.network.named_modules()
            if isinstance(module, nn.Embedding)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


_TIMES = (
    "it is the average velocity over [r, t]: call must pass both to the network, or t and t − r, or t − r "
    "alone, neither rounded to integers nor detached, which leaves them without a derivative"
)
_ADVICE = {"z": "call must pass it to the network, not detached", "t": _TIMES, "r": _TIMES}
_OF_GUIDANCE = "call must pass it to the network, or leave it out of `guidance`"


def _unpacked(x: Tensor | Dual) -> tuple[Tensor, Tensor | None]:
    """Returns a tensor and its full tangent, as data."""
    if not isinstance(x, Dual):
        return x, None
    return x.primal, None if x.tangent is None else x.tangent.detach()


def _difference(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    if y is None:
        return x
    return -y if x is None else x - y

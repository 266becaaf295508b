"""Networks of other people, and written here in their manner: a training step with a tangent.

The step is MeanFlow's: output and tangent in one call, a loss of both, the backward of the output.
- `ours`: `imf_kernels.jvp`. `torch.func.jvp`: in its place, attention in its plain form. `replaced`: ours
  after `imf_kernels.nn.replace`. `compiled`: the step by `torch.compile(fullgraph=True)`.
- `one forward and backward`: of the network as it is, without a tangent.
- `products alone`: the convolutions and matrix products of `ours`, attention's as batched products, each with
  PyTorch's speed and nothing else: a bound.

    pytest benchmarks/transforms/bench_networks.py --benchmark-only                    one network, eager
    pytest benchmarks/transforms/bench_networks.py --benchmark-only --every-case  all, bf16 too, compiled
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import imf_kernels as ik
from benchmarks.tools.observe import Beside, look

for name in ("diffusers", "transformers"):
    pytest.importorskip(name, reason=f"{name} is not installed: pip install -e '.[dev]'")

from benchmarks.baselines import written  # noqa: E402
from benchmarks.baselines.networks import NETWORKS, made  # noqa: E402

TRANSFORMER = {"size": 32, "heads": 6, "head_dim": 64, "layers": 4}  # 256 tokens of width 384
UNET = {"size": 32, "heads": 1, "head_dim": 64}  # widths 64 and 128
SHAPES = {
    **dict.fromkeys(("unet", "edm_unet", "guided_unet"), UNET),
    "unet_3d": {"size": 32, "heads": 1, "head_dim": 32},
    "flux": {**TRANSFORMER, "layers": 2},  # of each of its two kinds
}
FORMS = (
    *("ours", "torch.func.jvp", "ours, replaced", "one forward and backward", "products alone"),
    *("ours, compiled", "torch.func.jvp, compiled", "ours, replaced, compiled"),
)
BATCH = 4


def make(name: str, form: str, precision: str) -> Callable[[], float]:
    """A step in this form, from the same weights and inputs as every other; a call returns the loss."""
    if form == "products alone":
        return products_alone(make(name, "ours", precision))
    network, of, (z, t), (z_dot, t_dot) = made(name, BATCH, **SHAPES.get(name, TRANSFORMER))
    if "replaced" in form:
        with contextlib.redirect_stdout(io.StringIO()):
            ik.nn.replace(network)
    function = of(network)

    def loss() -> Tensor:
        if form == "one forward and backward":
            y, y_dot = function(z, t), torch.zeros(())
        elif form.startswith("ours"):
            y, y_dot = ik.jvp(function, (z, t), (z_dot, t_dot))
        else:
            with sdpa_kernel(SDPBackend.MATH):
                y, y_dot = torch.func.jvp(function, (z, t), (z_dot, t_dot))
        return (y + 0.5 * y_dot.detach() - 1).square().mean()

    compute = loss
    if form.endswith("compiled"):
        torch._dynamo.reset()
        compute = torch.compile(loss, dynamic=False, fullgraph=True)

    def step() -> float:
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            value = compute()
        value.backward()
        return float(value.detach())

    return step


class _Products(TorchDispatchMode):
    """Notes the products that a step calls, and runs them again on tensors of the same layouts."""

    LAYERS: ClassVar[dict[str, Callable[..., Any]]] = {
        "linear_forward": F.linear,
        "linear_grad_input": lambda dy, weight: dy @ weight,
        "linear_grad_weight": lambda dy, x: dy.t() @ x,
    }

    def __init__(self) -> None:
        super().__init__()
        self.calls, self._made = list[Callable[[], Any]](), dict[Any, Tensor]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.removesuffix("_")
        if name in ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"):
            self._note(getattr(torch.ops.aten, name), *args)
        elif name in self.LAYERS:
            self._note(self.LAYERS[name], *args)
        elif name in ("attention_forward", "attention_backward"):
            named = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
            q, k = (named[x].flatten(0, 1) for x in "qk")
            moves = any(named.get(f"{x}_dot") is not None for x in "qkv")
            weights = q @ k.mT  # [B H, L, L]; every other product is of this kind
            for i in range(5 if name == "attention_backward" else 6 if moves else 2):
                self._note(torch.bmm, *((weights, k) if i % 2 else (q, k.mT)))
        return func(*args, **kwargs or {})

    def _note(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.calls.append(functools.partial(function, *map(self._like, arguments)))

    def _like(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        key = tuple(x.shape), x.stride(), x.dtype
        if key not in self._made:
            self._made[key] = torch.empty_strided(*key[:2], dtype=x.dtype).normal_()
        return self._made[key]

    @torch.no_grad()
    def run(self) -> float:
        for call in self.calls:
            call()
        return 0.0


def products_alone(step: Callable[[], float]) -> Callable[[], float]:
    step()
    with _Products() as products:
        step()
    return products.run


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    every = metafunc.config.getoption("--every-case")
    metafunc.parametrize("network", [*written.NETWORKS, *NETWORKS] if every else ["sit"])
    metafunc.parametrize("precision", ["fp32", "bf16"] if every else ["fp32"])
    metafunc.parametrize("form", FORMS if every else FORMS[:5], ids=lambda form: form)


def test_network(benchmark: Any, network: str, precision: str, form: str) -> None:
    benchmark.group = f"{network}, {precision}"
    benchmark.extra_info |= {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "network": network,
        "dtype": precision,
        "form": form,
    }
    ours = make(network, "ours", precision)
    step = make(network, form, precision)
    try:  # in a thread of its own: a transform of torch.func that fails leaves its state behind
        with ThreadPoolExecutor(1) as thread:
            loss = thread.submit(step).result()
    except Exception as error:
        if not form.startswith("torch.func.jvp"):
            raise
        benchmark.extra_info["fails"] = f"{type(error).__name__}: {error}".splitlines()[0]
        benchmark.pedantic(lambda: None, rounds=1)
        return
    if form not in ("one forward and backward", "products alone"):
        assert loss == pytest.approx(ours(), rel=1e-4 if precision == "fp32" else 3e-2)
    benchmark.extra_info |= {"loss": loss, **look(step)}
    beside = Beside(ours) if form != "ours" else None
    benchmark.pedantic(step, setup=beside, rounds=5, warmup_rounds=1, iterations=1)
    if beside:
        benchmark.extra_info["ours beside"] = beside.seconds[-5:]

"""The whole training step, forward and backward, at three sizes: ours and what people would run instead.

- `ours`: the exact less-work form with our operations.
- `one forward and backward`: of the same network with both heads, our operations, no tangent: what a step
  with no derivative and no guidance would cost.
- `official`: the official step written plainly with `torch.func.jvp`, eager; its guidance calls compute the
  v-head alone. `official, compiled`: by `torch.compile`. `official, our products`: eager, its linear layers'
  fp32 products chosen as ours are, so that what they gain can be told from what kernels and less work gain.
- `finite differences`: the official step with central differences in the place of the derivative.
- `plain flow matching`: of the sampling network, without v-head, guidance and derivative, in stock PyTorch.
- `official, JAX`: the official program itself, compiled by `jax.jit`, in a process beside; official_jax.py.

    pytest benchmarks/training/bench_step.py --benchmark-only                     the digits
    pytest benchmarks/training/bench_step.py --benchmark-only --every-case  all sizes and forms, the sweeps
    ... --official-jax DIR [--jax-python PYTHON]                         and the official program
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines import plain_imf
from benchmarks.tools.observe import Beside, look
from benchmarks.training.sizes import PLOTTED, SIZES, SWEEPS
from imf.model.config import IMFConfig
from imf.networks import build
from imf.objective.draws import Draws, StepDraws
from imf.objective.imf_loss import improved_mean_flow
from imf.official.names import from_official
from imf.training import parallel as sharding
from imf.training.graphs import CudaGraph
from imf_kernels.backends import matmul

FORMS = (
    "ours", "one forward and backward", "official", "official, our products", "official, compiled",
    "finite differences", "plain flow matching", "plain flow matching, compiled", "official, JAX",
)  # fmt: skip
SWEPT = ("ours", "official", "plain flow matching")


class _Product(torch.autograd.Function):
    """x weightᵀ by the product that `imf_kernels.backends.matmul` takes, also in forward mode."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return matmul.forward(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, x_dot: Tensor, weight_dot: Tensor | None) -> Tensor:
        return _Product.apply(x_dot, ctx.saved_tensors[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dx = matmul.grad_input(rows, weight).view(x.shape)
        return dx, matmul.grad_weight(rows, x.reshape(-1, x.shape[-1]))


def with_our_products(network: nn.Module) -> nn.Module:
    for layer in network.modules():
        if isinstance(layer, nn.Linear):

            def forward(x: Tensor, layer: nn.Linear = layer) -> Tensor:
                y = _Product.apply(x, layer.weight)
                return y if layer.bias is None else y + layer.bias

            layer.forward = forward
    return network


def with_fused_attention(network: nn.Module) -> nn.Module:
    """PyTorch's fastest attention in the place of the plain one, through which no derivative goes."""
    for layer in network.modules():
        if isinstance(layer, plain_imf.Attention):

            def forward(x: Tensor, layer: plain_imf.Attention = layer) -> Tensor:
                projections = layer.q_proj, layer.k_proj, layer.v_proj
                q, k, v = (p(x).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for p in projections)
                q, k = (plain_imf.rope(n(a)).to(v.dtype) for n, a in ((layer.q_norm, q), (layer.k_norm, k)))
                return layer.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

            layer.forward = forward
    return network


def make(
    form: str, size: tuple[IMFConfig, int], precision: str, device: str = "cpu"
) -> Callable[[], float | Tensor]:
    """A step in this form, on the same weights, data and draws as every other; a call returns the loss.

    On a GPU the loss stays there, and the forms of bench_gpu_step.py are known beside those here.
    """
    config, batch = size
    torch.manual_seed(0)
    oracle = plain_imf.plain(config)
    with torch.no_grad():  # a fresh network's heads are zero, and so are its losses' differences
        for parameter in oracle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    oracle = oracle.to(device)
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size).to(device)
    y = torch.randint(0, config.num_classes, (batch,)).to(device)
    drawn = Draws.sample(x, seed=0, step=0)  # which lie on the host, but for the noise
    prepared, draws = StepDraws.of(drawn, None, x.device), drawn.to(device)
    t = draws.t[:, None, None, None]
    z, h, v_t = (1 - t) * x + t * draws.noise, draws.t - draws.r, draws.noise - x
    conditions = draws.omega, draws.t_min, draws.t_max

    network: nn.Module = oracle
    ours = form.startswith("ours")
    if ours or form == "one forward and backward":
        network = build(config).to(device)
        network.load_state_dict(from_official(oracle.state_dict()))
        network.compute_dtype = torch.bfloat16 if precision == "bf16" else None
        options: dict[str, Any] = {"sharding": None, "device": x.device, "checkpointing": False}
        sharding.wrap_for_training(network, network, compile="compiled" in form, **options)
    elif form == "official, our products":
        with_our_products(oracle)
    elif "fused attention" in form:
        with_fused_attention(oracle)

    def loss() -> Tensor:
        if ours:
            step = prepared if "CUDA graph" in form else drawn
            return improved_mean_flow(network, x, y, step).loss
        if "forward and backward" in form:
            u, v = network(z, draws.t, h, *conditions, y, heads="uv")
            return F.mse_loss(u, v_t) + F.mse_loss(v, v_t)
        if "flow matching" in form:
            return F.mse_loss(network(z, draws.t, h, *conditions, y, heads="u"), v_t)
        derivative = finite_differences if form == "finite differences" else torch.func.jvp
        return plain_imf.official_step(network, x, y, draws, derivative).loss

    compute = loss
    if form.endswith("compiled") and not ours:
        torch._dynamo.reset()  # a function can be compiled for so many networks only
        compute = torch.compile(loss, dynamic=False, fullgraph=True)
    autocast = precision == "bf16" and network is oracle

    def step() -> Tensor:
        network.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            value = compute()
        value.backward()
        return value.detach()

    if device == "cpu":
        return lambda: float(step())
    if "CUDA graph" not in form:
        return step
    step()  # kernels compile, and libraries begin, outside
    captured = functools.cache(lambda: CudaGraph(step, x.device))
    return lambda: captured().replay()


def finite_differences(
    function: Any, primals: Any, tangents: Any, has_aux: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """In the place of `torch.func.jvp`: u, du/dt by central differences, and v."""
    step = 5e-3

    def at(sign: float) -> Tensor:
        with torch.no_grad():
            return function(*(x + sign * step * d for x, d in zip(primals, tangents, strict=True)))[0]

    u, v = function(*primals)
    return u, (at(1.0) - at(-1.0)) / (2 * step), v


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    every = config.getoption("--every-case")
    selected = []
    for name in SIZES if every else ["digits"]:
        for precision in ("fp32", "bf16"):
            for form in FORMS:
                if precision == "bf16" and form == "official, our products":
                    continue  # PyTorch's own are ours there
                if form == "official, JAX" and (
                    precision == "bf16" or not config.getoption("--official-jax")
                ):
                    continue  # it has no other precision
                if every or not (form.endswith("compiled") or form == "finite differences"):
                    selected.append((name, precision, form))
    if every:
        selected += [(name, "fp32", form) for name in SWEEPS for form in SWEPT]
    metafunc.parametrize(("size", "precision", "form"), selected, ids=lambda value: value)


@contextlib.contextmanager
def official_jax(size: tuple[IMFConfig, int], config: pytest.Config) -> Iterator[Callable[[], float]]:
    """A call runs one step of the official program, in a process of its own, and returns the loss."""
    form = ("conditioning", "block", "omega_input", "interval_input")
    fields = {name: value for name, value in dataclasses.asdict(size[0]).items() if name not in form}
    script = str(Path(__file__).with_name("official_jax.py"))
    command = [config.getoption("--jax-python"), script, config.getoption("--official-jax")]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, json.dumps(fields), str(size[1])], **pipes) as process:
        assert process.stdout.readline() == "ready\n", (
            "the official program did not start: see its output above"
        )

        def step() -> float:
            process.stdin.write("\n")
            process.stdin.flush()
            return float(process.stdout.readline())

        yield step
        process.stdin.close()


def test_step(benchmark: Any, request: Any, size: str, precision: str, form: str) -> None:
    benchmark.group = f"training step, {size}, {precision}"
    shape = {**SIZES, **SWEEPS}[size]
    benchmark.extra_info |= {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "size": size,
        "dtype": precision,
        "form": form,
    }
    if precision == "fp32" and form in SWEPT and size != "digits":
        benchmark.extra_info["point"] = PLOTTED.get(size, size)
    with contextlib.ExitStack() as stack:
        if form == "official, JAX":
            step = stack.enter_context(official_jax(shape, request.config))
        else:
            step = make(form, shape, precision)
            loss = step()
            if form == "ours" or form.startswith("official, "):
                wanted = make("official", shape, precision)()
                assert loss == pytest.approx(wanted, rel=1e-4 if precision == "fp32" else 2e-2)
            benchmark.extra_info |= {"loss": loss, **look(step)}
        # Ours runs in turns with the other, so that a slow moment of the machine falls on both.
        beside = Beside(make("ours", shape, precision)) if form != "ours" else None
        benchmark.pedantic(step, setup=beside, rounds=5, warmup_rounds=1, iterations=1)
        if beside:
            benchmark.extra_info["ours beside"] = beside.seconds[-5:]

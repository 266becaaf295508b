"""Where the time of a training step goes, beside the least that it can take on this machine.

The bound: matrix products and attention at the rate of the machine's fastest matrix product, row operations
at the speed of a copy, nothing else, and no two of them at once. Counted is what the exact step needs: v_c on
the rows with r < t and v_u on the guided ones, the primal pass, tangents where r < t, the backward.

    python -m benchmarks.training.profile_step --size slice --precision bf16  a size of bench_step.py
    python -m benchmarks.training.profile_step --preset iMF-B/2 --batch 128  on a GPU where there is one
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.tools.observe import look
from benchmarks.training.sizes import SIZES
from imf.model.config import IMFConfig
from imf.networks import build
from imf.objective.draws import Draws, StepDraws
from imf.objective.imf_loss import improved_mean_flow
from imf.training import parallel as sharding
from imf_kernels.backends.operators import profiled_names
from imf_kernels.testing.timer import side_by_side

# What a profile calls the work of a kind: on a CPU operators, on a GPU kernels. The first that fits counts.
NAMES = {
    "attention": (*profiled_names("attention"), "flash", "fmha"),
    "products": (
        *("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::", "mkl::"),
        *("gemm", "nvjet", "cutlass", "xmma", "cublas"),
    ),
    "copies and additions": ("aten::copy_", "aten::add", "aten::sum", "Memcpy", "Memset", "at::native"),
    "rows": profiled_names("rows"),
}


@dataclass(frozen=True)
class Work:
    """FLOPs of products and of attention, and bytes that row operations read and write."""

    products: float = 0.0
    attention: float = 0.0
    rows: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.products + other.products, self.attention + other.attention, self.rows + other.rows)

    def __mul__(self, factor: float) -> Work:
        return Work(self.products * factor, self.attention * factor, self.rows * factor)


def block_work(config: IMFConfig, size: int, *, tangent: bool = False, backward: bool = False) -> Work:
    """One block and one sample; size: bytes of an operand. The residual stream is fp32.

    A tangent's pass has the primal's products, and four products of L x L in attention in the place of two;
    what it reads of the primal the primal's pass has read. A backward has twice the products, five of L x L.
    """
    tokens, d, hidden = config.tokens, config.hidden_size, config.mlp_width
    products = 2 * tokens * (4 * d * d + 3 * d * hidden)
    attention = 2 * tokens * tokens * d  # a product of L x L
    stream, operand = 4 * tokens * d, size * tokens * d
    mlp = size * tokens * hidden
    if backward:
        norm = 3 * stream + operand  # x, dy and the stream's gradient in, its sum out
        residual = stream + 2 * operand  # dy and the branch in, its gradient out
        rows = 2 * norm + 2 * residual + 6 * operand + 5 * mlp
        return Work(2 * products, 5 * attention, rows)
    rows = 2 * (stream + operand) + 2 * (2 * stream + operand) + 4 * operand + 3 * mlp
    return Work(products, (4 if tangent else 2) * attention, rows)


def step_work(config: IMFConfig, batch: int, moving: int, guided: int, size: int) -> Work:
    """A whole step. moving: rows with r < t; guided: rows that v_u is needed of."""
    head, shared = config.aux_head_depth, config.depth - config.aux_head_depth
    forward, tangent, backward = (
        block_work(config, size),
        block_work(config, size, tangent=True),
        block_work(config, size, backward=True),
    )
    one_way, both = shared + head, shared + 2 * head
    velocity = forward * (one_way * (moving + guided))
    return velocity + forward * (both * batch) + tangent * (one_way * moving) + backward * (both * batch)


def work_of(config: IMFConfig, draws: Draws, size: int) -> Work:
    """A whole step with these draws, of which all but the noise lie on the host."""
    step = StepDraws.of(draws, None, torch.device("cpu"))
    return step_work(config, len(draws.t), len(step.c_rows), int((step.kappa != 0).sum()), size)


def step_of(
    config: IMFConfig, batch: int, precision: str, device: torch.device, checkpointing: bool
) -> tuple[Callable[[], Tensor], Work]:
    """A training step, forward and backward, and its work, without what checkpointing computes again."""
    torch.manual_seed(0)
    model = build(config).to(device)
    with torch.no_grad():  # of a fresh network branches and outputs are zero
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.compute_dtype = torch.bfloat16 if precision == "bf16" else None
    sharding.wrap_for_training(
        model, model, sharding=None, device=device, compile=False, checkpointing=checkpointing
    )
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size).to(device)
    y = torch.randint(0, config.num_classes, (batch,)).to(device)
    draws = Draws.sample(x, seed=0, step=0)
    work = work_of(config, draws, 2 if precision == "bf16" else 4)

    def step() -> Tensor:
        model.zero_grad()
        loss = improved_mean_flow(model, x, y, draws).loss
        loss.backward()
        return loss

    return step, work


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Of a call, on the device."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    return side_by_side({"call": call}, rounds=7, seconds=0.0, synchronize=synchronize)["call"].median


def rates(device: torch.device, precision: str) -> tuple[float, float]:
    """FLOPs a second of the fastest of some large products, bytes a second of a copy beyond any cache."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    sizes = (4096, 8192) if device.type == "cuda" else (1024, 2048)
    best = 0.0
    for n in sizes:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        best = max(best, 2 * n**3 / seconds_of(functools.partial(F.linear, a, b), device))
    source = torch.ones(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return best, 2 * source.numel() / seconds_of(lambda: target.copy_(source), device)


def shares(step: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """The share of each kind in the time that operators, or on a GPU kernels, take themselves."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as record:
        step()
    times = dict.fromkeys((*NAMES, "the rest"), 0.0)
    for entry in record.key_averages():
        if on_gpu != (entry.device_type == DeviceType.CUDA):
            continue
        kind = next((k for k, names in NAMES.items() if any(n in entry.key for n in names)), "the rest")
        times[kind] += entry.self_device_time_total if on_gpu else entry.self_cpu_time_total
    total = sum(times.values())
    return {kind: value / total for kind, value in times.items()}


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """Of tensors at one time in a step, above those there before: gradients and all."""
    if device.type == "cpu":
        return int(look(step)["peak tensor bytes"])
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


def measure(
    config: IMFConfig, batch: int, precision: str, device: torch.device, checkpointing: bool = False
) -> dict[str, Any]:
    """Seconds of a step, by kind, and the bound of each; its memory."""
    step, work = step_of(config, batch, precision, device, checkpointing)
    seconds = seconds_of(step, device)
    flops, bandwidth = rates(device, precision)
    bounds = {
        "products": work.products / flops,
        "attention": work.attention / flops,
        "rows": work.rows / bandwidth,
    }
    parts = {kind: share * seconds for kind, share in shares(step, device).items()}
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability()
    return {
        "device": name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "precision": precision,
        "batch": batch,
        "tokens": config.tokens,
        "checkpointing": checkpointing,
        "peak bytes": peak_bytes(step, device),
        "seconds": seconds,
        "bound": sum(bounds.values()),
        "GFLOP/s of a product": flops / 1e9,
        "GB/s of a copy": bandwidth / 1e9,
        "necessary GFLOPs": (work.products + work.attention) / 1e9,
        "by kind": {kind: {"seconds": parts[kind], "bound": bounds.get(kind)} for kind in parts},
    }


def table(result: dict[str, Any]) -> str:
    lines = ["| kind | ms | share | bound, ms | of its bound |", "| --- | --- | --- | --- | --- |"]
    whole = {"seconds": result["seconds"], "bound": result["bound"]}
    for kind, part in (*result["by kind"].items(), ("step", whole)):
        bound, seconds = part["bound"], part["seconds"]
        reached = ["", ""] if bound is None else [f"{bound * 1e3:.1f}", f"{bound / seconds:.0%}"]
        row = [kind, f"{seconds * 1e3:.1f}", f"{seconds / result['seconds']:.0%}", *reached]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="digits", help="a size of bench_step.py")
    parser.add_argument("--preset", help="in its place, a preset of imf.model.imf")
    parser.add_argument("--batch", type=int, help="rows of a step (default: the size's)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpointing", action="store_true", help="activations are recomputed")
    parser.add_argument("--json", type=Path, help="every figure, to this file")
    arguments = parser.parse_args()
    config, batch = SIZES[arguments.size]
    if arguments.preset:
        config, batch = build(arguments.preset).config, 32
    device, batch = torch.device(arguments.device), arguments.batch or batch
    result = measure(config, batch, arguments.precision, device, arguments.checkpointing)
    print(table(result))
    print(
        f"\n{result['device']}, {result['precision']}, {result['batch']} rows of {result['tokens']} tokens: "
        f"{result['necessary GFLOPs'] / result['seconds']:.0f} GFLOP/s of what is necessary, where a product "
        f"reaches {result['GFLOP/s of a product']:.0f}; a copy moves {result['GB/s of a copy']:.1f} GB/s; "
        f"tensors take {result['peak bytes'] / 2**20:,.0f} MiB"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

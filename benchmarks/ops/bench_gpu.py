"""Each operation on a GPU, beside what people would run instead; prints a line a case, writes every figure.

    python -m benchmarks.ops.bench_gpu OUT.json              all cases, in bf16
    python -m benchmarks.ops.bench_gpu OUT.json --only swiglu --dtype fp32

A case is checked by the error rule before it is timed; one that breaks it is left out, with the reason.
`seconds` is a call as Python makes it, launches included, median of rounds in which all forms take turns;
`device seconds` is a share of the replay of a CUDA graph of 20 calls, on copies of the inputs in turn, as
many as exceed the cache twice. Bounds are from bytes at the measured rate of a copy and from FLOPs at that
of PyTorch's matrix product. It needs no more than PyTorch.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.ops import peers
from imf_kernels import Dual
from imf_kernels.backends import triton_launch
from imf_kernels.backends.operators import OPERATIONS
from imf_kernels.testing import cases, errors, plain, timer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Call = Callable[[], Any]
CALLS = 20  # in a graph
TURNS: dict[str, Any] = {"rounds": 5, "seconds": 0.02, "synchronize": torch.cuda.synchronize}

CASES = [
    *cases.model("B/2, batch 64", 64, 276, 768, 12, 2048),
    *cases.model("XL/2, batch 32", 32, 276, 1024, 16, 2730),
    cases.attention("length 1024, batch 8", 8, 16, 1024, 64),
    cases.attention("length 1024, batch 8, width 128", 8, 8, 1024, 128),
    cases.attention("length 2048, batch 4", 4, 16, 2048, 64),
    cases.attention("length 4096", 1, 16, 4096, 64),
    cases.attention("length 276, 2048 heads", 128, 16, 276, 64),
]


@dataclass(frozen=True)
class Machine:
    """Bytes a second, read and written, of a copy, and FLOPs a second of products."""

    bandwidth: float
    flops: dict[torch.dtype, float]

    def work(self, case: cases.Case, dtype: torch.dtype, form: str) -> dict[str, float]:
        """FLOPs and bytes of a form, and the seconds that its bytes or, of products, FLOPs take at least."""
        dual = not form.startswith(("primal", "forward"))
        passes = [(case.count_flops(dual), case.count_bytes(dtype, dual))]
        if "backward" in form:
            passes.append((case.backward_flops, case.count_backward_bytes(dtype)))
        rate = self.flops[dtype] if case.operation in peers.PRODUCTS else math.inf
        bound = sum(max(size / self.bandwidth, flops / rate) for flops, size in passes)
        flops, size = map(sum, zip(*passes, strict=True))
        return {"flops": flops, "bytes": size, "bound": bound}


def measure_machine() -> Machine:
    """A copy of 4 GiB, and products of 8192 rows, 4096 → 4096, fp32 without TF32."""
    source = torch.ones(1 << 29)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / best(lambda: target.copy_(source))
    flops = {}
    for dtype in DTYPES.values():
        x, w = torch.randn(8192, 4096, dtype=dtype), torch.randn(4096, 4096, dtype=dtype)
        flops[dtype] = 2 * 8192 * 4096 * 4096 / best(functools.partial(F.linear, x, w))
    return Machine(bandwidth, flops)


def best(call: Call) -> float:
    return timer.side_by_side({"call": call}, **TURNS)["call"].best


def calls(problem: errors.Problem, compiled: bool) -> dict[str, Call]:
    """Everything that is timed for a case, by the name of its form."""
    case, x, x_dot = problem.case, problem.primals, problem.tangents

    def ours(backend: str | None, dual: bool) -> Call:
        tangents = x_dot if dual else {}
        arguments = {n: Dual(t, tangents[n]) if n in tangents else t for n, t in x.items()}
        return lambda: case.run(arguments, backend, **case.output_options)

    def with_backward(run: Callable[[dict[str, torch.Tensor]], tuple[Any, ...]]) -> Call:
        leaves = {n: t.detach().requires_grad_(n in case.differentiable) for n, t in x.items()}
        wanted = [leaves[n] for n in case.differentiable]
        return lambda: torch.autograd.grad(run(leaves), wanted, problem.cotangents)

    def backward_of(backend: str | None) -> Call:
        return with_backward(lambda leaves: case.run(leaves, backend, **case.output_options))

    forms = {"dual": ours(None, True), "primal": ours(None, False), "dual reference": ours("reference", True)}
    forms["primal and backward"] = backward_of(None)
    for backend in ("cuda", "triton") if has_cuda(problem) else ():
        forms |= {f"dual, {backend}": ours(backend, True), f"primal, {backend}": ours(backend, False)}
    if case.operation == "scaled_dot_product_attention" and (case.options or "attn_mask" in x):
        return forms
    formula = plain.formula(case)
    forms["primal, plain"] = lambda: formula(x)
    forms["primal and backward, plain"] = with_backward(formula)
    # Differences of bf16 numbers are noise.
    differences = ["finite differences"] if problem.dtype == torch.float32 else []
    for means in ("torch.func.jvp", *differences, *(["compiled"] if compiled else [])):
        forms[means] = peers.derivative(problem, means)
    if case.operation == "scaled_dot_product_attention":
        forms |= attention_peers(problem)
    return forms


def has_cuda(problem: errors.Problem) -> bool:
    """Whether the compiled CUDA kernels, which may not be the default, can run a case."""
    if all(backend.name != "cuda" for backend in OPERATIONS[problem.case.operation].backends):
        return False
    try:
        problem.case.run(problem.primals, "cuda")
    except (RuntimeError, ValueError) as error:
        if "cannot run" in str(error) or "backend must be" in str(error):
            return False
        raise
    return True


def attention_peers(problem: errors.Problem) -> dict[str, Call]:
    """PyTorch's fused forwards, and other packages' kernels where they are installed."""
    q, k, v = (problem.primals[n] for n in ("query", "key", "value"))

    def fused(backend: SDPBackend) -> Any:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    forms: dict[str, Call] = {
        "forward, cuDNN": lambda: fused(SDPBackend.CUDNN_ATTENTION),
        "forward, flash": lambda: fused(SDPBackend.FLASH_ATTENTION),
    }
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]

    def with_backward() -> Any:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(*leaves)
        return torch.autograd.grad(out, leaves, problem.cotangents)

    forms["forward and backward, cuDNN"] = with_backward
    tangents = [problem.tangents.get(n) for n in ("query", "key", "value")]
    if (package := installed("flash_attn")) is not None:
        rows = [t.transpose(1, 2) for t in (q, k, v)]
        forms["forward, flash-attn"] = lambda: package.flash_attn_func(*rows)
    if (package := installed("jvp_flash_attention.jvp_attention")) is not None and None not in tangents:
        duals = q, k, v, *tangents

        def jvp_flash_attention() -> Any:
            with torch.autograd.forward_ad.dual_level():
                make = torch.autograd.forward_ad.make_dual
                return package.JVPAttn.fwd_dual(*map(make, duals[:3], duals[3:]))

        forms["jvp-flash-attention"] = jvp_flash_attention
    return forms


def installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def copies(problem: errors.Problem) -> list[errors.Problem]:
    """The problem with inputs in other memory, so often that reading them in turn misses the cache."""
    cache = torch.cuda.get_device_properties().L2_cache_size
    count = min(CALLS, -(-2 * cache // problem.case.count_bytes(problem.dtype, True)))

    def copy(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: x.clone(memory_format=torch.preserve_format) for name, x in tensors.items()}

    others = [
        replace(problem, primals=copy(problem.primals), tangents=copy(problem.tangents))
        for _ in range(count - 1)
    ]
    return [problem, *others]


def replay_of(calls: Sequence[Call]) -> Call:
    """CALLS calls, in turn, as a CUDA graph: one launch would take longer than a short kernel."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in itertools.islice(itertools.cycle(calls), CALLS):
            call()
    return graph.replay


def measure(case: cases.Case, name: str, machine: Machine, compiled: bool) -> list[dict[str, Any]]:
    """A figure a form; one that cannot run gives its reason in the place of times."""
    problem = errors.problem(case, DTYPES[name])
    # One draw of the yardsticks is the strictest, and quick.
    for backend in (None, "cuda") if has_cuda(problem) else (None,):
        problem.check(problem.evaluate(backend), draws=1)
    figures: dict[str, dict[str, Any]] = {}
    running, replays = {}, {}
    turns = [calls(copy, False) for copy in copies(problem)[1:]]
    for form, call in calls(problem, compiled).items():
        about = {"operation": case.operation, "case": case.name, "dtype": name, "form": form}
        figures[form] = about | machine.work(case, DTYPES[name], form)
        try:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            figures[form]["peak bytes"] = torch.cuda.max_memory_allocated() - before
            running[form] = call
            replays[form] = replay_of([call, *(others[form] for others in turns if form in others)])
        except Exception as error:
            figures[form]["cannot run" if form not in running else "no graph"] = reason(error)
    for key, functions, share in (("", running, 1), ("device ", replays, CALLS)):
        for form, times in timer.side_by_side(functions, **TURNS).items():
            figures[form][f"{key}seconds"] = times.median / share
            figures[form][f"{key}rounds"] = [seconds / share for seconds in times.rounds]
    return list(figures.values())


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def line(figures: list[dict[str, Any]]) -> str:
    """Ours in microseconds of the GPU, its share of the bound, and the others' times to it."""
    times: dict[str, Any] = {f["form"]: f.get("device seconds", f.get("seconds")) for f in figures}
    ours = times.pop("dual")
    bound = next(f["bound"] for f in figures if f["form"] == "dual")
    ratios = ", ".join(f"{form} {t / ours:.2f}×" for form, t in times.items() if t)
    first = figures[0]
    return (
        f"{first['operation']} {first['case']} {first['dtype']}: {ours * 1e6:.1f} µs, "
        f"{bound / ours:.0%} of its bound; {ratios}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="", help="operations or cases whose name contains this")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument(
        "--compiled", action="store_true", help="torch.compile of torch.func.jvp too: minutes"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_gpu: PyTorch finds no GPU here, so there is nothing to measure", file=sys.stderr)
        return 2
    record: dict[str, Any] = {"figures": [], "failures": []}
    with torch.device("cuda"):
        machine = measure_machine()
        record |= {
            "gpu": torch.cuda.get_device_name(),
            "architecture": triton_launch.architecture(torch.empty(0)),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": getattr(installed("triton"), "__version__", None),
            "copy bandwidth": machine.bandwidth,
            "GEMM rate": {name: machine.flops[dtype] for name, dtype in DTYPES.items()},
        }
        print({key: value for key, value in record.items() if value})
        for case in CASES:
            for name in arguments.dtype or ["bf16"]:
                if arguments.only not in str(case) or DTYPES[name] not in case.dtypes:
                    continue
                try:
                    figures = measure(case, name, machine, arguments.compiled)
                except Exception as error:  # a wrong or broken kernel: said, counted, and on to the next
                    record["failures"].append({"case": str(case), "dtype": name, "reason": reason(error)})
                    print(f"{case} {name}: FAILED: {reason(error)}", flush=True)
                    continue
                record["figures"] += figures
                print(line(figures), flush=True)
                arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    shares = [f["bound"] / f["device seconds"] for f in record["figures"] if "device seconds" in f]
    if shares:
        print(f"{len(record['figures'])} figures; median share of the bound {statistics.median(shares):.0%}")
    return 1 if record["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""The moving average in one launch, against PyTorch's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import imf_kernels as ik
from imf_kernels.backends import triton_launch
from imf_kernels.backends.moving_average import MovingAverage
from tests.helpers.backends import ON_GPU, running_on

BLOCK = 4096
SIZES = [(1,), (0,), (BLOCK,), (3, 5), (BLOCK - 1,), (2 * BLOCK + 3,), (), (0, 4), (7, 1, 640), *[(33,)] * 40]

triton = pytest.mark.parametrize("backend", ["triton"])  # also marks the test as one for GPUs


def drawn(seed, sizes=SIZES, offset=0):
    """Tensors of these sizes, `offset` elements into memory of their own."""
    generator = torch.Generator().manual_seed(seed)
    flat = [torch.randn(offset + torch.Size(size).numel(), generator=generator) for size in sizes]
    device = torch.empty(0).device
    return [x.to(device)[offset:].view(size) for x, size in zip(flat, sizes, strict=True)]


@triton
@pytest.mark.parametrize("share", [0.0, 1e-4, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("offsets", [(0, 0), (1, 0), (0, 2), (3, 3)])
def test_it_is_pytorchs_to_one_ulp(backend, share, offsets):
    with running_on(backend):
        averages, weights = drawn(0, offset=offsets[0]), drawn(1, offset=offsets[1])
        share = torch.tensor(share)
    before, kept, expected = ([x.clone() for x in tensors] for tensors in (averages, weights, averages))
    torch._foreach_lerp_(expected, weights, [share] * len(weights))
    with ik.use_backend(backend):
        MovingAverage(averages, weights)(share)
    for got, wanted, old, weight, same in zip(averages, expected, before, weights, kept, strict=True):
        ulp = torch.finfo(torch.float32).eps * torch.maximum(old.abs(), weight.abs())
        assert torch.all((got - wanted).abs() <= ulp) and torch.equal(weight, same)
        assert share != 1 or torch.equal(got, weight)
        assert share != 0 or torch.equal(got, old)


@triton
def test_nothing_beside_the_tensors_is_written(backend):
    with running_on(backend):
        memory, weight = torch.zeros(3 * BLOCK), torch.ones(BLOCK + 5)
        average = memory[BLOCK - 3 :][: BLOCK + 5]
        with ik.use_backend(backend):
            MovingAverage([average], [weight])(torch.tensor(0.5))
    assert memory.count_nonzero() == BLOCK + 5 and torch.all(average == 0.5)


@triton
def test_tensors_that_moved_are_found(backend):
    with running_on(backend), ik.use_backend(backend):
        average, weight, share = torch.zeros(6), torch.ones(6), torch.tensor(0.25)
        step = MovingAverage([average], [weight])
        step(share)
        average.data, weight.data = torch.zeros(6), torch.full((6,), 4.0)
        step(share)
        assert average.tolist() == [1.0] * 6


@triton
def test_what_it_cannot_take_is_refused(backend):
    with running_on(backend), ik.use_backend(backend):
        share = torch.tensor(0.5)
        for weights, got in (
            ([torch.ones(2, 3).half()], r"contiguous \[2, 3\] of torch.float16"),
            ([torch.ones(3, 2).T], r"strided \[2, 3\] of torch.float32"),
            ([torch.ones(3, 2)], r"contiguous \[3, 2\] of torch.float32"),
        ):
            step = MovingAverage([torch.zeros(2, 3)], weights)
            with pytest.raises(ValueError, match=rf"weights must be contiguous \[2, 3\] .* got {got} on"):
                step(share)
        MovingAverage([], [])(share)


def test_the_interpreter_runs_on_request_only(monkeypatch):
    def launched(*_):
        raise AssertionError("Triton on a CPU")

    monkeypatch.setattr(triton_launch.Launcher, "__call__", launched)
    average = torch.zeros(3)
    MovingAverage([average], [torch.ones(3)])(torch.tensor(0.5))
    assert average.tolist() == [0.5] * 3


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.gpu
def test_a_graph_holds_it_and_it_is_one_launch():
    with torch.device("cuda"):
        averages, weights, share = drawn(0), drawn(1), torch.tensor(0.3)
        step = MovingAverage(averages, weights)
        step(share)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(share)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step(share)
            torch.cuda.synchronize()
    expected = [x.clone() for x in averages]
    torch._foreach_lerp_(expected, weights, [share] * len(weights))
    graph.replay()
    torch.testing.assert_close(averages, expected, rtol=0, atol=1e-6)
    names = [event.name for event in profile.events()]
    assert sum("moving_average" in name for name in names) == 1 and not any("lerp" in name for name in names)


@pytest.mark.skipif(triton_launch.missing() is not None, reason=str(triton_launch.missing()))
def test_compiled_it_accesses_16_bytes_at_once():
    code = """if True:
        import torch
        from tests.helpers.compile_kernels import ahead_of_time
        from imf_kernels.backends.triton_kernels import moving_average
        with torch.device("meta"), ahead_of_time("cuda:90") as compiled:
            moving_average.update(torch.empty(2, 3, dtype=torch.int64), torch.empty(()))
        print(compiled[0].asm["ptx"])"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("ld.global.v4.b32") == 8 and run.stdout.count("st.global.v4.b32") == 4

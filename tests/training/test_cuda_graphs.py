"""Steps as CUDA graphs: on a GPU by graphs, on the CPU by a machine that records and replays operators."""

import contextlib
import dataclasses
import gc
import socket
import weakref
from unittest import mock

import pytest
import torch

from imf import data, train
from imf.distributed import DistributedContext, initialized
from imf.mean_flow.methods import network_of
from imf.objective.draws import Draws, StepDraws, sizes_of_v_u
from imf.program import UserError
from imf.training import graphs, loop
from imf.training import setup as start
from tests.helpers.backends import ON_GPU
from tests.helpers.graph_machine import RecordedGraph
from tests.helpers.tiny_run import ALONE, NETWORK, arguments, config, state_and_data, tensors

BATCH = 16
SIZES = len(sizes_of_v_u(BATCH))


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(graphs, "CudaGraph", RecordedGraph)
    monkeypatch.setattr(RecordedGraph, "made", [])
    return RecordedGraph.made


def steps_of(count, method, **changes):
    changes |= {"method": method, "network": network_of(method, NETWORK), "batch_size": BATCH}
    changes |= {"lr": 1e-2, "eps": 1e-3}  # a small eps makes steps of rounding errors where gradients are 0
    state, batches, c = state_and_data(backend="reference", **changes)
    return torch.stack([loop.training_step(state, batches, c, ALONE) for _ in range(count)]), tensors(state)


@pytest.mark.parametrize("method", ["imf", "imf-vhead", "mf", "tvm"])
def test_replayed_steps_train_alike(recorded, method):
    count = 20  # the learning rate, its decay and that of the average differ in each
    terms, state = steps_of(count, method, steps=count)
    again, other = steps_of(count, method, steps=count, cuda_graphs=True)
    assert sum(graph.replays for graph in recorded) == count - SIZES
    assert len(recorded) <= SIZES and any(graph.replays > 5 for graph in recorded)
    torch.testing.assert_close(terms, again, rtol=1e-4, atol=1e-5)
    for name, x in state.items():  # sums over other numbers of rows round otherwise
        torch.testing.assert_close(other[name], x, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_steps_of_more_rows_than_were_met_first_have_a_size(recorded):
    calls = []

    def update(x, y, step, *rates):
        calls.append(len(step.u_rows))
        return x.sum()

    step_of = graphs.StepGraphs(update, BATCH, ALONE.device)
    x, y = torch.zeros(BATCH, 1, 4, 4), torch.zeros(BATCH, dtype=torch.int64)
    for needed in (13, 16, 13, 1, 0, 2, 15, 16, 11):
        step_of(x, y, prepared(x, needed), 0.1, 0.9)
    # First 16, then those of 14, 12 and 10 that suffice; later the smallest that was met.
    assert calls == [16, 16, 16, 10, 10, 16]
    assert [graph.replays for graph in recorded] == [2, 3]


def test_a_size_is_enough_for_all_processes_and_more_eager_steps_come_first(recorded):
    calls = []
    step_of = graphs.StepGraphs(
        lambda x, y, step, *rates: calls.append(len(step.u_rows)) or x.sum(), BATCH, ALONE.device, warmup=6
    )
    x, y = torch.zeros(BATCH, 1, 4, 4), torch.zeros(BATCH, dtype=torch.int64)
    for needed, elsewhere in ((1, 1), (1, 1), (1, 1), (1, 1), (1, 13), (12, 1), (1, 13), (9, 12), (0, 0)):
        step_of(x, y, prepared(x, needed), 0.1, 0.9, elsewhere)
    assert calls == [16, 14, 12, 10, 14, 12, 14, 12, 10]  # the last three while recording
    assert len(recorded) == 3


@pytest.mark.parametrize("method", ["imf", "mf"])
def test_every_process_computes_the_same_largest_need(method):
    c = config(method=method, network=network_of(method, NETWORK), batch_size=3 * BATCH, drop_probability=0.4)
    c = dataclasses.replace(c, fixed_t_min=0.3)
    state = start.initial_state(c, "fp32", ALONE)
    largest = set()
    for state.step in range(20):
        needs = []
        for process in range(3):
            x = torch.zeros(BATCH, 1, 8, 8)
            draws = Draws.sample(x, seed=c.seed, step=state.step, process=process, **c.draws)
            needs.append(len(StepDraws.of(draws, state.guidance, x.device).u_rows))
        for process in range(3):
            others = loop.rows_of_others(state, c, DistributedContext(rank=process, count=3))
            assert others == max(needs[:process] + needs[process + 1 :])
        largest.add(max(needs))
    assert len(largest) > 2
    assert loop.rows_of_others(state, c, ALONE) == 0


def test_a_run_that_ends_lets_its_graphs_go(recorded, tmp_path):
    """NCCL waits without end for graphs that hold its collectives."""
    run = start.begin(config(runs=str(tmp_path), backend="reference"))
    run.config = dataclasses.replace(run.config, cuda_graphs=True)
    assert loop.fit(run) is None
    assert recorded and run.state.graphs is None


def prepared(x, needed):
    rows, weight = torch.arange(len(x), device=x.device), torch.zeros(len(x), device=x.device)
    return StepDraws(Draws.sample(x, seed=0, step=0), weight, weight, weight, rows, rows[:needed])


def test_graphs_share_memory_with_those_of_their_object_alone(recorded):
    x, y = torch.zeros(BATCH, 1, 4, 4), torch.zeros(BATCH, dtype=torch.int64)
    for _ in range(2):
        step_of = graphs.StepGraphs(lambda x, *_: x.sum(), BATCH, ALONE.device)
        for needed in (16, 1, 1, 1, 16, 1, 16):
            step_of(x, y, prepared(x, needed), 0.1, 0.9)
    assert [graph.beside for graph in recorded] == [None, recorded[0], None, recorded[2]]


def test_a_replay_reads_what_was_copied_and_what_waits_is_refused():
    x = torch.ones(3)
    graph = RecordedGraph(lambda: (x.reshape(3, 1).mul_(2), x * 2 + 1)[1], None)
    assert graph.replay().tolist() == [5, 5, 5]
    x.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert graph.replay().tolist() == [5, 9, 13] and x.tolist() == [2, 4, 6]
    with pytest.raises(RuntimeError, match="_local_scalar_dense makes the host wait"):
        RecordedGraph(lambda: x * float(x.sum()), None)


def of_a_weight():
    """A graph of a call whose weight nobody else holds, and a reference to that weight."""
    weight = torch.full((2**20,), 3.0, device="cuda" if ON_GPU else "cpu")
    return graphs.CudaGraph(lambda: weight * 2, weight.device), weakref.ref(weight)


def test_a_graph_holds_what_its_call_reads(monkeypatch):
    if not ON_GPU:
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
        for name in ("device", "graph"):
            monkeypatch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())
    graph, weight = of_a_weight()
    gc.collect()
    assert weight() is not None and graph.result.shape == weight().shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 2}, "accumulate (--accumulate) must be 1 with cuda_graphs, got 2"),
        ({"checkpointing": True}, "checkpointing (--checkpointing) must be off with cuda_graphs, got True"),
    ],
)
def test_what_graphs_cannot_hold_is_refused(changes, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        config(cuda_graphs=True, **changes)


def test_graphs_are_for_gpus_and_not_for_fsdp2(tmp_path, capsys):
    gpu = DistributedContext(device=torch.device("cuda"), grouped=True)
    with pytest.raises(UserError, match="--cuda-graphs must be with --sharding ddp under torchrun, got fsdp"):
        start._check_processes(config(cuda_graphs=True, sharding="fsdp"), gpu)
    start._check_processes(config(cuda_graphs=True), gpu)
    assert train.main(arguments(runs=tmp_path, cuda_graphs=True)) == 1
    assert "--cuda-graphs must be on a GPU, got cpu" in capsys.readouterr().err


needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


@needs_gpu
@pytest.mark.gpu
def test_a_replay_reads_memory_that_nobody_else_holds():
    graph, _ = of_a_weight()
    gc.collect()
    torch.cuda.empty_cache()
    others = [torch.zeros(2**20, device="cuda") for _ in range(8)]
    assert (graph.replay() == 6).all() and not any(x.any() for x in others)


@needs_gpu
@pytest.mark.gpu
def test_warming_up_takes_the_memory_of_one_step():
    def update(x, y, step, *rates):
        large = [x.new_ones(2**23) for _ in range(8)]  # of 32 MiB
        return sum(part.sum() for part in large)

    device = torch.device("cuda")
    step_of = graphs.StepGraphs(update, BATCH, device)
    x, y = torch.zeros(BATCH, 1, 4, 4, device=device), torch.zeros(BATCH, dtype=torch.int64, device=device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(SIZES + 1):
        step_of(x, y, prepared(x, 16), 0.1, 0.9)
        grown = torch.cuda.memory_reserved() - reserved
        assert grown <= 1.3 * (torch.cuda.max_memory_allocated() - allocated)


@needs_gpu
@pytest.mark.gpu
def test_a_capture_that_failed_does_not_hinder_the_next():
    """Even with its tensors still there."""
    kept = []

    def update(x, y, step, *rates):
        kept.append(x * 2)
        if torch.cuda.is_current_stream_capturing() and len(kept) == SIZES + 1:
            raise ValueError("a step that fails")
        return kept[-1].sum()

    device = torch.device("cuda")
    inputs = torch.ones(BATCH, 1, 4, 4, device=device), torch.zeros(BATCH, dtype=torch.int64, device=device)
    inputs = *inputs, prepared(inputs[0], 16), 0.1, 0.9
    first = graphs.StepGraphs(update, BATCH, device)
    for _ in range(SIZES):
        first(*inputs)
    with pytest.raises(ValueError, match="a step that fails"):
        first(*inputs)
    second = graphs.StepGraphs(update, BATCH, device)
    for _ in range(SIZES + 2):
        result = second(*inputs)
    torch.testing.assert_close(result.cpu(), torch.tensor(BATCH * 16 * 2.0))
    torch.testing.assert_close(first(*inputs).cpu(), result.cpu())  # nor itself


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graphs_train_alike_on_a_gpu(precision):
    compare_on_a_gpu(DistributedContext(device=torch.device("cuda")), precision, steps=12)


@needs_gpu
@pytest.mark.gpu
def test_graphs_under_ddp_train_alike_on_a_gpu(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    # The last is changed on the way.
    for name, value in (environment | {"MASTER_PORT": port, "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}).items():
        monkeypatch.setenv(name, value)
    with initialized("cuda", cuda_graphs=True) as who:
        replays = compare_on_a_gpu(who, "fp32", steps=graphs.WARMUP_OF_DDP + 3)
    assert replays == 3


def compare_on_a_gpu(who, precision, steps):
    """Trains eagerly and by graphs; returns the number of replays."""
    results, replays = [], []
    real = graphs.CudaGraph.replay
    for cuda_graphs in (False, True):
        c = config(batch_size=BATCH, eps=1e-3, cuda_graphs=cuda_graphs, precision=precision, device="cuda")
        state = start.initial_state(c, precision, who)
        batches = data.Batches(data.load("digits"), batch_size=BATCH, seed=0, first=0, device=who.device)
        counted = mock.patch.object(graphs.CudaGraph, "replay", lambda g: replays.append(1) or real(g))
        with batches as each, counted:
            terms = [loop.training_step(state, each, c, who) for _ in range(steps)]
        results.append((torch.stack(terms), tensors(state)))
        state.graphs = None
    (terms, state), (again, other) = results
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    torch.testing.assert_close(terms, again, rtol=tolerance, atol=tolerance)
    for name, x in state.items():
        if name.startswith("model"):
            torch.testing.assert_close(other[name], x, rtol=tolerance, atol=tolerance)
    return len(replays)

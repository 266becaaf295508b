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
from imf.objective import draws
from imf.objective.draws import Draws, StepDraws, sizes_of_v_u
from imf.program import UserError
from imf.training import graphs, loop
from imf.training import setup as start
from imf.training.state import initial_state
from tests.helpers.backends import ON_GPU
from tests.helpers.graph_machine import RecordedGraph
from tests.helpers.tiny_run import (
    ALONE,
    NETWORK,
    arguments,
    config,
    cut_short,
    differing,
    one_step,
    resumed,
    state_and_data,
    tensors,
)

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
    return torch.stack([one_step(state, batches, c, ALONE) for _ in range(count)]), tensors(state)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("imf", {}),
        ("imf-vhead", {}),
        ("mf", {}),
        ("tvm", {}),
        ("imf", {"accumulate": 2, "checkpointing": True}),
    ],
)
def test_replayed_steps_train_alike(recorded, method, changes):
    count = 20  # the learning rate, its decay and that of the average differ in each
    accumulate = changes.get("accumulate", 1)
    terms, state = steps_of(count, method, steps=count, **changes)
    again, other = steps_of(count, method, steps=count, cuda_graphs=True, **changes)
    assert sum(graph.replays for graph in recorded) == accumulate * count - SIZES
    assert len(recorded) <= accumulate * SIZES and any(graph.replays > 5 for graph in recorded)
    torch.testing.assert_close(terms, again, rtol=1e-4, atol=1e-5)
    for name, x in state.items():  # sums over other numbers of rows round otherwise
        torch.testing.assert_close(other[name], x, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def one_size(monkeypatch):
    """v_u on all rows, in eager steps too: then only the replaying could change a bit."""
    monkeypatch.setattr(draws, "_rounded_up", lambda rows, batch: batch)
    monkeypatch.setattr(graphs, "sizes_of_v_u", lambda batch: [batch])


# In fp32 as in the host's doubles: graphs read both from tensors.
EXACT = {"lr": 2**-7, "warmup_steps": 0, "decay": "constant", "ema_decay": 0.75, "ema_warmup": 1.0}
FORMS = {
    "plain": {},
    "accumulation 2": {"accumulate": 2},
    "accumulation 4": {"accumulate": 4},
    "checkpointing": {"checkpointing": True},
    "both": {"accumulate": 4, "checkpointing": True},
    "both, mf": {"accumulate": 2, "checkpointing": True, "method": "mf"},
}


@pytest.mark.parametrize("form", FORMS)
def test_replayed_steps_are_eager_ones_bit_for_bit(recorded, one_size, form):
    changes = {"method": "imf"} | FORMS[form]
    changes |= EXACT | {"batch_size": BATCH, "backend": "reference", "norm_p": 0.5}
    changes["network"] = network_of(changes["method"], NETWORK)
    found = []
    for cuda_graphs in (False, True):
        state, batches, c = state_and_data(cuda_graphs=cuda_graphs, **changes)
        terms = [one_step(state, batches, c, ALONE) for _ in range(5)]
        found.append(tensors(state) | {"terms": torch.stack(terms)})
    assert differing(*found) == [] and len(found[0]) > 10
    accumulate = changes.get("accumulate", 1)
    assert len(recorded) == min(accumulate, 2) and sum(g.replays for g in recorded) == 4 * accumulate


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"accumulate": 2, "checkpointing": True}])
def test_a_run_that_is_resumed_is_one_that_was_not_stopped(
    recorded, one_size, tmp_path, monkeypatch, changes
):
    monkeypatch.setattr(start, "_check_processes", lambda *_: None)  # which asks for a GPU
    changes |= EXACT | {"runs": str(tmp_path), "backend": "reference", "cuda_graphs": True}
    whole = start.begin(config(**changes))
    assert loop.fit(whole) is None
    run = resumed(cut_short(whole.folder, tmp_path / "cut", lines=6))
    assert run.state.step == 4
    made = len(recorded)
    assert loop.fit(run) is None and len(recorded) > made
    assert differing(tensors(whole.state), tensors(run.state)) == []


def test_eager_calls_are_of_full_steps_and_each_place_in_a_step_has_graphs(recorded):
    calls = []

    def micro_step(x, y, step, rate, share, last):
        calls.append((len(step.u_rows), last))
        return x.sum()

    step_of = graphs.StepGraphs(micro_step, BATCH, ALONE.device, accumulate=3)
    x, y = torch.zeros(BATCH, 1, 4, 4), torch.zeros(BATCH, dtype=torch.int64)
    for _ in range(4):
        for last in (False, False, True):
            step_of(x, y, prepared(x, 1), 0.1, 0.9, last)
    eager = [(16, False), (14, False), (12, True), (10, False), (10, False), (10, True)]
    assert calls == [*eager, (10, False), (10, True)]  # the last two while recording
    assert {at: graph.replays for at, graph in step_of.recorded.items()} == {(10, False): 4, (10, True): 2}
    assert [graph.beside for graph in recorded] == [None, recorded[0]]


def test_steps_of_more_rows_than_were_met_first_have_a_size(recorded):
    calls = []

    def micro_step(x, y, step, *rates):
        calls.append(len(step.u_rows))
        return x.sum()

    step_of = graphs.StepGraphs(micro_step, BATCH, ALONE.device)
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
        step_of(x, y, prepared(x, needed), 0.1, 0.9, at_least=elsewhere)
    assert calls == [16, 14, 12, 10, 14, 12, 14, 12, 10]  # the last three while recording
    assert len(recorded) == 3


@pytest.mark.parametrize("method", ["imf", "mf"])
def test_every_process_computes_the_same_largest_need(method):
    c = config(method=method, network=network_of(method, NETWORK), batch_size=3 * BATCH, drop_probability=0.4)
    c = dataclasses.replace(c, fixed_t_min=0.3)
    state = initial_state(c, "fp32", ALONE)
    largest = set()
    for step in range(20):
        needs = []
        for process in range(3):
            x = torch.zeros(BATCH, 1, 8, 8)
            drawn = Draws.sample(x, seed=c.seed, step=step, process=process, **c.draws)
            needs.append(len(StepDraws.of(drawn, state.guidance, x.device).u_rows))
        for process in range(3):
            others = graphs.rows_of_others(c, DistributedContext(rank=process, count=3), state.guidance, step)
            assert others == max(needs[:process] + needs[process + 1 :])
        largest.add(max(needs))
    assert len(largest) > 2
    assert graphs.rows_of_others(c, ALONE, state.guidance, 0) == 0


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
    def micro_step(x, y, step, *rates):
        large = [x.new_ones(2**23) for _ in range(8)]  # of 32 MiB
        return sum(part.sum() for part in large)

    device = torch.device("cuda")
    step_of = graphs.StepGraphs(micro_step, BATCH, device)
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

    def micro_step(x, y, step, *rates):
        kept.append(x * 2)
        if torch.cuda.is_current_stream_capturing() and len(kept) == SIZES + 1:
            raise ValueError("a step that fails")
        return kept[-1].sum()

    device = torch.device("cuda")
    inputs = torch.ones(BATCH, 1, 4, 4, device=device), torch.zeros(BATCH, dtype=torch.int64, device=device)
    inputs = *inputs, prepared(inputs[0], 16), 0.1, 0.9
    first = graphs.StepGraphs(micro_step, BATCH, device)
    for _ in range(SIZES):
        first(*inputs)
    with pytest.raises(ValueError, match="a step that fails"):
        first(*inputs)
    second = graphs.StepGraphs(micro_step, BATCH, device)
    for _ in range(SIZES + 2):
        result = second(*inputs)
    torch.testing.assert_close(result.cpu(), torch.tensor(BATCH * 16 * 2.0))
    torch.testing.assert_close(first(*inputs).cpu(), result.cpu())  # nor itself


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "form"),
    [("fp32", "plain"), ("bf16", "plain"), ("fp32", "accumulation 2"), ("fp32", "both")],
)
def test_graphs_train_alike_on_a_gpu(precision, form):
    compare_on_a_gpu(DistributedContext(device=torch.device("cuda")), precision, steps=12, **FORMS[form])


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("form", ["plain", "both"])
def test_graphs_under_ddp_train_alike_on_a_gpu(form, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    # The last is changed on the way.
    for name, value in (environment | {"MASTER_PORT": port, "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}).items():
        monkeypatch.setenv(name, value)
    with initialized("cuda", cuda_graphs=True) as who:
        replays = compare_on_a_gpu(who, "fp32", steps=graphs.WARMUP_OF_DDP + 3, **FORMS[form])
    assert replays == 3 * FORMS[form].get("accumulate", 1)


def compare_on_a_gpu(who, precision, steps, **changes):
    """Trains eagerly and by graphs; returns the number of replays."""
    results, replays = [], []
    real = graphs.CudaGraph.replay
    for cuda_graphs in (False, True):
        changes |= {"batch_size": BATCH, "eps": 1e-3, "precision": precision, "device": "cuda"}
        c = config(cuda_graphs=cuda_graphs, **changes)
        state = initial_state(c, precision, who)
        settings = {"batch_size": c.micro_batch_size, "seed": 0, "first": 0, "device": who.device}
        batches = data.Batches(data.load("digits"), **settings)
        counted = mock.patch.object(graphs.CudaGraph, "replay", lambda g: replays.append(1) or real(g))
        with batches as each, counted:
            terms = [one_step(state, each, c, who) for _ in range(steps)]
        results.append((torch.stack(terms), tensors(state)))
        state.graphs = None
    (terms, state), (again, other) = results
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    torch.testing.assert_close(terms, again, rtol=tolerance, atol=tolerance)
    for name, x in state.items():
        if name.startswith("model"):
            torch.testing.assert_close(other[name], x, rtol=tolerance, atol=tolerance)
    return len(replays)

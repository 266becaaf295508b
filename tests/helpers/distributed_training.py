"""A process of test_distributed_training.py: checks that need two; prints results as JSON.

RANK=… WORLD_SIZE=… LOCAL_RANK=… MASTER_ADDR=… MASTER_PORT=… \
    python -m tests.helpers.distributed_training FOLDER
"""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import torch

from imf import data
from imf.distributed import agreed, initialized
from imf.mean_flow.methods import network_of
from imf.objective.draws import Draws
from imf.program import UserError
from imf.training import checkpoint, graphs, loop, session
from imf.training import setup as start
from imf.training import state as training_state
from imf.training.parallel import synchronising, whole
from imf.training.state import Run, initial_state
from tests.helpers import own_network
from tests.helpers.graph_machine import RecordedGraph
from tests.helpers.tiny_run import ALONE, NETWORK, config, one_step, resumed, tensors

FORMS = {
    "ddp": {},
    "fsdp": {"sharding": "fsdp"},
    "ddp checkpointing": {"checkpointing": True},
    "fsdp checkpointing": {"sharding": "fsdp", "checkpointing": True},
    "fsdp mf": {"sharding": "fsdp", "method": "mf"},
    "ddp mf": {"method": "mf"},
    "ddp lsd": {"method": "lsd"},
    "fsdp lsd": {"sharding": "fsdp", "method": "lsd"},
    "fsdp tvm checkpointing": {"sharding": "fsdp", "method": "tvm", "checkpointing": True},
    "ddp tvm": {"method": "tvm"},
    "ddp own": {"own": True},
    "fsdp own": {"own": True, "sharding": "fsdp"},
    "fsdp own checkpointing": {"own": True, "sharding": "fsdp", "checkpointing": True},
}


def part(draws, rows):
    """Rows of a global draw, ascending: FM rows are the first ones, so all of one process's may be."""
    tensors = {f.name: getattr(draws, f.name)[rows] for f in dataclasses.fields(draws) if f.name != "n_fm"}
    return Draws(**tensors, n_fm=int((rows < draws.n_fm).sum()))


def gradients(who, *, same_draws=True, own=False, **changes):
    """Largest relative error over weights of the gradient over two micro steps, against one process's.

    The second process has no FM rows; the first has nothing else, and in the second micro step no row whose
    velocity is asked for: omega is 1. Of "tvm", which asks for both, each process has every other row.
    """
    sizes = dataclasses.replace(NETWORK, hidden_size=36, depth=3)
    network = network_of(changes.get("method", "imf"), sizes)
    given = [own_network.adapted(seed) if own else None for seed in (0, 0 if who.first else 1)]
    if own:
        network = given[0].config
    changes = {"norm_p": 0.0 if changes.get("method") in ("tvm", "lsd") else 1.0} | changes
    c = config(network=network, batch_size=16, accumulate=2, **changes)
    alone, state = (initial_state(c, "fp32", x, y) for x, y in zip((ALONE, who), given, strict=True))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in (*alone.model.parameters(), *alone.ema.parameters()):
            p.add_(torch.randn_like(p) * 0.05)  # none at zero, as some are in the beginning
    for of in ("model", "ema"):
        checkpoint._copy(Path("none"), getattr(alone, of).state_dict(), getattr(state, of).state_dict())
    mine = torch.arange(who.rank, 8, who.count) if c.method == "tvm" else torch.tensor(who.slice(8))
    for step in range(2):
        x, y = torch.randn(8, 1, 8, 8), torch.arange(8)
        draws = Draws.sample(x, seed=0, step=step, **c.draws)
        if step:
            draws = dataclasses.replace(draws, omega=torch.where(torch.arange(8) < 4, 1.0, draws.omega))
        own = part(draws, mine)
        if not same_draws:
            own = Draws.sample(x[mine], seed=0, step=step, process=who.rank, **c.draws)
        (alone.objective(alone.wrapped, x, y, draws).loss / 2).backward()
        with synchronising(state.wrapped, last=step == 1):
            (state.objective(state.wrapped, x[mine], y[mine], own).loss / 2).backward()
    worst = 0.0
    for p, q in zip(state.model.parameters(), alone.model.parameters(), strict=True):
        worst = max(worst, float((whole(p.grad) - q.grad).norm() / q.grad.norm()))
    return worst


def whole_run(who, folder, **changes):
    """A run to its end, and what it wrote."""
    run = start.begin(config(runs=str(folder), **changes), who)
    assert loop.fit(run) is None
    return run


def differences(a, b):
    """The number of tensors of two states that are not bit for bit the same."""
    pairs = [*zip(a.model.parameters(), b.model.parameters(), strict=True)]
    pairs += zip(a.ema.parameters(), b.ema.parameters(), strict=True)
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        pairs += [(a.optimizer.state[p][key], b.optimizer.state[q][key]) for key in b.optimizer.state[q]]
    return sum(not torch.equal(whole(p), whole(q)) for p, q in pairs)


def changing(call, change):
    """`state.objective` whose result number `call` in this process is changed; (undo, list of calls)."""
    real, calls = training_state.objective, []

    def objective_of(*settings, **norm):
        def loss_of(*batch):
            calls.append(None)
            out = real(*settings, **norm)(*batch)
            return change(out) if len(calls) == call else out

        return loss_of

    training_state.objective = objective_of
    return lambda: setattr(training_state, "objective", real)


def replayed(who, **changes):
    """How steps under DDP replayed from recordings differ from eager ones; the replays of each graph."""
    graphs.CudaGraph, terms, states = RecordedGraph, [], []
    # So many dropped labels that the processes would choose sizes of their own.
    changes |= {"batch_size": 32, "steps": 24, "lr": 1e-2, "eps": 1e-3, "drop_probability": 0.3}
    c = config(backend="reference", **changes)
    for cuda_graphs in (False, True):
        c = dataclasses.replace(c, cuda_graphs=cuda_graphs)
        state = initial_state(c, "fp32", who)
        with Run(None, c, "fp32", data.load("digits"), state, who).batches() as batches:
            terms.append(torch.stack([one_step(state, batches, c, who) for _ in range(c.steps)]))
        states.append(tensors(state))
    worst = max(float((x - states[1][name]).abs().max()) for name, x in states[0].items())
    replays = {str(at): graph.replays for at, graph in state.graphs.recorded.items()}
    difference = float(((terms[0] - terms[1]) / (1 + terms[0])).abs().max())
    return {"terms": difference, "state": worst, "replays": replays}


def not_finite(who, folder, **changes):
    """One term of one process is not finite in step 3; what each says, and whether step 2 stayed."""

    def spoil(out):
        return dataclasses.replace(out, loss_u=out.loss_u * float("nan")) if who.rank == 1 else out

    undo = changing(3, spoil)
    run = start.begin(config(runs=str(folder), name="nan", **changes), who)
    try:
        loop.fit(run)
    except UserError as error:
        return [str(error), bool(run.state.found_inf), agreed(error), len(checkpoint.list_all(run.folder))]
    finally:
        undo()


def stopped(who, folder, **changes):
    """A signal to one process in step 3."""

    def stop(out):
        if who.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return out

    undo = changing(3, stop)
    run = start.begin(config(runs=str(folder), name="stopped", checkpoint_every=0, **changes), who)
    received = loop.fit(run)
    undo()
    return [received, run.state.step, [path.name for path in checkpoint.list_all(run.folder)]]


def full_disk(who, folder):
    """What each process says when the first process cannot write the checkpoint of step 4."""
    real = checkpoint.save_file

    def full(tensors, path, metadata):
        if "step-00000004" in str(path):
            raise OSError(28, "No space left on device")
        real(tensors, path, metadata)

    checkpoint.save_file = full
    try:
        session.fit_in(who, config(runs=str(folder), name="full"))
    except UserError as error:
        return [str(error), agreed(error)]
    finally:
        checkpoint.save_file = real


def main():
    folder, results = Path(sys.argv[1]), {}
    with initialized("cpu") as who:
        results["place"] = [who.rank, who.count]
        for name, changes in FORMS.items():
            results[name] = gradients(who, **changes)
        results["other draws"] = gradients(who, same_draws=False)
        ddp = whole_run(who, folder, name="ddp", accumulate=2, sample_every=4)
        fsdp = whole_run(who, folder, name="fsdp", accumulate=2, sample_every=4, sharding="fsdp")
        again = resumed(fsdp.folder, context=who)
        results["fsdp resumed as it was"] = differences(fsdp.state, again.state)
        other = resumed(ddp.folder, "--sharding", "fsdp", context=who)
        results["ddp resumed as fsdp"] = differences(other.state, ddp.state)
        results["different runs"] = differences(ddp.state, initial_state(config(seed=1), "fp32", who))
        for sharding in ("ddp", "fsdp"):
            results[f"not finite {sharding}"] = not_finite(who, folder / sharding, sharding=sharding)
            results[f"stopped {sharding}"] = stopped(who, folder / sharding, sharding=sharding)
        results["full disk"] = full_disk(who, folder)
        results["replayed"] = replayed(who)
        results["replayed, accumulated"] = replayed(who, accumulate=2, checkpointing=True)
        try:
            start.begin(config(runs=str(folder), batch_size=9), who)
        except UserError as error:
            results["batch"] = str(error)
    print(json.dumps(results))


if __name__ == "__main__":
    main()

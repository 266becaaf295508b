"""One training step and the loop around it: schedule, accumulation, moving average, the gate, outputs."""

import dataclasses
import itertools
import json

import pytest
import torch

from imf import sample, train
from imf.mean_flow.methods import network_of
from imf.objective.draws import Draws
from imf.objective.imf_loss import improved_mean_flow
from imf.program import UserError
from imf.training import artifacts, checkpoint, loop
from imf.training import setup as start
from imf.training import state as training_state
from imf.training.config import ema_decay, learning_rate
from imf.training.log import Readback
from tests.helpers import tiny_run
from tests.helpers.tiny_run import (
    ALONE,
    arguments,
    config,
    differing,
    objective_that,
    one_step,
    state_and_data,
    tensors,
)


def test_the_schedule():
    c = config(steps=100, lr=2.0, warmup_steps=10, decay="linear", decay_fraction=0.5)
    rates = [learning_rate(c, step) for step in range(100)]
    assert rates[:3] == pytest.approx([0, 0.2, 0.4]) and rates[0] == 0
    assert rates[10:51] == [2.0] * 41
    assert rates[51:] == pytest.approx([2.0 * (100 - step) / 50 for step in range(51, 100)])
    constant = dataclasses.replace(c, decay="constant")
    assert [learning_rate(constant, step) for step in (10, 60, 99)] == [2.0] * 3
    cosine = dataclasses.replace(c, decay="cosine")
    assert [learning_rate(cosine, step) for step in (50, 75, 100)] == pytest.approx([2.0, 1.0, 0.0])
    assert learning_rate(dataclasses.replace(c, warmup_steps=0), 0) == 2.0


def test_the_first_step_has_learning_rate_zero():
    state, batches, c = state_and_data()
    before = tensors(state)
    one_step(state, batches, c, ALONE)
    after = tensors(state)
    assert all(torch.equal(after[name], before[name]) for name in before)  # weights and average
    assert any(value.any() for name, value in after.items() if name.endswith("exp_avg"))
    one_step(state, batches, c, ALONE)
    assert any(not torch.equal(tensors(state)[name], before[name]) for name in before)


def test_two_micro_batches_give_the_average_of_their_gradients():
    state, batches, c = state_and_data(accumulate=2)
    parameters = list(state.model.parameters())
    gradients, losses = [], []
    for i, (x, y) in enumerate(itertools.islice(batches, 2)):
        draws = Draws.sample(x, seed=0, step=i, **c.draws)
        out = improved_mean_flow(state.model, x, y, draws, norm_p=c.norm_p)
        gradients.append(torch.autograd.grad(out.loss, parameters, allow_unused=True))
        losses.append([out.loss.item(), out.loss_u.item(), out.loss_v.item()])
    terms = one_step(state, tiny_run.batches(c), c, ALONE)
    assert terms[:3].tolist() == pytest.approx(torch.tensor(losses).mean(0).tolist(), rel=1e-5)
    means = [(a + b) / 2 for a, b in zip(*gradients, strict=True) if a is not None]
    assert terms[3].item() == pytest.approx(torch.cat([g.flatten() for g in means]).norm().item(), rel=1e-4)
    moments = [state.optimizer.state[p]["exp_avg"] for p in parameters if p in state.optimizer.state]
    for mean, moment in zip(means, moments, strict=True):
        torch.testing.assert_close(moment, 0.1 * mean, rtol=1e-4, atol=1e-7)  # 1 - beta1 = 0.1


@pytest.mark.parametrize("method", ["imf", "mf"])
def test_a_recipe_reaches_the_network_and_the_objective(method):
    network = dataclasses.replace(network_of(method, tiny_run.NETWORK), residual_scale=0.5)
    changes = {"method": method, "network": network, "norm_p": 0.25, "norm_eps": 2.0, "r0_fraction": 0.5}
    state, batches, c = state_and_data(**changes)
    scales = [p for name, p in state.model.named_parameters() if name.endswith(("attn_scale", "mlp_scale"))]
    assert all(bool((p == 0.5).all()) for p in scales) and bool(scales) == (method == "imf")
    seen = []
    state.objective = lambda *batch, of=state.objective: seen.append((batch, of(*batch))) or seen[-1][1]
    one_step(state, batches, c, ALONE)
    (_, _, _, draws), out = seen[0]
    assert draws.r[4:].tolist() == [0.0] * 4
    errors = [out.u + (draws.t - draws.r)[:, None, None, None] * out.du_dt - out.v_g]
    errors += [] if out.v is None else [out.v - out.v_g]
    terms = [e.square().flatten(1).sum(1) for e in errors]
    assert out.loss.item() == pytest.approx(sum((e / (e + 2) ** 0.25).mean().item() for e in terms), rel=1e-5)


def test_each_micro_batch_has_its_own_draws(monkeypatch):
    seen = []

    def loss_of(model, x, y, draws):
        seen.append(draws.t)
        return improved_mean_flow(model, x, y, draws)

    monkeypatch.setattr(training_state, "objective", lambda *settings, **norm: loss_of)
    state, batches, c = state_and_data(accumulate=2)
    for _ in range(2):
        one_step(state, batches, c, ALONE)
    assert len({tuple(t.tolist()) for t in seen}) == 4


def test_moving_average():
    c = config(ema_decay=0.5, ema_warmup=10.0)
    assert [ema_decay(c, step) for step in (0, 1, 100)] == pytest.approx([1 / 10, 2 / 11, 0.5])
    state, batches, c = state_and_data(ema_decay=0.9, steps=20)
    average = {name: p.detach().double() for name, p in state.ema.named_parameters()}
    for step in range(5):
        one_step(state, batches, c, ALONE)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, p in state.model.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * p.detach().double()
    for name, p in state.ema.named_parameters():
        torch.testing.assert_close(p.double(), average[name], rtol=1e-5, atol=1e-7)
        assert not p.requires_grad


def infinite_gradient(out):
    """A finite loss whose gradient is not: sqrt at 0."""
    return dataclasses.replace(out, loss=out.loss + (out.loss - out.loss).sqrt())


BAD = {
    "loss": lambda out: dataclasses.replace(out, loss=out.loss * float("nan")),
    "loss_u": lambda out: dataclasses.replace(out, loss_u=out.loss_u * float("inf")),
    "gradient norm": infinite_gradient,
}


@pytest.mark.parametrize("term", BAD)
def test_the_gate_keeps_everything_from_a_step_that_is_not_finite(term, monkeypatch):
    with objective_that(monkeypatch, lambda call, out: BAD[term](out) if call == 3 else out):
        state, batches, c = state_and_data()
        for _ in range(2):
            one_step(state, batches, c, ALONE)
        before = tensors(state)
        assert not one_step(state, batches, c, ALONE).isfinite().all()
        assert differing(before, tensors(state)) == []
        # The host may learn of it later only: the next steps, though finite, must change nothing either.
        assert one_step(state, batches, c, ALONE).isfinite().all()
    assert differing(before, tensors(state)) == []


@pytest.mark.parametrize("term", BAD)
def test_training_stops_there_and_keeps_the_last_good_checkpoint(term, tmp_path, monkeypatch, capsys):
    with objective_that(monkeypatch, lambda call, out: BAD[term](out) if call == 5 else out):
        assert train.main(arguments(runs=tmp_path)) == 1
    error = capsys.readouterr().err
    last = checkpoint.path_of(tmp_path / "digits", 4)
    assert f"stopped at step 5: {term} is" in error and f"Last good checkpoint: {last}" in error
    assert checkpoint.list_all(tmp_path / "digits")[-1] == last
    network = checkpoint.load(last)
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    lines = (tmp_path / "digits" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


class LateEvent:
    """Stands in for a GPU's event that is not reached until somebody waits for it."""

    reached = False

    def query(self):
        return self.reached

    def synchronize(self):
        self.reached = True


def test_a_checkpoint_waits_for_steps_that_were_not_checked(tmp_path, monkeypatch):
    def push_late(self, step, terms):
        self._pending.append((step, terms, LateEvent()))

    monkeypatch.setattr(Readback, "push", push_late)
    nan = BAD["loss"]
    with objective_that(monkeypatch, lambda call, out: nan(out) if call == 3 else out):
        run = start.begin(config(runs=str(tmp_path), checkpoint_every=6))
        with pytest.raises(UserError, match="stopped at step 3: loss is nan"):
            loop.fit(run)
    assert run.state.step == 6  # the loop went on without waiting; the gate had closed
    assert checkpoint.list_all(run.folder) == []


def test_readback_keeps_the_order_and_does_not_wait():
    arriving, event = Readback(), LateEvent()
    arriving._pending.append((1, torch.tensor([1.0]), event))
    arriving.push(2, torch.tensor([2.0]))
    assert list(arriving.pop()) == [] and not event.reached
    assert list(arriving.pop(wait=True)) == [(1, [1.0]), (2, [2.0])]


def test_a_full_disk_while_training(tmp_path, monkeypatch, capsys):
    real = checkpoint.save_file

    def full(tensors, path, metadata):
        if "step-00000004" in str(path):
            raise OSError(28, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert train.main(arguments(runs=tmp_path)) == 1
    error = capsys.readouterr().err
    last = checkpoint.path_of(tmp_path / "digits", 2)
    assert "No space left on device" in error and f"Last good checkpoint: {last}" in error
    assert checkpoint.read_metadata(last).step == 2


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard", "step-00000003.png"])
def test_a_disk_that_fills_up_loses_no_step(name, tmp_path, monkeypatch, capsys):
    """/dev/full takes nothing: whatever could not be written, the steps done are saved and it is named."""
    real = start._write_configuration

    def full(run):
        real(run)
        picture = name.endswith("png")  # which is written under a temporary name
        place = run.folder / (f"samples/.{name}.tmp" if picture else name)
        place.symlink_to("/dev/full")

    monkeypatch.setattr(start, "_write_configuration", full)
    options = {"checkpoint_every": 0, "sample_every": 3, "log_every": 4, "tensorboard": name == "tensorboard"}
    assert train.main(arguments(runs=tmp_path, **options)) == 1
    folder, error = tmp_path / "digits", capsys.readouterr().err
    (last,) = checkpoint.list_all(folder) or [None]
    done = {"metrics.jsonl": 4, "tensorboard": 0, "step-00000003.png": 3}[name]
    assert last == (checkpoint.path_of(folder, done) if done else None)
    assert f"{name}: could not be written: " in error
    assert (f"--resume {folder}" in error) == bool(done)


def test_a_disk_too_full_for_the_checkpoint_too(tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def full_from_now_on(run, path, steps=1):
        monkeypatch.setattr(checkpoint, "save_file", full)
        full()

    monkeypatch.setattr(artifacts, "draw", full_from_now_on)
    assert train.main(arguments(runs=tmp_path, sample_every=3)) == 1
    error, folder = capsys.readouterr().err, tmp_path / "digits"
    assert "could not write the checkpoint of step 3: " in error
    assert f"Last good checkpoint: {checkpoint.path_of(folder, 2)}" in error


def test_a_whole_run_and_a_grid_from_its_checkpoint(tmp_path, capsys):
    options = arguments(runs=tmp_path, tensorboard=True, sample_every=2, log_every=4, keep_checkpoints=1)
    assert train.main(options) == 0
    folder, printed = tmp_path / "digits", capsys.readouterr().out
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 6]
    for line in lines:
        assert line.keys() == {
            *("step", "loss", "loss_u", "loss_v", "gradient_norm"),
            *("lr", "ema_decay", "images_per_second", "elapsed"),
        }
        assert line["images_per_second"] > 0 and line["loss_u"] > 0
    assert [path.name for path in checkpoint.list_all(folder)] == ["step-00000006.safetensors"]
    assert json.loads((folder / "config.json").read_text())["config"]["network"]["hidden_size"] == 16
    assert list((folder / "tensorboard").iterdir())
    names = {f"step-{step:08d}.png" for step in (2, 4)} | {f"final-{n}-step.png" for n in (1, 2, 4)}
    assert {path.name for path in (folder / "samples").iterdir()} == names
    results = json.loads((folder / "results.json").read_text())
    assert [score["steps"] for score in results["scores"]] == [1, 2, 4] and results["samples"] == 1800
    for score in results["scores"]:
        assert f"{score['frechet_distance']:.3f}" in printed
    assert str(folder / "samples" / "final-1-step.png") in printed and "omega" in printed

    grid = tmp_path / "grid.png"
    omega, *interval = (str(results[name]) for name in ("omega", "t_min", "t_max"))
    seed_and_guidance = ["--seed", "0", "--omega", omega, "--interval", *interval]
    command = ["--checkpoint", str(folder), "--out", str(grid), *seed_and_guidance]
    assert sample.main(command) == 0
    assert grid.read_bytes() == (folder / "samples" / "final-1-step.png").read_bytes()
    assert sample.main([*command, "--steps", "0"]) == 1 and "steps must be" in capsys.readouterr().err

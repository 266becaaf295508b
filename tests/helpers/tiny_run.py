"""Runs small enough to train in a test, shared by the tests of training, resuming and checkpoints."""

import argparse
import contextlib
import itertools
import shutil
from pathlib import Path

import torch

from imf import data
from imf.distributed import DistributedContext
from imf.mean_flow.methods import network_of
from imf.model.config import IMFConfig
from imf.networks import build
from imf.training import checkpoint, loop
from imf.training import setup as start
from imf.training import state as training_state
from imf.training.config import TrainConfig, add_arguments
from imf.training.state import Run, initial_state

NETWORK = IMFConfig(
    input_size=8,
    patch_size=4,
    in_channels=1,
    hidden_size=16,
    depth=2,
    num_heads=1,
    aux_head_depth=1,
    mlp_ratio=2.0,
    num_classes=10,
    class_tokens=1,
    omega_tokens=1,
    interval_tokens=1,
    time_tokens=1,
    residual_scale=1.0,
)
FAST = {
    "steps": 6,
    "batch_size": 8,
    "warmup_steps": 2,
    "log_every": 1,
    "sample_every": 0,
    "checkpoint_every": 2,
    "keep_checkpoints": 10,
    "figures": 0,
    "tensorboard": False,
    "precision": "fp32",
    "device": "cpu",
}


def config(**changes):
    return TrainConfig(**{"network": NETWORK, **FAST, **changes})


def arguments(**changes):
    """The same as command-line arguments."""
    network = {name: getattr(NETWORK, name) for name in ("patch_size", "hidden_size", "depth", "num_heads")}
    network |= {"aux_head_depth": NETWORK.aux_head_depth, "mlp_ratio": NETWORK.mlp_ratio}
    result = []
    for name, value in {**FAST, **network, **changes}.items():
        flag = name.replace("_", "-")
        result += (
            [f"--{flag}" if value else f"--no-{flag}"]
            if isinstance(value, bool)
            else [f"--{flag}", str(value)]
        )
    return result


def perturbed(method, network=NETWORK):
    """The method's network of these sizes, its weights always the same and none of them zero."""
    torch.manual_seed(0)
    model = build(network_of(method, network))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def cut_short(whole, folder, *, lines):
    """A copy of a run of 6 steps without its last checkpoint and with so many lines of metrics."""
    shutil.copytree(whole, folder)
    checkpoint.path_of(folder, 6).unlink()
    kept = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)[:lines]
    (folder / "metrics.jsonl").write_text("".join(kept))
    return folder


ALONE = DistributedContext()


def resumed(path, *options, context=ALONE):
    """The run of `path` with command-line options."""
    parser = argparse.ArgumentParser()
    add_arguments(parser, config())
    found = parser.parse_args(options)
    path, metadata = start.find_resumed(path)
    return start.resume(path, metadata, start.resumed_config(metadata, found), context)


def state_and_data(**changes):
    """A state before its first step, the batches of one process alone, the configuration."""
    c = config(**changes)
    return initial_state(c, "fp32", ALONE), batches(c), c


def one_step(state, batches, c, context):
    """Terms of the next step of a run that writes no files."""
    run = Run(Path("none"), c, "fp32", None, state, context)
    return next(loop.steps(run, batches))


def batches(c):
    """What `data.Batches` gives one process, without a thread."""
    images = data.load("digits")
    for micro_step in itertools.count():
        rows = data.batch_indices(len(images), c.micro_batch_size, seed=c.seed, step=micro_step)
        yield images.images[rows], images.labels[rows]


def tensors(state):
    """Copies of all that training changes, by name."""
    result = {f"model.{name}": p.detach().clone() for name, p in state.model.named_parameters()}
    result |= {f"ema.{name}": p.detach().clone() for name, p in state.ema.named_parameters()}
    for name, parameter in state.model.named_parameters():
        moments = state.optimizer.state.get(parameter, {})
        result |= {f"optimizer.{name}.{key}": value.clone() for key, value in moments.items()}
    return result


def differing(a, b):
    """Names of tensors that are not bit for bit the same, or are in one of the two only."""
    return [n for n in a.keys() | b.keys() if n not in a or n not in b or not torch.equal(a[n], b[n])]


@contextlib.contextmanager
def objective_that(monkeypatch, change):
    """Within it a run that begins gets change(call number, result) for each result of the objective."""
    real, calls = training_state.objective, []

    def changed(*settings, **norm):
        def loss_of(*batch):
            calls.append(None)
            return change(len(calls), real(*settings, **norm)(*batch))

        return loss_of

    with monkeypatch.context() as patch:
        patch.setattr(training_state, "objective", changed)
        yield

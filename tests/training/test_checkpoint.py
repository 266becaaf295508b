"""Checkpoints: what is written comes back, and a failure loses nothing and says what is wrong."""

import dataclasses
import json
import resource
import zlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from imf import io as files
from imf.model.pretrained import Sampling
from imf.program import UserError
from imf.training import checkpoint
from tests.helpers.tiny_run import ALONE, NETWORK, config, differing, one_step, state_and_data, tensors


def metadata(step=3, **changes):
    environment = checkpoint.environment(torch.device("cpu"))
    return checkpoint.Metadata(step, 1.5, config(**changes), "bf16", environment)


def write(path, state, **changes):
    path.parent.mkdir(exist_ok=True)
    about = metadata(**changes)
    checkpoint.save(path, state, about)


def read(path, state):
    return checkpoint.restore(path, state)


@pytest.fixture
def trained():
    state, batches, c = state_and_data()
    for _ in range(3):
        one_step(state, batches, c, ALONE)
    return state


@pytest.fixture
def path(tmp_path):
    return checkpoint.path_of(tmp_path, 3)


def test_all_of_a_state_comes_back(trained, path):
    write(path, trained)
    fresh, *_ = state_and_data(seed=1)
    assert differing(tensors(fresh), tensors(trained))
    assert read(path, fresh) == metadata()
    assert differing(tensors(fresh), tensors(trained)) == []
    names = {name.split(".")[0] for name in load_file(path)}
    assert names == {"model", "ema", "optimizer"}


def test_class_names_come_back(trained, path):
    about = dataclasses.replace(metadata(), class_names=[*"abcdefghij"])
    path.parent.mkdir()
    checkpoint.save(path, trained, about)
    assert checkpoint.read_metadata(path) == about and about.class_names == tuple("abcdefghij")
    for wrong in (["a"], [1] * 10, "abcdefghij", None):
        with pytest.raises(ValueError, match="class_names must be 10 texts, or none"):
            dataclasses.replace(about, class_names=wrong)


def test_a_state_before_its_first_step(path):
    state, *_ = state_and_data()
    write(path, state, step=0)
    fresh, *_ = state_and_data(seed=1)
    read(path, fresh)
    assert differing(tensors(fresh), tensors(state)) == []


def test_the_metadata_say_what_the_run_is(trained, path):
    write(path, trained)
    with safe_open(path, framework="pt") as file:
        values = json.loads(file.metadata()["imf"])
    assert values["step"] == 3 and values["precision"] == "bf16"
    assert values["config"]["seed"] == 0 and values["config"]["network"] == dataclasses.asdict(NETWORK)
    assert values["environment"]["torch"] == torch.__version__
    assert values["environment"]["threads"] == str(torch.get_num_threads())


def test_restored_tensors_do_not_lie_in_the_file(trained, path):
    write(path, trained)
    kept = path.read_bytes()
    fresh, batches, c = state_and_data(seed=1)
    read(path, fresh)
    for _ in range(2):
        one_step(fresh, batches, c, ALONE)
    assert path.read_bytes() == kept


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_load_network(trained, path, weights):
    write(path, trained)
    network = checkpoint.load(path, weights)
    wanted = getattr(trained, weights).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in network.state_dict().items())
    assert network.compute_dtype == torch.bfloat16
    assert network.sampling == Sampling(**config().sampling) and checkpoint.read_metadata(path).step == 3
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_write_that_fails_leaves_the_previous_file(trained, path):
    write(path, trained)
    kept = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the system refuses what exceeds 1000 bytes
    try:
        with pytest.raises(UserError) as error:
            write(path, trained)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    needed = sum(tensor.nbytes for tensor in load_file(path).values())
    assert str(path) in str(error.value) and f"needs {needed:,} bytes" in str(error.value)
    assert path.read_bytes() == kept and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("module", "failing"), [(checkpoint, "save_file"), (files, "sync")])
def test_a_full_disk(trained, path, module, failing, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    write(path, trained)
    kept = path.read_bytes()
    monkeypatch.setattr(module, failing, full)
    with pytest.raises(UserError, match=r"step 3: .*No space left.* needs [\d,]+ bytes, [\d,]+ are free"):
        write(path, trained)
    assert path.read_bytes() == kept and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("length", [0, 4, 100, 5000, -1])
def test_a_truncated_file(trained, path, length):
    write(path, trained)
    path.write_bytes(path.read_bytes()[:length])
    before = tensors(trained)
    with pytest.raises(UserError, match="not a complete safetensors file") as error:
        read(path, trained)
    assert str(path) in str(error.value) and differing(before, tensors(trained)) == []


def test_foreign_files(trained, tmp_path):
    foreign = tmp_path / "other.safetensors"
    torch.save({"model": torch.zeros(3)}, foreign)
    with pytest.raises(UserError, match="not a complete safetensors file"):
        read(foreign, trained)
    save_file({"model": torch.zeros(3)}, foreign)
    with pytest.raises(UserError, match="without 'imf' metadata"):
        read(foreign, trained)
    save_file({"model": torch.zeros(3)}, foreign, {"imf": json.dumps({"format": 0})})
    with pytest.raises(UserError, match=r"another version of imf\.train: this version reads format 4, got 0"):
        read(foreign, trained)
    with pytest.raises(UserError, match=r"none\.safetensors: no such file"):
        read(tmp_path / "none.safetensors", trained)


def test_a_checkpoint_of_another_network(trained, path):
    write(path, trained)
    other, *_ = state_and_data(network=dataclasses.replace(NETWORK, hidden_size=24))
    before = tensors(other)
    with pytest.raises(UserError, match="a checkpoint of another network, or not whole:") as error:
        read(path, other)
    lines = str(error.value).splitlines()
    name, text = lines[1].strip().split(": ")
    got, wanted = (tensors(state)[name].shape for state in (trained, other))
    assert text == f"checkpoint {list(got)} float32, network {list(wanted)} float32"
    assert len(lines) == 7 and lines[-1].endswith("more")
    assert differing(before, tensors(other)) == []


def test_missing_and_additional_weights_are_named(trained, path):
    write(path, trained)
    name = next(iter(trained.model.state_dict()))
    spoil(path, lambda state: state.update({"model.more": state.pop(f"model.{name}")}))
    with pytest.raises(UserError) as error:
        read(path, trained)
    assert f"  model.{name}: checkpoint has none, network [" in str(error.value)
    assert "  model.more: checkpoint [" in str(error.value) and "network has none" in str(error.value)


MOMENT = "optimizer.shared_blocks.0.qkv.exp_avg"
SPOILED_TENSORS = {
    "a moment of another shape": lambda state: state.update({MOMENT: torch.zeros(3)}),
    "no moment of one weight": lambda state: state.pop(MOMENT),
    "no moments": lambda state: [state.pop(name) for name in list(state) if name.startswith("optimizer.")],
    "integer weights": lambda state: state.update({MOMENT: state[MOMENT].int()}),
    "moments of a foreign weight": lambda state: state.update({"optimizer.more.exp_avg": torch.zeros(3)}),
    "a foreign tensor": lambda state: state.update({"more": torch.zeros(3)}),
    "integer average": lambda state: state.update({"ema.class_tokens": state["ema.class_tokens"].int()}),
}
SPOILED_METADATA = {
    "step": ["4", -4, 4.0, True, None],
    "elapsed": ["1", float("nan"), -1],
    "precision": ["fp16", None, []],
    "environment": [{}, {"threads": "many"}, {"threads": 2}, None],
    "config": [None, {}, "digits"],
}


def spoil(path, change_tensors=lambda state: None, **changes):
    """Write a checkpoint again, with right checksums, after tensors or metadata have been changed."""
    about, state = checkpoint.read_metadata(path), load_file(path)
    change_tensors(state)
    groups = {}
    for name, tensor in state.items():
        group, _, rest = name.partition(".")
        groups.setdefault(group, {})[rest] = tensor
    checkpoint.save_network(path, groups, about)
    with safe_open(path, framework="pt") as file:
        text = json.dumps(json.loads(file.metadata()["imf"]) | changes)
    save_file(load_file(path), path, {"imf": text, "crc32": f"{zlib.crc32(text.encode()):08x}"})


@pytest.mark.parametrize("case", SPOILED_TENSORS)
def test_nothing_is_loaded_unless_all_tensors_fit(case, trained, path):
    write(path, trained)
    spoil(path, SPOILED_TENSORS[case])
    fresh, *_ = state_and_data(seed=1)
    before = tensors(fresh)
    with pytest.raises(UserError, match=r"not whole:\n  .*: checkpoint .*, network .*"):
        read(path, fresh)
    assert differing(before, tensors(fresh)) == []


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in SPOILED_METADATA.items() for value in values]
)
def test_metadata_of_other_types_are_named(name, value, trained, path):
    write(path, trained)
    spoil(path, **{name: value})
    before = tensors(trained)
    with pytest.raises(UserError, match=rf"another version of imf\.train: {name}"):
        read(path, trained)
    with pytest.raises(UserError, match=f"{name}"):
        checkpoint.load(path)
    assert differing(before, tensors(trained)) == []


def test_the_newest_checkpoint_is_that_of_the_highest_step(trained, tmp_path):
    for step in (20, 100, 3):
        write(checkpoint.path_of(tmp_path, step), trained)
    (tmp_path / "checkpoints" / "step-x.safetensors").touch()
    assert [path.name for path in checkpoint.list_all(tmp_path)] == [
        f"step-{step:08d}.safetensors" for step in (3, 20, 100)
    ]
    assert checkpoint.find(tmp_path) == checkpoint.path_of(tmp_path, 100)
    assert checkpoint.find(checkpoint.path_of(tmp_path, 3)) == checkpoint.path_of(tmp_path, 3)
    checkpoint.prune(tmp_path, keep=2)
    assert checkpoint.list_all(tmp_path) == [checkpoint.path_of(tmp_path, step) for step in (20, 100)]


def test_find_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        checkpoint.find(tmp_path / "none")
    with pytest.raises(UserError, match=r"no checkpoints/step-\*.safetensors"):
        checkpoint.find(tmp_path)


def test_leftovers_of_a_killed_process_are_removed(trained, path, tmp_path):
    write(path, trained)
    (path.parent / f".{path.name}.tmp").touch()
    checkpoint.remove_temporaries(tmp_path)
    assert list(path.parent.iterdir()) == [path]

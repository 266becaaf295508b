"""The small network that gives features: what it learns, its file, and files that are none."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from imf import data
from imf.evaluation import convnet, inception
from imf.program import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def short():
    """A tenth of the training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convnet, "BATCH", 32)
        patch.setattr(convnet, "STEPS", 120)
        yield


def batches(count=600):
    digits = data.load("digits")
    return list(zip(digits.images[:count].split(100), digits.labels[:count].split(100), strict=True))


@pytest.fixture(scope="module")
def trained():
    return convnet.train(batches(), 10)


def test_it_learns_labels_and_is_a_function_of_the_data(trained):
    assert trained.about.task == "labels" and trained.about.held_out > 0.8
    rest = data.load("digits")
    features, logits = trained(rest.images[600:])
    right = (logits.argmax(1) == rest.labels[600:]).double().mean()
    assert features.shape == (1197, 128) and right > 0.75
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    again = convnet.train(batches(), 10)
    assert again.about == trained.about
    assert torch.equal(torch.random.get_rng_state(), state)  # a run's own numbers are left alone


def test_without_labels_it_learns_rotations():
    network = convnet.train(batches(), 1)
    assert network.about.task == "rotations" and network.about.classes == 4
    assert network.about.held_out > 0.5  # 0.25 by chance
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    features, logits = convnet.RunExtractor(network)(images)
    assert features.shape == (3, 128) and logits is None  # of turns, not of labels


@pytest.mark.parametrize(("channels", "size"), [(3, 5), (1, 28), (3, 33), (3, 256)])
def test_images_of_any_size(channels, size, monkeypatch):
    monkeypatch.setattr(convnet, "LEAST", 2)
    x = torch.rand(4, channels, size, size) * 2 - 1
    network = convnet.train([(x, torch.arange(4) % 2)], 2)
    features, logits = network(x)
    assert features.shape == (4, 128) and logits.shape == (4, 2) and features.isfinite().all()


def test_a_file_of_it(trained, tmp_path):
    path = tmp_path / convnet.FILE
    convnet.save(trained, path)
    read = convnet.load(path)
    assert read.about == trained.about
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    wanted = trained(images.float() / 127.5 - 1)
    for name in (str(path), str(tmp_path)):  # the file, or the run's folder
        for got, one in zip(inception.load(name, CPU)(images), wanted, strict=True):
            assert torch.equal(got, one)
    with pytest.raises(UserError, match=r"images must be \[B, 1, H, W\] .*, got \[3, 3, 8, 8\]"):
        inception.load(str(path), CPU)(images.expand(-1, 3, -1, -1))


def rewritten(path, change):
    """Writes the file again after a change of its state and its description."""
    state = load_file(path)
    with convnet.safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()[convnet.KEY])
    change(state, about)
    save_file(state, path, {convnet.KEY: json.dumps(about)})


@pytest.mark.parametrize(
    "change",
    [
        lambda state, about: state["head.bias"].add_(1e-3),
        lambda state, about: state.pop("head.bias"),
        lambda state, about: about.update(classes=11),
        lambda state, about: about.update(classes=10**9),
        lambda state, about: about.update(task="other"),
        lambda state, about: about.update(more=1),
        lambda state, about: about.pop("task"),
    ],
)
def test_a_file_that_was_changed_is_refused(change, trained, tmp_path):
    path = tmp_path / convnet.FILE
    convnet.save(trained, path)
    rewritten(path, change)
    with pytest.raises(UserError, match=r"no extractor of a run can be read from it: .*; delete it"):
        convnet.load(path)


def test_what_is_no_file_of_it(trained, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        convnet.load(tmp_path / convnet.FILE)
    with pytest.raises(UserError, match="no such file"):
        inception.load(str(tmp_path), CPU)
    path = tmp_path / convnet.FILE
    for content in (b"", b"no safetensors", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(UserError, match="no extractor of a run"):
            convnet.load(path)
    save_file({"x": torch.zeros(1)}, path)
    assert not convnet.is_convnet(path)
    with pytest.raises(UserError, match="no extractor of a run"):
        convnet.load(path)


def test_too_few_images():
    with pytest.raises(UserError, match="at least 2 images"):
        convnet.train([(torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64))], 2)
    with pytest.raises(UserError, match=r"must be square, got \[2, 1, 8, 4\]"):
        convnet.train([(torch.zeros(2, 1, 8, 4), torch.zeros(2, dtype=torch.int64))], 1)

"""Feature extractors: each form, and files that are none."""

import importlib.util
import pickle
import sys

import pytest
import torch

from imf.evaluation import inception as features
from imf.program import UserError
from tests.helpers.tiny_evaluation import Means, Nvidia, script

CPU = torch.device("cpu")
IMAGES = torch.randint(0, 256, (5, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_pixels_are_features():
    got, logits = features.load("pixels", CPU)(IMAGES)
    assert got.shape == (5, 108) and got.dtype == torch.float32 and logits is None
    torch.testing.assert_close(got, IMAGES.flatten(1) / 127.5 - 1)


def test_torchscript(tmp_path):
    extractor = features.load(str(script(Means(), tmp_path / "means.pt")), CPU)
    got, logits = extractor(IMAGES)
    torch.testing.assert_close(got, IMAGES.float().mean((2, 3)) / 255)
    torch.testing.assert_close(logits, got * 2)
    grey, _ = extractor(IMAGES[:, :1])
    torch.testing.assert_close(grey, got[:, :1].expand(-1, 3))


def test_torchscript_with_nvidias_signature(tmp_path):
    got, logits = features.load(str(script(Nvidia(), tmp_path / "inception.pt")), CPU)(IMAGES)
    torch.testing.assert_close(got, IMAGES.float().mean((2, 3)) / 255)
    torch.testing.assert_close(logits.softmax(1), (got * 2).softmax(1))


class Wrong(torch.nn.Module):
    def forward(self, x):
        return x.float()


def test_what_is_no_extractor_is_refused(tmp_path):
    for name, message in (
        ("inception", "extractor must be pixels, a run's folder"),
        (str(tmp_path / "none.pt"), "no such file"),
        ("model.pt2", "unpickled when read"),
    ):
        with pytest.raises(UserError, match=message):
            features.load(name, CPU)
    path = tmp_path / "truncated.pt"
    path.write_bytes(script(Means(), tmp_path / "means.pt").read_bytes()[:500])
    with pytest.raises(UserError, match="no TorchScript module can be read"):
        features.load(str(path), CPU)
    with pytest.raises(UserError, match=r"features must be \[5, width\], got \[5, 3, 6, 6\]"):
        features.load(str(script(Wrong(), tmp_path / "wrong.pt")), CPU)(IMAGES)


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


@pytest.mark.parametrize("suffix", [".pt", ".ts"])
def test_a_pickle_is_not_run(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"bomb{suffix}"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError):
        features.load(str(path), CPU)
    torch.save(Bomb(), path)
    with pytest.raises(UserError):
        features.load(str(path), CPU)
    assert not (tmp_path / "exploded").exists()


def test_inception_needs_torch_fidelity(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    path = tmp_path / "weights.pth"
    path.touch()
    with pytest.raises(UserError, match=r"need torch-fidelity .*pip install --no-deps"):
        features.load(str(path), CPU)


@pytest.mark.slow
def test_torch_fidelitys_inception_with_random_weights(tmp_path, monkeypatch):
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed: pip install --no-deps torch-fidelity")
    monkeypatch.setitem(sys.modules, "torchvision", None)  # which its Inception does not need
    theirs = features.torch_fidelitys_inception()
    assert "torch_fidelity" not in sys.modules
    weights = {}
    with monkeypatch.context() as patch:  # its constructor always loads; here it tells what it would load
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(theirs, "load_state_dict", lambda self, _: weights.update(self.state_dict()))
        theirs("x", ["2048"], feature_extractor_weights_path="none")
    path = tmp_path / "weights.pth"
    torch.save(weights, path)
    got, logits = features.load(str(path), CPU)(IMAGES)
    assert got.shape == (5, 2048) and logits.shape == (5, 1008)
    torch.save({"fc.weight": weights["fc.weight"]}, path)
    with pytest.raises(UserError, match="no weights of torch-fidelity's Inception"):
        features.load(str(path), CPU)
    torch.save(Bomb(), path)
    with pytest.raises(UserError, match="nothing else is unpickled"):
        features.load(str(path), CPU)

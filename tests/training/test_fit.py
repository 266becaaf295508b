"""`imf.fit`: runs of data and networks that are objects in Python; the command line trains by it too."""

import dataclasses
import json
import os
import signal

import pytest
import torch
from torch import nn

import imf
from imf import data, train
from imf.program import UserError
from imf.training import artifacts, checkpoint
from tests.helpers.own_network import OwnNetwork, adapted
from tests.helpers.tiny_run import arguments, config, cut_short, differing, objective_that
from tests.training.test_resume import final, metrics


class Halved:
    """A data set of somebody's own, see `imf.data.DataSet`: every other digit."""

    autoencoder, shape, num_classes = "", (1, 8, 8), 10
    class_names = tuple("0123456789")

    def __init__(self):
        self.digits = data.load("digits")

    def __len__(self):
        return len(self.digits) // 2

    def fetch(self, rows, generator):
        return self.digits.fetch(2 * rows, generator)


@pytest.fixture(autouse=True)
def without_scores(monkeypatch):
    monkeypatch.setattr(artifacts, "finish", lambda run: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of a network and a data set of somebody's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifacts, "finish", lambda run: None)
        options = config(runs=str(tmp_path_factory.mktemp("whole")), sample_every=3)
        return imf.fit(options, dataset=Halved(), network=adapted())


def test_the_command_line_trains_by_it(tmp_path, capsys):
    run = imf.fit(config(runs=str(tmp_path), name="python"))
    assert train.main(arguments(runs=tmp_path, name="command")) == 0
    assert run.folder == tmp_path / "python" and run.state.step == 6
    assert differing(final(run.folder), final(tmp_path / "command")) == []


def test_a_run_of_objects(whole):
    assert whole.folder.name == "Halved"
    saved = json.loads((whole.folder / "config.json").read_text())["config"]
    assert saved["data"] == f"custom: {__name__}.Halved"
    assert saved["network"] == {
        "custom": "tests.helpers.own_network.OwnNetwork",
        "num_classes": 10,
        "in_channels": 1,
        "input_size": 8,
        **dict.fromkeys(("has_v_head", "omega_input", "interval_input"), False),
    }
    assert (whole.folder / "samples" / "step-00000003.png").read_bytes().startswith(b"\x89PNG")
    names = {f"{kind}.network.{name}" for kind in ("model", "ema") for name in OwnNetwork().state_dict()}
    assert names < final(whole.folder).keys()
    lines = metrics(whole.folder)
    assert len(lines) == 6 and all(line["loss_u"] > 0 for line in lines)
    assert not whole.network.training and not any(p.requires_grad for p in whole.network.parameters())


def test_it_resumes_with_the_same_bits(whole, tmp_path):
    cut = cut_short(whole.folder, tmp_path / "cut", lines=5)
    run = imf.fit(resume=cut, dataset=Halved(), network=adapted(seed=1))
    assert run.state.step == 6 and differing(final(cut), final(whole.folder)) == []
    more = dataclasses.replace(run.config, steps=8)
    assert imf.fit(more, resume=str(cut), dataset=Halved(), network=adapted()).state.step == 8


def test_what_is_missing_when_it_resumes_is_named(whole, tmp_path, capsys):
    cut = cut_short(whole.folder, tmp_path / "cut", lines=5)
    own = (
        r"the weights alone of a network of your own, tests.helpers.own_network.OwnNetwork; pass it in Python"
    )
    with pytest.raises(UserError, match=own):
        imf.fit(resume=cut, dataset=Halved())
    with pytest.raises(
        UserError, match=r"data set made in Python, .*Halved; pass it: imf.fit\(…, dataset=…\)"
    ):
        imf.fit(resume=cut, network=adapted())
    with pytest.raises(UserError, match=r"data is .*Halved.* got 'digits'; a resumed run goes on exactly"):
        imf.fit(resume=cut, network=adapted(), dataset="digits")
    with pytest.raises(UserError, match=r"a checkpoint of another network, or not whole:"):
        imf.fit(resume=cut, dataset=Halved(), network=adapted(blocks=1))
    assert train.main(["--resume", str(cut)]) == 1
    assert "or imf.fit(resume=path, network=imf.adapt(…))" in capsys.readouterr().err


def test_load_takes_the_network(whole):
    network = imf.load(whole.folder, network=adapted(seed=1))
    assert not network.training and network.sampling == whole.network.sampling
    assert torch.equal(network.generate(["3", "7"], seed=0), whole.network.generate([3, 7], seed=0))
    noise, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    expected = imf.generate(whole.network, noise, labels, steps=2)
    assert torch.equal(imf.generate(network, noise, labels, steps=2), expected)
    unseen = imf.adapt(OwnNetwork(), num_classes=10)  # without shape: that of the file
    assert imf.load(whole.folder, "model", network=unseen).config.input_size == 8
    with pytest.raises(UserError, match=r"pass it in Python: imf.load\(path, network=imf.adapt\(…\)\)"):
        imf.load(whole.folder)
    with pytest.raises(UserError, match=r"network must be of the form that was trained, .*num_classes=10"):
        imf.load(whole.folder, network=imf.adapt(OwnNetwork(), num_classes=9))
    with pytest.raises(
        UserError, match=r"first.weight: checkpoint \[16, 64\] float32, network \[8, 64\] float"
    ):
        imf.load(whole.folder, network=adapted(width=8))
    with pytest.raises(UserError, match=r"pass it in Python: .*; got a OwnNetwork"):
        imf.load(whole.folder, network=OwnNetwork())
    with pytest.raises(UserError, match=r"a folder cannot hold .*OwnNetwork, which is code of your own"):
        network.save_pretrained(whole.folder)


def test_a_network_of_imf_build_may_be_passed(tmp_path):
    torch.manual_seed(1)
    network = imf.build(config().network)
    run = imf.fit(config(runs=str(tmp_path), steps=1), network=network)  # of learning rate 0
    torch.manual_seed(1)
    expected = imf.build(config().network).state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in run.network.state_dict().items())
    loaded = imf.load(run.folder)
    assert all(torch.equal(x, expected[name]) for name, x in loaded.state_dict().items())
    assert imf.fit(dataclasses.replace(run.config, steps=2), resume=run.folder).state.step == 2


def test_a_torch_dataset(tmp_path):
    digits = data.load("digits")
    pairs = torch.utils.data.TensorDataset(digits.images, digits.labels)
    run = imf.fit(config(runs=str(tmp_path)), dataset=pairs, network=adapted())
    other = imf.fit(config(runs=str(tmp_path)), dataset="digits", network=adapted())
    assert run.folder.name == "TensorDataset" and other.folder.name == "digits"
    assert differing(final(run.folder), final(other.folder)) == []


def test_a_data_set_that_lacks_something_is_named(tmp_path):
    class Nameless(Halved):
        @property
        def class_names(self):
            raise AttributeError

    with pytest.raises(
        UserError, match=r"members of an imf.data.DataSet, got a Nameless without class_names"
    ):
        imf.fit(config(runs=str(tmp_path)), dataset=Nameless())


def test_frozen_weights_stay_and_are_resumed(tmp_path):
    def frozen():
        network = adapted()
        network.network.first.requires_grad_(False)
        return network

    before = frozen().network.first.weight
    run = imf.fit(config(runs=str(tmp_path), steps=4), network=frozen())
    assert torch.equal(run.state.model.network.first.weight, before)
    assert not any("optimizer.network.first" in name for name in final(run.folder, 4))
    run = imf.fit(dataclasses.replace(run.config, steps=6), resume=run.folder, network=frozen())
    assert run.state.step == 6 and torch.equal(run.network.network.first.weight, before)


def test_checkpointing_changes_no_gradient(tmp_path):
    kept, recomputed = (
        imf.fit(config(runs=str(tmp_path), checkpointing=on, lr=1e-2), network=adapted())
        for on in (False, True)
    )
    for (name, x), y in zip(
        kept.network.state_dict().items(), recomputed.network.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, msg=name)


def test_the_method_of_original_mean_flows(tmp_path):
    network = adapted()
    options = config(runs=str(tmp_path), method="mf", network=network.config)
    assert imf.fit(options, network=network).state.step == 6
    with pytest.raises(
        ValueError, match=r"method .* must be imf, or mf without a v-head and with fixed guidance"
    ):
        config(method="imf-boundary", network=network.config)
    with pytest.raises(ValueError, match=r"method .* must be imf, or mf without a v-head"):
        config(method="mf", network=dataclasses.replace(network.config, has_v_head=True))


def test_a_signal_ends_it_by_an_exception_that_says_how_to_go_on(tmp_path, monkeypatch):
    def stop(call, out):
        if call == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return out

    expected = r"stopped after step 3 of 6\n.*step-00000003.*\nGo on with: imf.fit\(resume='.*', network=…\)"
    with (
        objective_that(monkeypatch, stop),
        pytest.raises(KeyboardInterrupt, match=expected),
    ):
        imf.fit(config(runs=str(tmp_path)), network=adapted())
    folder = tmp_path / "digits"
    assert checkpoint.list_all(folder)[-1] == checkpoint.path_of(folder, 3)
    assert imf.fit(resume=folder, network=adapted(seed=1)).state.step == 6


def unused():
    network = OwnNetwork()
    network.extra = nn.Linear(2, 2)
    return imf.adapt(network, num_classes=10)


def moved(network, z, t, r, labels):
    return z * (t * r)[:, None, None, None]


def without_blocks():
    network = OwnNetwork()
    network.blocks = nn.Sequential(*network.blocks)
    return imf.adapt(network, num_classes=10)


WRONG = {
    "not adapted": (OwnNetwork, {}, TypeError, "got OwnNetwork; wrap one of your own: imf.adapt"),
    "classes": (
        lambda: imf.adapt(OwnNetwork(), num_classes=9),
        {},
        UserError,
        r"for images \[1, 8, 8\] of 10 classes, as the data in digits, got \[1, 8, 8\] of 9 classes",
    ),
    "shape": (
        lambda: imf.adapt(nn.Identity(), num_classes=10, call=moved,
                          shape=(3, 8, 8)),
        {},
        UserError,
        r"images \[1, 8, 8\] of 10 classes, as the data in digits, got \[3, 8, 8\]",
    ),
    "null label": (
        lambda: imf.adapt(OwnNetwork(rows=10), num_classes=10),
        {},
        UserError,
        "network: adapted OwnNetwork: the embedding labels has 10 rows",
    ),
    "unused weights": (
        unused,
        {},
        UserError,
        "got 2 without influence on it: network.extra.weight, network.extra.bias; remove them, or freeze",
    ),
    "compile": (adapted, {"compile": True}, UserError, "--compile must be off for a network of your own"),
    "no blocks": (
        without_blocks,
        {"checkpointing": True},
        UserError,
        "torch.nn.ModuleLists, and this one has none; call imf_kernels.checkpoint in it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_networks_are_named(case, tmp_path):
    make, changes, kind, message = WRONG[case]
    with pytest.raises(kind, match=message):
        imf.fit(config(runs=str(tmp_path), **changes), network=make())
    assert not list(tmp_path.iterdir())


def test_a_configuration_of_another_type_is_named():
    with pytest.raises(UserError, match=r"fit: config must be an imf.TrainConfig or None, got dict"):
        imf.fit({"steps": 3})


def test_a_configuration_of_an_adapted_network_needs_the_network(tmp_path):
    with pytest.raises(UserError, match=r"network: pass the network of your own, imf.fit\(…, network=…\)"):
        imf.fit(config(runs=str(tmp_path), network=adapted().config))


def test_scores_of_a_network_of_ones_own(tmp_path):
    run = imf.fit(config(runs=str(tmp_path), steps=1), network=adapted())
    score = artifacts.score_samples(run, 1, 180)
    assert score.figures["frechet_distance"] > 0

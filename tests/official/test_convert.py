"""The command `python -m imf.convert`: official checkpoints in every form, in and out."""

import json
import pickle
import signal
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import imf
from imf import convert, evaluate, sample
from imf.model.config import PRESETS
from imf.official.names import from_flax, to_official
from imf.program import UserError
from imf.training.checkpoint import load, read_metadata
from imf.training.recipes import PRESETS as SETTINGS
from tests.helpers import golden_imf
from tests.helpers.tiny_evaluation import Means, autoencoder, script

CONFIG = golden_imf.config()
OURS = from_flax(golden_imf.weights())
OFFICIAL = to_official(OURS, CONFIG)
SAMPLING = {name: x for name, x in OFFICIAL.items() if not name.startswith("net.v_heads.")}


def run(*arguments):
    return convert.main([str(a) for a in arguments])


def tree(arrays):
    """Arrays by path -> nested, as Flax has them."""
    result = {}
    for path, array in arrays.items():
        *parts, last = path.split("/")
        branch = result
        for part in parts:
            branch = branch.setdefault(part, {})
        branch[last] = array
    return result


def state(average=2.0):
    """A training state of the official JAX program; the average is told by a factor."""
    weights = golden_imf.weights()
    ema = {path: x * np.float32(average) for path, x in weights.items()}
    moments = [{"count": np.zeros((), np.int32), "mu": tree(weights)}, {}]
    return {"step": 11, "params": tree(weights), "ema_params": tree(ema), "opt_state": moments}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_pytorch_checkpoints_in_and_out(tmp_path, capsys, suffix):
    source, ours, back = tmp_path / f"in{suffix}", tmp_path / "ours.safetensors", tmp_path / f"back{suffix}"
    torch.save(SAMPLING, source) if suffix == ".pth" else save_file(SAMPLING, source)
    assert run(source, ours, "--input-size", CONFIG.input_size) == 0
    assert "for sampling: without the v-head" in capsys.readouterr().out
    network = load(ours)
    assert network.config == CONFIG and read_metadata(ours).step == 0
    assert all(torch.equal(x, OURS[name]) for name, x in network.state_dict().items())

    assert run(ours, back, "--to", "official") == 0
    found = torch.load(back, weights_only=True) if suffix == ".pth" else load_file(back)
    assert found.keys() == SAMPLING.keys()
    assert all(torch.equal(found[name], x) for name, x in SAMPLING.items())

    z, y = torch.randn(2, 4, 8, 8), torch.tensor([0, 3])
    assert imf.generate(network, z, y).shape == z.shape
    with pytest.raises(UserError, match="the v-head was asked of a network whose weights are for sampling"):
        network(z, *torch.ones(5, 2), y, heads="v")
    with pytest.raises(UserError, match="there are no 'model' weights in it"):
        load(ours, "model")
    assert run(ours, tmp_path / "v.pth", "--to", "official", "--v-head") == 1
    assert "--v-head: there is none" in capsys.readouterr().err


def test_training_weights_keep_their_v_head(tmp_path):
    source, ours, back = (tmp_path / name for name in ("in.pth", "ours.safetensors", "back.pth"))
    torch.save(OFFICIAL, source)
    assert run(source, ours, "--input-size", 8) == 0
    assert run(ours, back, "--to", "official", "--v-head") == 0
    found = torch.load(back, weights_only=True)
    assert found.keys() == OFFICIAL.keys()
    assert all(torch.equal(found[name], x) for name, x in OFFICIAL.items())


def write_orbax(folder):
    pytest.importorskip(
        "orbax.checkpoint", reason="orbax-checkpoint is not installed"
    ).PyTreeCheckpointer().save(folder.absolute() / "checkpoint_11", state())


def write_flax(folder):
    serialization = pytest.importorskip("flax.serialization", reason="flax is not installed")
    folder.mkdir()
    (folder / "checkpoint_9").write_bytes(b"an older one")
    (folder / "checkpoint_11").write_bytes(
        serialization.msgpack_serialize(serialization.to_state_dict(state()))
    )


def write_old_orbax(folder):
    """Before 2024: one file with all arrays."""
    write_flax(folder)
    (folder / "checkpoint_11").rename(folder / "checkpoint")
    (folder / "checkpoint_11").mkdir()
    (folder / "checkpoint").rename(folder / "checkpoint_11" / "checkpoint")


@pytest.mark.parametrize("write", [write_orbax, write_flax, write_old_orbax])
def test_jax_checkpoints(tmp_path, capsys, write):
    folder, ours = tmp_path / "iMF", tmp_path / "ours.safetensors"
    write(folder)
    assert run(folder, ours, "--input-size", 8) == 0
    assert "(ema and model), step 11" in capsys.readouterr().out
    for kind, factor in (("model", 1), ("ema", 2)):
        network = load(ours, kind)
        assert read_metadata(ours).step == 11
        assert all(torch.equal(x, OURS[name] * factor) for name, x in network.state_dict().items())

    with zipfile.ZipFile(tmp_path / "iMF.zip", "w") as archive:
        for path in folder.rglob("*"):
            archive.write(path, path.relative_to(tmp_path))
    one = tmp_path / "one.safetensors"
    assert run(tmp_path / "iMF.zip", one, "--input-size", 8, "--weights", "model") == 0
    assert all(name.startswith("model.") for name in load_file(one))
    assert {path.name for path in tmp_path.iterdir()} == {"iMF", "iMF.zip", ours.name, one.name}


def test_mean_flow_checkpoints(tmp_path, capsys):
    serialization = pytest.importorskip("flax.serialization", reason="flax is not installed")
    with np.load(golden_imf.GOLDEN / "mf_tiny.npz") as file:
        weights = {
            name.removeprefix("param:"): file[name] for name in file.files if name.startswith("param:")
        }
    source, ours = tmp_path / "checkpoint_3", tmp_path / "ours.safetensors"
    source.write_bytes(serialization.msgpack_serialize({"ema_params": tree(weights), "step": 3}))
    assert run(source, ours, "--input-size", 8) == 1
    assert "--num-heads) of an MF network of width 64 is not known" in capsys.readouterr().err
    assert run(source, ours, "--input-size", 8, "--num-heads", 1) == 0
    network, metadata = load(ours), read_metadata(ours)
    assert network.config.block == "plain" and metadata.config.method == "mf"
    assert imf.generate(network, torch.randn(2, 4, 8, 8), torch.tensor([0, 3])).shape == (2, 4, 8, 8)
    assert run(ours, tmp_path / "back.pth", "--to", "official") == 1
    assert "has iMF's own networks alone" in capsys.readouterr().err


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_network_comes_with_its_settings(name):
    found, settings = convert._settings(PRESETS[name])
    assert found == name and settings == SETTINGS[name] and settings.network == PRESETS[name]


@pytest.mark.slow
def test_from_an_official_checkpoint_to_figures(tmp_path):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    vae, extractor = autoencoder(tmp_path / "vae"), script(Means(), tmp_path / "means.pt")
    source, ours, back = (tmp_path / name for name in ("iMF.pth", "ours.safetensors", "back.pth"))
    torch.save(SAMPLING, source)
    more = ["--checkpoint", ours, "--vae", vae, "--omega", 2, "--interval", 0.2, 0.8]
    assert run(source, ours, "--input-size", 8) == 0
    assert sample.main([str(a) for a in (*more, "--out", tmp_path / "grid.png", "--classes", 1, 7)]) == 0
    side = 2 * 16 + 4  # images of 16 x 16, drawn twice as large
    assert Image.open(tmp_path / "grid.png").size == (20 + 10 * side + 4, 2 * side + 4)
    judge = ["--extractor", extractor, "--reference", tmp_path / "digits.npz", "--out", tmp_path / "out"]
    statistics = ["--make-statistics", "digits", tmp_path / "digits.npz", "--extractor", extractor]
    assert evaluate.main([str(a) for a in statistics]) == 0
    samples = ["--samples-dir", tmp_path / "samples", "--count", 20, "--device", "cpu"]
    assert evaluate.main([str(a) for a in (*more, *judge, *samples)]) == 0
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert row["fid"] > 0 and row["inception_score"] >= 1 and row["omega"] == 2
    assert run(ours, back, "--to", "official") == 0
    found = torch.load(back, weights_only=True)
    assert found.keys() == SAMPLING.keys() and all(torch.equal(found[n], x) for n, x in SAMPLING.items())


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_what_is_no_checkpoint_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Bomb(), protocol=2))
    torch.save({"x": Bomb()}, tmp_path / "bomb.pth")
    torch.save({"model": OFFICIAL}, tmp_path / "nested.pth")
    torch.save({**SAMPLING, "net.pos_embed": torch.zeros(1)}, tmp_path / "foreign.pth")
    torch.save({n: x for n, x in SAMPLING.items() if "u_final_layer.norm" not in n}, tmp_path / "lacks.pth")
    torch.save({n: x for n, x in SAMPLING.items() if "x_embedder" not in n}, tmp_path / "shapeless.pth")
    save_file(SAMPLING, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-9])
    (tmp_path / "cut.zip").write_bytes(b"PK\x03\x04")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "none.pth": "no such file or folder",
        "pickle.pth": "no file of plain tensors",
        "bomb.pth": "nothing else is unpickled",
        "nested.pth": "wanted tensors by name, got model: dict",
        "foreign.pth": "'net.pos_embed' is no weight of the official iMF network",
        "lacks.pth": "u_final.norm: checkpoint has none, network [64] float32",
        "shapeless.pth": "no weights of an official iMF or MF network",
        "cut.safetensors": "no file of plain tensors",
        "cut.zip": "could not be unpacked",
        "empty": "wanted checkpoint_<step> in it, got nothing",
    }.items():
        assert run(tmp_path / name, tmp_path / "out.safetensors", "--input-size", 8) == 1, name
        assert message in capsys.readouterr().err, name
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "out.safetensors").exists()
    assert run(tmp_path / "lacks.pth", tmp_path / "o.safetensors", "--weights", "model") == 1
    assert "there are ema in" in capsys.readouterr().err


def test_an_existing_file_is_kept_and_jax_is_asked_for(tmp_path, capsys, monkeypatch):
    for out, message in (("there.safetensors", "exists already"), ("out.pth", "must end in .safetensors")):
        (tmp_path / "there.safetensors").touch()
        with pytest.raises(SystemExit):
            run(tmp_path / "x.pth", tmp_path / out)
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "flax.serialization", None)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    (tmp_path / "checkpoint_1").touch()
    (tmp_path / "orbax").mkdir()
    (tmp_path / "orbax" / "_METADATA").touch()
    for source in ("checkpoint_1", "orbax"):
        assert run(tmp_path / source, tmp_path / "out.safetensors") == 1
        assert "pip install -e '.[jax]'" in capsys.readouterr().err


def test_weights_that_share_memory(tmp_path):
    """One tensor under two names, and one inside of another."""
    tied = SAMPLING | {"net.t_max_tokens": SAMPLING["net.t_min_tokens"]}
    tied["net.omega_tokens"] = tied["net.class_tokens"][2:6]
    torch.save(tied, tmp_path / "in.pth")
    assert run(tmp_path / "in.pth", tmp_path / "out.safetensors", "--input-size", CONFIG.input_size) == 0
    network = load(tmp_path / "out.safetensors")
    assert torch.equal(network.t_max_tokens, OURS["t_min_tokens"])
    assert torch.equal(network.omega_tokens, OURS["class_tokens"][2:6])


FINITE = "must be finite floating-point numbers, got NaN or infinity in"
KEY = "net.shared_blocks.0.attn.k_proj._flax_linear.weight"
NAMES = ["net.u_heads.0.mlp.w1._flax_linear.weight", KEY]
SPOILED = {
    "NaN": (
        lambda x: x.masked_fill(x == x.max(), float("nan")),
        "must be finite floating-point numbers, got NaN or infinity in",
    ),
    "infinity": (lambda x: x / 0, FINITE),
    "a few bytes as a huge tensor": (
        lambda x: x[:1, :1].expand(10**6, 10**6),
        "the 4,000,000,000,000 bytes of its",
    ),
    "sparse": (lambda x: x.to_sparse(), "wanted plain tensors by name"),
    "integers": (lambda x: x.int(), "floating-point numbers, got torch.int32 in"),
    "another shape": (lambda x: x[1:], ""),
    "no dimension": (lambda x: x.sum(), ""),
    "no values": (lambda x: x[:0], ""),
}


@pytest.mark.parametrize("case", SPOILED)
@pytest.mark.parametrize("name", NAMES)
def test_damaged_weights_are_refused(case, name, tmp_path, capsys):
    change, message = SPOILED[case]
    source, out = tmp_path / "in.pth", tmp_path / "out.safetensors"
    torch.save(SAMPLING | {name: change(SAMPLING[name])}, source)
    assert run(source, out, "--input-size", CONFIG.input_size) == 1
    error = capsys.readouterr().err
    assert error.lstrip().startswith("imf.convert: ") and message in error and "in.pth" in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (2**14, "hidden_size times patches (input_size / patch_size) ** 2 must be at most 268435456, got "),
        (10**6, "input_size must be at most 65536, got 1000000"),
        (10**30, "input_size must be at most 65536, got 1000000"),
    ],
)
def test_absurd_sizes_are_refused(size, message, tmp_path, capsys):
    torch.save(SAMPLING, tmp_path / "in.pth")
    assert run(tmp_path / "in.pth", tmp_path / "out.safetensors", "--input-size", size) == 1
    assert message in capsys.readouterr().err


def test_archives_that_cannot_be_unpacked(tmp_path, capsys):
    """Encrypted, or of more bytes than any disk has: named, and nothing is left beside them."""
    source, out = tmp_path / "in.zip", tmp_path / "out.safetensors"
    with zipfile.ZipFile(source, "w") as archive:
        for number in range(2**12):
            archive.writestr(f"checkpoint_1/{number}", b"some bytes")
    whole = source.read_bytes()
    encrypted, huge, entry = bytearray(whole), bytearray(whole), whole.index(b"PK\x01\x02")
    encrypted[6] |= 1
    encrypted[entry + 8] |= 1
    while entry >= 0:  # every entry of the directory says that it has 4 GB
        huge[entry + 24 : entry + 28] = b"\xfe\xff\xff\xff"
        entry = whole.find(b"PK\x01\x02", entry + 1)
    for content, message in ((encrypted, "encrypted"), (huge, "needs 17,592,186,036,224 bytes there")):
        source.write_bytes(content)
        assert run(source, out) == 1
        error = capsys.readouterr().err
        assert f"imf.convert: {source}: could not be unpacked: " in error and message in error
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_conversion_leaves_nothing(number, tmp_path, monkeypatch, capsys):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # processes beside a terminal may ignore it
    source = tmp_path / "in.zip"
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("checkpoint_1", b"some bytes")
    real = zipfile.ZipFile.extractall

    def extractall(archive, folder):
        real(archive, folder)
        signal.raise_signal(number)

    monkeypatch.setattr(zipfile.ZipFile, "extractall", extractall)
    assert run(source, tmp_path / "out.safetensors") == 128 + number
    assert list(tmp_path.iterdir()) == [source] and "imf.convert: stopped" in capsys.readouterr().err

"""Networks that draw by labels, and the folders that `save_pretrained` writes."""

import dataclasses
import json
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file

import imf
from imf import data, random, sample, train
from imf.mean_flow.network import DiT
from imf.model.imf import IMF
from imf.model.pretrained import Sampling
from imf.program import UserError
from imf.sampling import class_grid
from tests.helpers.tiny_data import images, pack
from tests.helpers.tiny_run import NETWORK, arguments, perturbed

NAMES = tuple(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])


def trained(method="imf"):
    """A network with a run's settings."""
    network = perturbed(method).requires_grad_(False)
    guided = method == "imf"
    network.sampling = Sampling(*((1.5, 0.1, 0.75) if guided else (1.0, 0.0, 1.0)), NAMES)
    return network


@pytest.fixture
def folder(tmp_path):
    trained().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def changed(folder, change):
    """Changes the configuration of a folder by a function of its values."""
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("method", ["imf", "mf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_folder_holds_the_network(method, dtype, tmp_path):
    """By both readers: shape, weights to the dtype's rounding, dtype of products, sampling."""
    network = trained(method)
    network.compute_dtype = torch.bfloat16
    network.save_pretrained(tmp_path / "a" / "b", dtype=dtype)
    assert {x.name for x in (tmp_path / "a" / "b").iterdir()} == {"config.json", "model.safetensors"}
    wanted = {name: x.to(dtype).float() for name, x in network.state_dict().items()}
    for found in (imf.load(tmp_path / "a" / "b"), type(network).from_pretrained(str(tmp_path / "a" / "b"))):
        assert type(found) is type(network) and found.config == network.config
        assert found.sampling == network.sampling and found.compute_dtype == torch.bfloat16
        state = found.state_dict()
        assert state.keys() == wanted.keys() and all(torch.equal(state[n], x) for n, x in wanted.items())
        assert not any(p.requires_grad or p.is_meta for p in found.parameters())
    if dtype == torch.float32:
        a, b = (x.generate([3, 1, 4], steps=2, seed=0) for x in (network, found))
        assert torch.equal(a, b)
    files = load_file(tmp_path / "a" / "b" / "model.safetensors")
    assert {x.dtype for x in files.values()} == {dtype}


def test_without_the_v_head(tmp_path):
    network = trained()
    network.save_pretrained(tmp_path, v_head=False)
    assert not any("v_blocks" in name for name in load_file(tmp_path / "model.safetensors"))
    found = imf.load(tmp_path)
    assert torch.equal(found.generate([1], seed=0), network.generate([1], seed=0))
    with pytest.raises(UserError, match="the v-head was asked of a network whose weights are for sampling"):
        found(torch.zeros(1, 1, 8, 8), *torch.ones(5, 1), torch.tensor([1]), heads="v")
    found.save_pretrained(tmp_path / "again")
    assert torch.equal(imf.load(tmp_path / "again").generate([1], seed=0), network.generate([1], seed=0))


def test_generate_is_the_function_with_the_runs_settings():
    network = trained()
    labels = torch.tensor([3, 9, 10])
    noise = torch.randn((3, 1, 8, 8), generator=random.generator(5, "samples"))
    wanted = imf.generate(network, noise, labels, steps=2, omega=1.5, t_min=0.1, t_max=0.75)
    assert torch.equal(network.generate(labels, steps=2, seed=5), wanted)
    assert torch.allclose(network.generate(labels, steps=2, seed=5, batch_size=2), wanted, atol=1e-5)
    plain = imf.generate(network, noise, labels, omega=1.0)
    assert torch.equal(network.generate(labels, seed=5, omega=1.0, t_min=0.0, t_max=1.0), plain)
    assert not torch.allclose(network.generate(labels, seed=5), plain, atol=1e-3)
    named = network.generate(["three", "nine"], seed=5)
    assert torch.equal(named, network.generate([3, 9], seed=5))


def test_where_the_noise_comes_from():
    network = trained()
    a, b = (network.generate([1, 2], seed=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(a, b)
    torch.manual_seed(7)
    first, second = network.generate([1, 2]), network.generate([1, 2])
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    assert torch.equal(network.generate([1, 2]), first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": 3}, r"labels must be a list, one per image, got 3; pass \[3\]"),
        ({"labels": "three"}, r"labels must be a list.*pass \['three'\]"),
        ({"labels": ["eleven"]}, "labels must be one of zero, one, .*, got 'eleven'"),
        ({"labels": [11]}, r"labels must be within 0 and 10 \(no class\), got 11 to 11"),
        ({"labels": [0.5]}, r"labels must be \[N\] integers.*in torch.float32"),
        ({"labels": []}, "N at least 1"),
        ({"labels": [None]}, "labels must be integers or names of classes"),
        ({"labels": [[1]]}, r"labels must be \[N\] integers.*got \[1, 1\]"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"omega": 0.5}, "omega .* must be at least 1, got 0.5"),
        ({"t_min": 0.9}, r"t_max .* must be in \[t_min, 1\]"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
    ],
)
def test_bad_calls_of_generate(arguments, message):
    with pytest.raises(UserError, match=message):
        trained().generate(**{"labels": [1], **arguments})


def test_a_run_gives_its_settings_and_names(tmp_path):
    """From the data's index through the checkpoint to a folder; every reader draws the same images."""
    source = images(tmp_path / "images", classes=("cat", "dog"), broken=False)
    assert pack(source, tmp_path / "data") == 0
    options = {"data": tmp_path / "data", "runs": tmp_path / "runs", "name": "run", "steps": 1}
    options |= {"omega": 2.5, "t_min": 0.125, "t_max": 0.5, "batch_size": 4}
    assert train.main(arguments(**options)) == 0
    network = imf.load(tmp_path / "runs" / "run")
    assert network.sampling == Sampling(2.5, 0.125, 0.5, ("cat", "dog"))
    drawn = network.generate(["dog", "cat"], seed=3)
    assert torch.equal(drawn, network.generate([1, 0], omega=2.5, t_min=0.125, t_max=0.5, seed=3))
    with pytest.raises(UserError, match="run is the folder of a run: choose another"):
        network.save_pretrained(tmp_path / "runs" / "run")
    network.save_pretrained(tmp_path / "saved")
    assert torch.equal(imf.load(tmp_path / "saved").generate(["dog", "cat"], seed=3), drawn)
    with pytest.raises(UserError, match="averaged weights alone in it, got weights='model'"):
        imf.load(tmp_path / "saved", "model")

    # The programs read the folder as they read the run.
    for name in ("runs/run", "saved"):
        out = tmp_path / f"{name.replace('/', '-')}.png"
        assert sample.main(["--checkpoint", str(tmp_path / name), "--out", str(out), "--device", "cpu"]) == 0
    assert (tmp_path / "runs-run.png").read_bytes() == (tmp_path / "saved.png").read_bytes()
    options = {"data": tmp_path / "data", "runs": tmp_path / "more", "init_from": tmp_path / "saved"}
    assert train.main(arguments(**options, steps=1, batch_size=4, warmup_steps=0, lr=1e-30)) == 0
    begun = imf.load(tmp_path / "more" / "data", "model").state_dict()
    assert all(torch.allclose(begun[n], x, atol=1e-6) for n, x in network.state_dict().items())


def test_the_command_draws_what_generate_does():
    network = trained()
    picture = class_grid(network, columns=2, seed=4, classes=[1, 2], omega=1.5, t_min=0.1, t_max=0.75)
    images = network.generate([1, 1, 2, 2], seed=4)
    drawn = imf.sampling.draw_grid(images, 2, row_labels=["1", "2"])
    assert drawn.tobytes() == picture.tobytes()


CHANGES = {
    "another network": (lambda v: v["network"].update(hidden_size=32), "another network, or not whole"),
    "plain": (lambda v: v["network"].update(block="plain"), "another network, or not whole"),
    "deeper": (lambda v: v["network"].update(depth=4000), "depth must be at most the number of weights"),
    "absurd": (lambda v: v["network"].update(hidden_size=2**40), "hidden_size must be at most"),
    "no shape": (lambda v: v["network"].pop("depth"), "missing network.depth; unknown nothing"),
    "unknown": (lambda v: v["sampling"].update(steps=4), "missing nothing; unknown sampling.steps"),
    "more": (lambda v: v.update(more=1), "unknown more"),
    "format": (lambda v: v.update(format=2), "this version of imf reads format 1, got 2: use a newer imf"),
    "precision": (lambda v: v.update(precision="fp8"), "precision must be one of fp32, bf16, got 'fp8'"),
    "a list": (lambda v: v.update(precision=[]), "precision must be one of fp32, bf16"),
    "omega": (lambda v: v["sampling"].update(omega=0.5), "omega .* must be at least 1"),
    "text": (lambda v: v["sampling"].update(omega="2"), "omega must be a number, got '2'"),
    "names": (lambda v: v["sampling"].update(class_names=["a"]), "a name for each of 10 classes"),
    "network": (lambda v: v.update(network=3), "network must be names and values, got 3"),
    "digest": (lambda v: v.update(sha256="0"), "sha256 must be 64 hexadecimal digits"),
    "other weights": (lambda v: v.update(sha256="0" * 64), "damaged, or not the weights of config.json"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_configurations_that_do_not_fit(case, folder):
    change, message = CHANGES[case]
    changed(folder, change)
    with pytest.raises(UserError, match=message) as error:
        imf.load(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("text", ["", "[1]", '{"format": ', "[" * 100_000, '{"model_type": "bert"}', "\xff"])
def test_configurations_that_are_none(text, folder):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(
        UserError, match=r"config\.json: (not a readable JSON file|must be a JSON object|of another program)"
    ):
        imf.load(folder)


def test_files_that_are_missing(folder, tmp_path):
    (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"model\.safetensors: could not be read: No such file"):
        imf.load(folder)
    (tmp_path / "elsewhere").rename(folder / "model.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json in this folder"):
        imf.load(folder)
    with pytest.raises(UserError, match="no such folder; networks are read from local folders, from no hub"):
        IMF.from_pretrained("someone/imf-b-2")
    with pytest.raises(UserError, match=r"no such file or folder.*from no hub"):
        imf.load("someone/imf-b-2")


def test_damaged_weights_are_found_wherever_a_bit_flips(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for place in range(0, len(content), max(1, len(content) // 40)):
        flipped = bytearray(content)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
            imf.load(folder)
    path.write_bytes(content)
    imf.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("class_tokens"), "class_tokens: checkpoint has none"),
        (lambda x: x.update(more=torch.zeros(1)), "more: .*network has none"),
        (lambda x: x.update(class_tokens=torch.zeros(3, 3)), r"class_tokens: checkpoint \[3, 3\] float32"),
        (
            lambda x: x.update(class_tokens=x["class_tokens"].int()),
            r"must be one of .* torch\.int32",
        ),
        (lambda x: x["class_tokens"].fill_(float("nan")), "class_tokens must be finite"),
    ],
)
def test_weights_that_do_not_fit(change, message, folder):
    """With a right SHA-256, as another program would write them."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    changed(folder, lambda values: values.update(sha256=imf.io.sha256(path)))
    with pytest.raises(UserError, match=message) as error:
        imf.load(folder)
    assert str(path) in str(error.value)


def test_the_class_must_be_the_networks(folder):
    with pytest.raises(UserError, match="another network: DiT: block must be 'plain', got 'modern'"):
        DiT.from_pretrained(folder)
    trained("mf").save_pretrained(folder)
    with pytest.raises(UserError, match="another network: IMF: block must be 'modern', got 'plain'"):
        IMF.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda n: None, {"dtype": torch.float64}, "dtype must be one of .*, got torch.float64"),
        (lambda n: n.double(), {"dtype": torch.int8}, "dtype must be one of"),
        (lambda n: n.class_tokens.mul_(1e30), {"dtype": torch.float16}, "class_tokens must be finite in"),
        (lambda n: setattr(n, "compute_dtype", torch.float16), {}, "compute_dtype must be one of"),
        (lambda n: setattr(n, "sampling", Sampling(class_names=("a",))), {}, "each of 10 classes"),
    ],
)
def test_what_is_not_written(change, options, message, folder):
    """Nothing of the folder changes."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    network = trained()
    change(network)
    with pytest.raises(UserError, match=message):
        network.save_pretrained(folder, **options)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_guidance_that_is_no_input():
    network = trained("mf")
    network.sampling = dataclasses.replace(network.sampling, omega=2.0)
    with pytest.raises(UserError, match="omega must be 1, it is no input of this network, got 2"):
        network.generate([1])


def test_a_write_that_fails(folder):
    """The old folder stays as it is; no temporary file is left."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match=r"could not write the weights: .* needs [\d,]+ bytes"):
            trained().save_pretrained(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_process_killed_between_the_files_is_noticed(folder, tmp_path, monkeypatch):
    """New weights beside the old configuration are no network."""

    def killed(*arguments):
        raise KeyboardInterrupt

    other = trained()
    with torch.no_grad():
        other.class_tokens.add_(1)
    monkeypatch.setattr("imf.model.pretrained.write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        other.save_pretrained(folder)
    with pytest.raises(UserError, match=r"damaged, or not the weights of config\.json"):
        imf.load(folder)


def test_a_network_of_a_folder_trains_on(folder):
    """Its weights are its own: they neither lie in the file nor are without gradients for ever."""
    kept = (folder / "model.safetensors").read_bytes()
    network = imf.load(folder).requires_grad_(True)
    digits = data.load("digits")
    x, y = digits.images[:4], digits.labels[:4]
    loss = imf.improved_mean_flow(network, x, y, imf.Draws.sample(x, seed=0, step=0)).loss
    loss.backward()
    with torch.no_grad():
        for p in network.parameters():
            p.sub_(p.grad)
    assert (folder / "model.safetensors").read_bytes() == kept
    assert imf.load(folder).config == NETWORK

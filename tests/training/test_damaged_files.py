"""Files that come back damaged, foreign or absurd: each is refused by a message that names it."""

import dataclasses
import json
import os
import random
import shutil
import time
import zlib

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from imf import convert, evaluate, sample, train
from imf.data.prepare import __main__ as prepare
from imf.program import UserError
from imf.training import checkpoint
from tests.helpers.tiny_evaluation import network_file
from tests.helpers.tiny_run import (
    ALONE,
    NETWORK,
    arguments,
    config,
    differing,
    one_step,
    state_and_data,
    tensors,
)


@pytest.fixture(scope="module")
def state():
    state, batches, c = state_and_data()
    one_step(state, batches, c, ALONE)
    return state


@pytest.fixture(scope="module")
def content(state, tmp_path_factory):
    """A whole checkpoint's bytes."""
    path = tmp_path_factory.mktemp("whole") / "whole.safetensors"
    write(path, state)
    return path.read_bytes()


def write(path, state):
    environment = checkpoint.environment(torch.device("cpu"))
    about = checkpoint.Metadata(1, 1.5, config(), "fp32", environment)
    checkpoint.save(path, state, about)


def read(path, state):
    return checkpoint.restore(path, state)


def rewritten(path, content, change_tensors=lambda state: None, change_text=lambda values: None):
    """Write a checkpoint with other tensors or metadata; the checksum of the text is right again."""
    path.write_bytes(content)
    with safe_open(path, framework="pt") as file:
        values = json.loads(file.metadata()["imf"])
    tensors = {name: x.clone() for name, x in load_file(path).items()}
    change_tensors(tensors)
    change_text(values)
    text = json.dumps(values)
    save_file(tensors, path, {"imf": text, "crc32": f"{zlib.crc32(text.encode()):08x}"})
    return path


def test_a_bit_that_flips_anywhere_is_found(content, state, tmp_path):
    """In every part: length, header, its end, tensors of each kind."""
    path, draw = tmp_path / "flipped.safetensors", random.Random(0)
    header = 8 + int.from_bytes(content[:8], "little")
    places = [*range(8), *draw.sample(range(8, header), 80), *range(header - 8, header)]
    places += draw.sample(range(header, len(content)), 80)
    before = tensors(state)
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=r"flipped\.safetensors: "):
            read(path, state)
    assert differing(before, tensors(state)) == []
    path.write_bytes(content)
    read(path, state)


def test_a_reader_of_the_average_checks_the_average(content, tmp_path):
    """Zeros where the file system lost a block."""
    path = tmp_path / "lost.safetensors"
    path.write_bytes(content)
    header = int.from_bytes(content[:8], "little")
    start, _ = json.loads(content[8 : 8 + header])["ema.shared_blocks.0.qkv"]["data_offsets"]
    lost = bytearray(content)
    lost[8 + header + start : 8 + header + start + 512] = bytes(512)
    path.write_bytes(lost)
    with pytest.raises(UserError, match=r"damaged: checksum of 'ema' must be [0-9a-f]{8}, got"):
        checkpoint.load(path)
    checkpoint.load(path, "model")


@pytest.mark.parametrize(
    "name", ["model.class_tokens", "ema.u_final.norm", "optimizer.h_embedder.last.bias.exp_avg"]
)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite_are_neither_written_nor_read(name, value, content, state, tmp_path):
    kind = name.partition(".")[0]
    whole = tmp_path / "whole.safetensors"
    whole.write_bytes(content)
    groups = {group: {} for group in ("model", "ema", "optimizer")}
    for full, x in load_file(whole).items():
        group, _, rest = full.partition(".")
        groups[group][rest] = x.clone()
    groups[kind][name.partition(".")[2]].view(-1)[-1] = value
    out = tmp_path / "out.safetensors"
    with pytest.raises(UserError, match=f"not written: {name} must be finite"):
        checkpoint.save_network(out, groups, checkpoint.read_metadata(whole))
    assert list(tmp_path.iterdir()) == [whole]

    def spoil(tensors):
        tensors[name].view(-1)[-1] = value

    # With a right checksum, as a program that did not look would have written it.
    sums = {}
    spoiled = {f"{g}.{n}": x for g, part in groups.items() for n, x in part.items()}
    for full in sorted(spoiled):
        x, group = spoiled[full], full.partition(".")[0]
        form = f"{full} {list(x.shape)} {str(x.dtype).removeprefix('torch.')}"
        sums[group] = zlib.crc32(x.numpy().tobytes(), zlib.crc32(form.encode(), sums.get(group, 0)))
    checksums = {group: f"{crc:08x}" for group, crc in sums.items()}
    rewritten(out, content, spoil, lambda values: values.update(checksums=checksums))
    before = tensors(state)
    with pytest.raises(UserError, match=f"{name} must be finite, got NaN or infinity"):
        read(out, state)
    assert differing(before, tensors(state)) == []


ABSURD = {
    "hidden_size": 2**40,
    "depth": 10**12,
    "input_size": 2**28,
    "num_classes": 10**15,
    "num_heads": 10**400,
    "mlp_ratio": 1e300,
}


@pytest.mark.parametrize("name", ABSURD)
def test_networks_of_absurd_sizes_are_refused_before_they_are_made(name, content, tmp_path, capsys):
    path = tmp_path / "checkpoints" / "step-00000001.safetensors"
    path.parent.mkdir()
    rewritten(
        path, content, change_text=lambda values: values["config"]["network"].update({name: ABSURD[name]})
    )
    began = time.monotonic()
    for read_part in (checkpoint.read_metadata, checkpoint.load):
        with pytest.raises(UserError, match=r"step-00000001\.safetensors: .*(network|IMFConfig|version)"):
            read_part(path)
    assert train.main(["--resume", str(tmp_path)]) == 1
    assert str(path) in capsys.readouterr().err
    assert time.monotonic() - began < 10


def test_headers_of_absurd_sizes(content, tmp_path):
    path = tmp_path / "absurd.safetensors"
    header = json.dumps(
        {"ema.x": {"dtype": "F32", "shape": [10**12, 10**9], "data_offsets": [0, 4]}}
    ).encode()
    for start in (2**63, 2**60, 2**31, len(content)):
        path.write_bytes(start.to_bytes(8, "little") + content[8:])
        with pytest.raises(UserError, match=r"absurd\.safetensors: not a complete safetensors file"):
            checkpoint.read_metadata(path)
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    with pytest.raises(UserError, match=r"absurd\.safetensors: not a complete safetensors file"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format=5), "reads format 4, got 5: read it with the version that wrote it"),
        (lambda v: v.update(format=4.0), "reads format 4, got 4.0: "),
        (lambda v: v.update(more=1), "missing nothing; unknown more"),
        (lambda v: v.pop("autoencoder"), "missing autoencoder; unknown nothing"),
        (lambda v: v.update(class_names=["a"]), "class_names must be 10 texts, or none"),
        (lambda v: v.update(class_names=3), "class_names must be 10 texts, or none"),
        (lambda v: v.update(checksums=["x"]), "checksums must be texts by name"),
        (lambda v: v["checksums"].pop("model"), "checksum of 'model' must be None"),
        (lambda v: v["config"].pop("network"), "missing network"),
        (lambda v: v["environment"].update(threads="1000000"), "threads from 1 to 4096"),
        (lambda v: v.update(step="1" * 5000), "step must be an integer"),
        (lambda v: v.update(elapsed=10**400), "elapsed must be seconds"),
        (lambda v: v["config"].update(omega=1e308), "omega .* must be finite in fp32"),
        (lambda v: v["config"].update(omega=10**400), "omega .* must be finite in fp32"),
    ],
)
def test_metadata_of_other_versions(change, message, content, tmp_path, state):
    path = rewritten(tmp_path / "other.safetensors", content, change_text=change)
    with pytest.raises(UserError, match=message):
        read(path, state)


def test_neither_a_file_nor_there(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "link.safetensors").symlink_to("gone.safetensors")
    with pytest.raises(UserError, match=r"folder\.safetensors: a folder or a device, wanted a file"):
        checkpoint.read_metadata(tmp_path / "folder.safetensors")
    for function in (checkpoint.read_metadata, checkpoint.find):
        with pytest.raises(UserError, match=r"link\.safetensors: no such file.*a link to gone\.safetensors"):
            function(tmp_path / "link.safetensors")


@pytest.mark.parametrize("form", ["weights.pth", "weights.safetensors", "flax"])
def test_weights_of_other_programs_are_for_the_converter(form, tmp_path, capsys):
    source = tmp_path / form
    if form == "flax":
        (source / "checkpoint_7").mkdir(parents=True)
    elif form.endswith(".pth"):
        torch.save({"net.x": torch.zeros(3)}, source)
    else:
        save_file({"net.x": torch.zeros(3)}, source)
    assert train.main(arguments(runs=tmp_path / "runs", init_from=source)) == 1
    error = capsys.readouterr().err
    assert str(source) in error and "python -m imf.convert SOURCE OUT.safetensors" in error
    assert "elete" not in error and source.exists() and not (tmp_path / "runs").exists()
    assert sample.main(["--checkpoint", str(source), "--out", str(tmp_path / "grid.png")]) == 1
    assert "python -m imf.convert" in capsys.readouterr().err


TEXTS = {"nothing": "", "a list": "[1]", "half": '{"seed": ', "nested": "[" * 100_000}
ROWS = {
    "a figure of text": lambda v: v["rows"][0].update(fid="12"),
    "NaN": lambda v: v["rows"][0].update(fid=float("nan")),
    "an integer of 401 digits": lambda v: v["rows"][0].update(fid=10**400),
    "steps of another type": lambda v: v["rows"][0].update(steps=1.5),
    "no count": lambda v: v["rows"][0].update(count=None),
    "an unknown figure": lambda v: v["rows"][0].update(realism=1.0),
    "settings of another type": lambda v: v.update(settings=3),
}


@pytest.mark.parametrize(
    ("name", "case"),
    [*(("settings.json", case) for case in TEXTS), *(("results.json", case) for case in {**TEXTS, **ROWS})],
)
def test_results_and_settings_that_are_damaged(name, case, evaluated, tmp_path, capsys):
    """They are named and left as they are."""
    shutil.copytree(evaluated, tmp_path, dirs_exist_ok=True)
    path = next(tmp_path.rglob(name))
    if case in TEXTS:
        path.write_text(TEXTS[case])
    else:
        values = json.loads(path.read_text())
        ROWS[case](values)
        path.write_text(json.dumps(values))
    if name == "settings.json":
        (tmp_path / "out" / "results.json").unlink()
    kept = path.read_bytes()
    assert judge(tmp_path) == 1
    error = capsys.readouterr().err
    assert f"imf.evaluate: {path}: " in error and "choose an" in error
    assert path.read_bytes() == kept


def judge(folder):
    options = ["--checkpoint", folder / "network.safetensors", "--out", folder / "out", "--count", 4]
    options += ["--samples-dir", folder / "samples", "--extractor", "pixels", "--device", "cpu"]
    return evaluate.main([str(option) for option in options])


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    network_file(folder / "network.safetensors", dataclasses.replace(NETWORK, in_channels=3, num_classes=2))
    assert judge(folder) == 0
    return folder


def test_integers_in_the_place_of_floats(content, tmp_path, capsys):
    """10 ** 30 is more than 64 bits hold, and finite in fp32."""
    path, grid = tmp_path / "large.safetensors", tmp_path / "grid.png"
    rewritten(path, content, change_text=lambda values: values["config"].update(omega=10**30, t_min=0))
    assert sample.main(["--checkpoint", str(path), "--out", str(grid), "--columns", "1"]) == 0
    assert "omega 1e+30, interval [0, " in capsys.readouterr().out and grid.exists()


@pytest.mark.parametrize("omega", ["1e39", "inf", "nan"])
def test_guidance_that_fp32_does_not_hold(omega, evaluated, tmp_path, capsys):
    network = ["--checkpoint", str(evaluated / "network.safetensors"), "--omega", omega]
    judging = ["--count", "2", "--extractor", "pixels", "--device", "cpu", "--out", str(tmp_path / "out")]
    for main, more in ((sample.main, ["--out", str(tmp_path / "grid.png")]), (evaluate.main, judging)):
        assert main([*network, *more]) == 1
        assert "omega (--omega) must be finite in fp32, got " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("form", ["a FIFO", "a folder"])
@pytest.mark.parametrize("case", ["sample", "plot", "results", "statistics", "prepared", "convert"])
def test_what_is_no_regular_file_is_not_replaced(case, form, evaluated, tmp_path, capsys):
    """Said before the work begins, where a process that opened a FIFO would wait for ever."""
    target = tmp_path / f"target{'.safetensors' if case == 'convert' else '.npz'}"
    network, out = evaluated / "network.safetensors", tmp_path / "out"
    if case == "results":
        target = out / "results.json"
        out.mkdir()
    (os.mkfifo if form == "a FIFO" else os.mkdir)(target)
    images = tmp_path / "images" / "ant"
    images.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(images / "a.png")
    judging = ["--checkpoint", network, "--count", 2, "--extractor", "pixels", "--device", "cpu"]
    making = ["--extractor", "pixels", "--device", "cpu", "--make-statistics", images, target]
    packing = ["--pixels", "--size", 8, "--device", "cpu", "--extractor", "pixels", "--statistics", target]
    main, options = {
        "sample": (sample.main, ["--checkpoint", network, "--out", target]),
        "plot": (evaluate.main, [*judging, "--out", out, "--plot", target]),
        "results": (evaluate.main, [*judging, "--out", out]),
        "statistics": (evaluate.main, making),
        "prepared": (prepare.main, [images.parent, out, *packing]),
        "convert": (convert.main, ["--to", "official", network, target]),
    }[case]
    before, kind = sorted(tmp_path.rglob("*")), os.stat(target).st_mode
    try:
        status = main([str(option) for option in options])
    except SystemExit as stopped:
        status = stopped.code
    error = capsys.readouterr().err
    wanted = f"OUT exists already: {target}" if case == "convert" else f"must be a regular file, got {form}"
    assert status in (1, 2) and f"{target}" in error and wanted in error and "Traceback" not in error
    left = [path for path in sorted(tmp_path.rglob("*")) if path.name != ".lock"]
    assert left == before and os.stat(target).st_mode == kind

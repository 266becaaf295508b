"""Data that is damaged, or that was made to do harm: a message that names the file, never anything else."""

import json
import os
import random
import shutil
import sys

import numpy as np
import pytest
import torch

from imf import data, evaluate, train
from imf.data.prepare import __main__ as prepare
from imf.data.prepare.encoder import Encoder
from imf.data.prepare.form import Form
from imf.data.prepare.formats import find as find_in
from imf.data.prepare.pack import pack
from imf.data.prepare.source import Options
from imf.evaluation import fid
from imf.program import UserError
from tests.helpers import children, tiny_data, tiny_run
from tests.helpers.tiny_evaluation import Means, script


class Latents(Encoder):
    """A tiny encoder: mean and std of every value are 0.25 and 0.5."""

    kind, dtype, shape, row_shape = "latents", "float32", (4, 8, 8), (2, 4, 8, 8)
    about = {"mean": [0.0] * 4, "std": [1.0] * 4}  # noqa: RUF012

    def __call__(self, images):
        return np.full((len(images), *self.row_shape), [[[[[0.25]]], [[[0.5]]]]], np.float32)


def find(root, label_file=None):
    return find_in([root], Options(label_file))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    source = find(tiny_data.images(tmp_path_factory.mktemp("source"), broken=False))
    out = tmp_path_factory.mktemp("out")
    pack(source, out, Latents(), form=Form(8), batch_size=4, shard_size=4, workers=1)
    return out


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "folder")


def index_of(folder):
    return json.loads((folder / "index.json").read_text())


def put(folder, path, value):
    """Set the field of index.json that `path` leads to; `...` removes it."""
    index = index_of(folder)
    *inner, last = path
    place = index
    for name in inner:
        place = place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    (folder / "index.json").write_text(json.dumps(index))


FIELDS = [
    ("kind",), ("shape",), ("shape", 0), ("shape", 2), ("class_names",), ("class_names", 1), ("rows",),
    ("skipped",), ("labels_sha256",), ("encoder",), ("encoder", "mean"), ("encoder", "std"),
    ("encoder", "std", 3), ("encoder", "mean", 0), ("samples", "mean"), ("samples", "std", 1), ("shards",),
    ("shards", 1), ("shards", 0, "file"), ("shards", 0, "rows"), ("shards", 2, "bytes"),
    ("shards", 0, "sha256"), ("format",),
]  # fmt: skip
STRANGE = [..., None, True, -1, 0, 0.5, 10**30, -(10**400), float("nan"), float("inf"), 1e300]
STRANGE += ["", "\0", "é", "../" * 40, [], [[]], {}, {"rows": 1}, [None] * 3, [1e12] * 4, "x" * 100_000]


def test_any_field_of_the_index_may_be_anything(folder):
    """Refused by one short line that names the index, unless it is a value that may be there."""
    whole, said = (folder / "index.json").read_text(), set()
    for path in FIELDS:
        for value in STRANGE:
            if value is ... and path[-1] in (0, 1, 2, 3):
                continue
            (folder / "index.json").write_text(whole)
            put(folder, path, value)
            try:
                packed = data.load(folder)
            except UserError as error:
                text = str(error)
                assert text.startswith(str(folder)) and "\n" not in text and len(text) < 700, (path, value)
                said.add(path)
            else:  # another name, another constant, an unknown digest; what it stands for is still checked
                assert packed.num_classes == 2 and packed.shape == (4, 8, 8), (path, value)
    assert said == set(FIELDS)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ("shards", 1, "file"),
            "../other/shard-00001.npy",
            "name of a .npy file in this folder, got '../other",
        ),
        (("shards", 1, "file"), "/etc/passwd", "in this folder, got '/etc/passwd'"),
        (("shards", 1, "file"), "shard-00000.npy", r"shards must be of different files"),
        (("shards", 1, "rows"), "4", r"shards\[1\].rows must be a whole number from 1 on, got '4'"),
        (("shape",), "488", r"shape must be \[C, H, W\], got '488'"),
        (("class_names",), "ant", "class_names must be a list of names, got 'ant'"),
        (("class_names",), [], "class_names must be"),
        (("format",), True, "of format True, this version reads 1: make it again"),
        (("format",), 1.0, "of format 1.0, this version reads 1: make it again"),
        (("encoder", "std", 2), 0, "encoder.std must be positive"),
        (("encoder", "mean", 2), float("nan"), "encoder.mean must be a finite number for each of 4 channels"),
        (("rows",), ..., "rows must be a whole number from 1 on, got None"),
    ],
)
def test_what_the_message_says(folder, path, value, message):
    put(folder, path, value)
    with pytest.raises(UserError, match=rf"index\.json: .*{message}"):
        data.load(folder)


def test_an_index_of_endless_depth(folder):
    (folder / "index.json").write_text('{"format": ' + "[" * 200_000)
    with pytest.raises(UserError, match=r"index\.json: not a readable JSON file"):
        data.load(folder)


def with_header(path, shape, dtype="<f4", fortran=False):
    """The array file with another header of the same length."""
    content = path.read_bytes()
    header = f"{{'descr': {dtype!r}, 'fortran_order': {fortran}, 'shape': {shape}, }}"
    path.write_bytes(content[:10] + header.ljust(117).encode() + b"\n" + content[128:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: with_header(p, (4, 2, 4, 8, 8), fortran=True), "columns come first"),
        (lambda p: with_header(p, (4, 2, 4, 8, 8), "<f2"), r"got \[4, 2, 4, 8, 8\] float16"),
        (lambda p: with_header(p, (4, 2, 4, 8, 8), "|O"), r"got \[4, 2, 4, 8, 8\] object"),
        (lambda p: with_header(p, (10**15, 2, 4, 8, 8)), r"got \[1000000000000000, 2"),
        (lambda p: with_header(p, "(4, 2"), "not a whole .npy file"),
        (lambda p: p.write_bytes(p.read_bytes()[6:] + bytes(6)), "not a whole .npy file"),
    ],
)
def test_headers_that_lie(folder, damage, message):
    damage(folder / "shard-00000.npy")
    with pytest.raises(UserError, match=rf"shard-00000\.npy: .*{message}"):
        data.load(folder)


def test_shards_that_are_shorter_than_their_index_and_header_say(folder):
    """All three agree on the shape, index and disk on the size."""
    path = folder / "shard-00001.npy"
    path.write_bytes(path.read_bytes()[:-4096])
    put(folder, ("shards", 1, "bytes"), path.stat().st_size)
    with pytest.raises(UserError, match=r"must have 8,320 bytes, as its header says, got 4,224"):
        data.load(folder)


def test_labels_of_absurd_length_are_not_allocated(folder):
    with_header(folder / "labels.npy", (10**14,), "<i8")
    with pytest.raises(UserError, match=r"labels\.npy: must be \[10\] int64, .* got \[100000000000000\]"):
        data.load(folder)


def test_flipped_bytes_of_headers(folder):
    """NumPy's parser of headers fails in several ways, of which a caller sees one."""
    chance, path = random.Random(0), folder / "labels.npy"
    whole = path.read_bytes()
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(chance.choice((1, 2, 8))):
            content[chance.randrange(128)] = chance.choice(b"'\"{}[]()<>:,0189fiOL\n\\\0\xff")
        path.write_bytes(content)
        if content != whole:
            with pytest.raises(UserError, match=r"labels\.npy: "):
                data.load(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="FIFOs")
@pytest.mark.parametrize("name", ["index.json", "labels.npy", "shard-00002.npy"])
def test_a_fifo_is_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=name if name == "index.json" else f"{name}: .* got a FIFO"):
        data.load(folder)


def poison(folder, row, place, value):
    rows = np.load(folder / "shard-00001.npy")
    rows[(row, *place)] = value
    np.save(folder / "shard-00001.npy", rows)


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e38, 3e7])
@pytest.mark.parametrize("place", [(0, 3, 7, 7), (1, 0, 0, 0)])
def test_values_on_which_nothing_can_be_trained(folder, place, value):
    poison(folder, 2, place, value)
    packed = data.load(folder)
    fine = torch.tensor([0, 5, 7, 9])
    assert packed.fetch(fine, torch.Generator())[0].isfinite().all()
    with pytest.raises(UserError, match=r"shard-00001\.npy: row 2 must be finite and within 1e\+06"):
        packed.fetch(torch.tensor([5, 6, 9]), torch.Generator())


def test_the_commands_name_the_file(folder, tmp_path, capsys):
    """One line on standard error, and the exit status of an error."""
    training = ["--data", str(folder), "--runs", str(tmp_path / "runs"), *tiny_run.arguments(batch_size=20)]
    poison(folder, 1, (0, 0, 0, 0), np.nan)
    assert train.main(training) == 1
    said = capsys.readouterr().err
    assert "shard-00001.npy: row 1 must be finite" in said and "--lr" not in said and "Traceback" not in said
    assert prepare.main(["--verify", str(folder)]) == 1
    assert "shard-00001.npy: its SHA-256 must be" in capsys.readouterr().err
    put(folder, ("class_names",), {"ant": 0})
    script(Means(), tmp_path / "means.pt")
    judging = ["--extractor", str(tmp_path / "means.pt"), "--device", "cpu", "--make-statistics", str(folder)]
    for command, arguments in (
        (train.main, training),
        (prepare.main, ["--verify", str(folder)]),
        (evaluate.main, [*judging, str(tmp_path / "out.npz")]),
    ):
        assert command(arguments) == 1
        said = capsys.readouterr().err
        assert (
            "Traceback" not in said
            and "index.json: disagrees with itself or is damaged: class_names must be" in said
        )


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"[]",
        b'{"rows": 4, "skipped": []}',
        b'{"rows": 3, "skipped": [[99, "no"]], "file": "shard-00000.npy", "bytes": 1, "sha256": ""}',
        b'{"rows": 4, "skipped": [], "file": "../mine.npy", "bytes": 896, "sha256": ""}',
        b'{"rows": "4", "skipped": null}',
    ],
)
def test_a_damaged_record_costs_its_shard_alone(tmp_path, capsys, record):
    source, out, whole = tiny_data.images(tmp_path / "source"), tmp_path / "out", tmp_path / "whole"
    assert tiny_data.pack(source, whole) == 0
    assert children.run(tmp_path / "log", tiny_data.pack_until, 12, source, out) != 0
    (out / "records" / "00000.json").write_bytes(record)
    assert tiny_data.pack(source, out) == 0
    assert "records/00000.json: " in (said := capsys.readouterr().err) and "is made again" in said
    assert tiny_data.content(out) == tiny_data.content(whole)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0] * 9 + [10**12], r"0 \.\.\. 1000000000000 with none left out, got no image of label 1;"),
        ([0] * 9 + ["9" * 5000], r"labels must be 0, 1, 2 \.\.\. or names, got '9{76}\.\.\."),
        ([0] * 9 + [-1], r"or names, got '-1'"),
        ([0] * 9 + [1.0], r"or names, got '1.0'"),
        ([0] * 9 + ["1e12"], r"or names, got '1e12'"),
    ],
)
def test_labels_that_cannot_be(tmp_path, labels, message):
    images = tiny_data.images(tmp_path / "source")
    names = [name for name, _ in find(images).files]
    (tmp_path / "labels").write_text("".join(f"{n} {x}\n" for n, x in zip(names, labels, strict=True)))
    with pytest.raises(UserError, match=message):
        find(images, tmp_path / "labels")


def test_label_files_of_windows(tmp_path):
    images = tiny_data.images(tmp_path / "source")
    lines = [f"{name}\t{i % 2}\r\n" for i, (name, _) in enumerate(find(images).files)]
    (tmp_path / "labels").write_bytes("".join(lines).encode("utf-8-sig"))
    assert find(images, tmp_path / "labels").labels.tolist() == [0, 1] * 5
    (tmp_path / "labels").unlink()
    os.mkfifo(tmp_path / "labels")
    with pytest.raises(UserError, match="labels: must be a regular file, got a FIFO"):
        find(images, tmp_path / "labels")


def test_links_that_lead_nowhere(tmp_path):
    images = tiny_data.images(tmp_path / "source")
    (images / "cat").symlink_to(tmp_path / "unmounted")  # a class would be missing
    with pytest.raises(UserError, match="cat: a link to nothing; mend or remove it"):
        find(images)
    (images / "cat").unlink()
    (images / "ant" / "loop.png").symlink_to("loop.png")
    with pytest.raises(UserError, match=r"loop\.png: "):
        find(images)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_named(tmp_path, capsys):
    images = tiny_data.images(tmp_path / "source")
    (images / "ant" / "02.png").chmod(0)
    assert tiny_data.pack(images, tmp_path / "out") == 1
    assert "ant/02.png: could not be read" in capsys.readouterr().err


def test_out_in_source_and_shards_without_end(tmp_path, capsys):
    images = tiny_data.images(tmp_path / "source")
    assert tiny_data.pack(images, images / "packed") == 1
    assert f"packed: OUT must lie outside of SOURCE, {images}" in capsys.readouterr().err
    assert tiny_data.pack(images, tmp_path / "out", "--size", 10**9) == 1
    assert "--shard-size and --size: a shard of [4, 3, 1000000000, 1000000000] is" in capsys.readouterr().err
    assert tiny_data.pack(images, tmp_path / "out") == 0  # nothing was begun with that size


def test_names_that_are_no_text(tmp_path, capsys):
    """Bytes that are no UTF-8, in a folder's name and in a file's: in the lists as they are, said escaped."""
    if os.fsencode(tmp_path / "\udcff") != os.fsencode(tmp_path) + b"/\xff":
        pytest.skip("file names are not UTF-8 here")
    images = tiny_data.images(tmp_path / "\udcff")
    (images / "bee" / "04.png").rename(images / "bee" / "\udcfe.png")
    assert tiny_data.pack(images, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "\\udcff: 10 images" in said and "bee/\\udcfe.png: OSError" in said
    assert b"bee/\xfe.png\t" in (tmp_path / "out" / "skipped.tsv").read_bytes()


def statistics(path, **arrays):
    np.savez(path, **{"mu": np.zeros(3), "sigma": np.eye(3), **arrays})


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3) + 1j}, "mu must hold real numbers, got complex128"),
        ({"sigma": np.eye(3).astype(str)}, "sigma must hold real numbers, got <U"),
        ({"sigma": np.triu(np.ones((3, 3)))}, "covariance must be symmetric"),
        ({"sigma": -np.eye(3)}, "without a negative variance"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"mean must be \[D\]"),
        ({"mu": np.zeros(16_385, np.int8)}, r"mu must be of at most 16,384 features, got \[16385\]"),
        ({"sigma": np.full((3, 3), np.inf)}, "finite"),
    ],
)
def test_statistics_that_are_none(tmp_path, arrays, message):
    statistics(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=rf"a\.npz: no statistics can be read from it: .*{message}"):
        fid.load_statistics(tmp_path / "a.npz")


def test_statistics_that_are_no_archive(tmp_path):
    path = tmp_path / "a.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(UserError, match="not a zip file"):
        fid.load_statistics(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="must be a regular file, got a FIFO"):
        fid.load_statistics(path)
    with pytest.raises(UserError, match="must be a regular file, got a folder"):
        fid.load_statistics(tmp_path)


def test_statistics_of_absurd_size_are_not_allocated(tmp_path):
    """A few bytes whose header speaks of 8 TB."""
    import zipfile

    np.save(tmp_path / "a.npy", np.zeros((3, 3)))
    with_header(tmp_path / "a.npy", (10**6, 10**6), "<f8")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name in ("mu", "sigma"):
            archive.write(tmp_path / "a.npy", f"{name}.npy")
    with pytest.raises(UserError, match=r"at most 16,384 features, got \[1000000, 1000000\]"):
        fid.load_statistics(tmp_path / "a.npz")


def test_logits_that_are_no_numbers():
    """A probability of exactly 0 has one, NaN has none."""
    sure = torch.eye(4).repeat(5, 1).log()
    assert fid.inception_score(sure, splits=1)[0] == pytest.approx(4)
    with pytest.raises(ValueError, match="logits must be numbers, got NaN"):
        fid.inception_score(sure * 0)


@pytest.mark.parametrize(
    "change",
    [{"block_out_channels": "abc"}, {"norm_num_groups": 0}, {"act_fn": [1]}, {"down_block_types": []}],
)
def test_autoencoders_whose_configuration_is_damaged(tmp_path, capsys, change):
    pytest.importorskip("diffusers", reason="the autoencoder is diffusers'")
    images = tiny_data.images(tmp_path / "source", broken=False)
    config = tiny_data.autoencoder(tmp_path / "vae") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    folders = [str(images), str(tmp_path / "out"), "--vae", str(tmp_path / "vae")]
    assert prepare.main([*folders, "--size", "32", "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    reasons = ("no AutoencoderKL can be read from it: ", "fails on images [10, 3, 32, 32]: ")
    assert any(f"{tmp_path / 'vae'}: {reason}" in said for reason in reasons) and "Traceback" not in said

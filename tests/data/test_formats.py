"""Every form of files gives the same packed data; what is wrong with one is said with the way out."""

import io
import json
import re
import shutil
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from imf import data
from imf.data.prepare import __main__ as prepare
from imf.data.prepare.form import Form
from imf.data.prepare.formats import find
from imf.data.prepare.source import Options
from imf.program import UserError
from tests.helpers import image_files
from tests.helpers.image_files import COLOUR, GREY, LABELS, NAMES, png

OPTIONS = ("--pixels", "--shard-size", "5", "--batch-size", "4", "--workers", "2")


def pack(*arguments):
    return prepare.main([*map(str, arguments), *OPTIONS])


def split(command):
    """SOURCE ... and options."""
    at = next((i for i, x in enumerate(command) if str(x).startswith("--")), len(command))
    return command[:at], command[at:]


@pytest.mark.parametrize("images", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("form", image_files.FORMS, ids=lambda form: form.__name__)
def test_every_form_gives_the_same_data(form, images, tmp_path, capsys):
    if form in image_files.TABLES:
        pytest.importorskip("pyarrow", reason="tables need pyarrow")
    (tmp_path / "source").mkdir()
    sources, options = split(form(tmp_path / "source", images))
    out = tmp_path / "out"
    assert pack(*sources, out, *options, "--class-names", ",".join(NAMES)) == 0
    packed = data.load(out)
    expected = torch.from_numpy(images.reshape(12, 6, 6, -1)).permute(0, 3, 1, 2)
    assert packed.shape == expected.shape[1:] and packed.class_names == list(NAMES)
    assert torch.equal(packed.images(torch.arange(12)), expected)
    assert packed.labels.tolist() == LABELS.tolist() and packed.index["skipped"] == 0
    assert len((out / "files.txt").read_text().splitlines()) == 12
    said = capsys.readouterr().out
    assert "12 images in 3 classes" in said and f"12 pixels {list(packed.shape)} of 3 classes" in said
    assert pack(*sources, out, *options, "--class-names", ",".join(NAMES)) == 0  # whole already


@pytest.mark.parametrize(
    ("form", "names"),
    [
        (image_files.class_folders, NAMES),
        (image_files.npz, NAMES),
        (image_files.idx, ("0", "1", "2")),
        (image_files.tar_txt, NAMES),
        (image_files.tar_json, ("0", "1", "2")),
        (image_files.parquet, NAMES),
        (image_files.arrow_splits, NAMES),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_images_are_read_by_number_under_their_own_class_names(form, names, tmp_path):
    """From the middle on, as a preparation that resumes does."""
    if form in image_files.TABLES:
        pytest.importorskip("pyarrow", reason="tables need pyarrow")
    sources, _ = split(form(tmp_path, GREY))
    source = find(sources)
    assert source.class_names == list(names)
    places = [11, 7, 3, 8]
    for place, pixels in zip(places, source.decoded(places, Form(6, 1), 3, ahead=4), strict=True):
        assert np.array_equal(pixels[0], GREY[place])
    assert source.survey(sized=True, workers=2) == (1, (6, 6))


def test_splits_that_are_not_read_are_said(tmp_path, capsys):
    image_files.idx(tmp_path, GREY)
    assert pack(tmp_path, tmp_path.parent / "out-idx") == 0
    said = capsys.readouterr().out
    assert "2 others are left out" in said and "t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte" in said
    files = [tmp_path / f"t10k-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
    assert pack(*files, tmp_path.parent / "out-test", "--class-names", "ant,bee") == 0
    assert len(data.load(tmp_path.parent / "out-test")) == 2


def test_unconditional(tmp_path, capsys):
    sources, _ = split(image_files.flat(tmp_path, GREY))
    assert pack(*sources, tmp_path / "flat-out") == 0
    assert "12 images in one class, all" in capsys.readouterr().out
    (tmp_path / "arrays").mkdir()
    sources, _ = split(image_files.npy(tmp_path / "arrays", GREY))
    assert pack(*sources, tmp_path / "npy-out", "--class-names", "ant,bee") == 1
    assert "--class-names must be 1 names, one per class (all), got 2" in capsys.readouterr().err
    for number, form in enumerate((image_files.npz, image_files.idx, image_files.tar_cls)):
        (source := tmp_path / f"{number}").mkdir()
        sources, _ = split(form(source, GREY))
        assert pack(*sources, tmp_path / f"{number}-out", "--unconditional") == 0
        packed = data.load(tmp_path / f"{number}-out")
        assert packed.class_names == ["all"] and packed.labels.tolist() == [0] * 12


def test_sizes_and_channels(tmp_path, capsys):
    """The images' own where they are alike; else what is asked for, cropped or padded."""
    folder = tmp_path / "a"
    folder.mkdir()
    wide = np.stack([GREY[0], GREY[1]], axis=1).reshape(6, 12)
    Image.fromarray(wide).save(folder / "wide.png")
    assert pack(tmp_path / "a", tmp_path / "out") == 1
    assert "--size is needed where images are not squares of one size, got wide.png of 12 x 6" in said(capsys)
    assert pack(tmp_path / "a", tmp_path / "crop", "--size", "6") == 0
    assert np.array_equal(data.load(tmp_path / "crop").images(torch.arange(1))[0, 0], wide[:, 3:9])
    assert (
        pack(tmp_path / "a", tmp_path / "pad", "--size", "12", "--fit", "pad", "--background", "#808080") == 0
    )
    padded = data.load(tmp_path / "pad").images(torch.arange(1))[0, 0].numpy()
    assert np.array_equal(padded[3:9], wide) and (padded[:3] == 128).all() and (padded[9:] == 128).all()
    Image.fromarray(COLOUR[0]).save(folder / "x.png")
    (tmp_path / "b").mkdir()
    Image.fromarray(COLOUR[0]).save(tmp_path / "b" / "x.png")
    Image.fromarray(GREY[0, :5, :5]).save(tmp_path / "b" / "y.png")
    assert pack(tmp_path / "b", tmp_path / "out") == 1
    assert "got x.png of 6 x 6 and y.png of 5 x 5 pixels; --size 64" in said(capsys)
    assert pack(tmp_path / "a", tmp_path / "both", "--size", "6") == 0
    assert data.load(tmp_path / "both").shape == (3, 6, 6)  # grey among colour
    assert pack(tmp_path / "a", tmp_path / "grey", "--size", "6", "--channels", "1") == 0
    luma = np.asarray(Image.fromarray(COLOUR[0]).convert("L"))
    assert np.array_equal(data.load(tmp_path / "grey").images(torch.arange(2))[1, 0], luma)


def test_transparency_is_composed_or_refused(tmp_path, capsys):
    alpha = np.tile(np.array([0, 255, 51], np.uint8), (6, 2))
    (tmp_path / "a").mkdir()
    Image.fromarray(np.dstack([COLOUR[0], alpha])).save(tmp_path / "a" / "a.png")
    Image.fromarray(np.dstack([GREY[0], alpha])).save(tmp_path / "a" / "b.png")
    Image.fromarray(np.dstack([COLOUR[1], np.full((6, 6), 255, np.uint8)])).save(tmp_path / "a" / "c.png")
    assert pack(tmp_path / "a", tmp_path / "out") == 0
    found = said(capsys, "out")
    assert "2 images skipped" in found and "a.png: transparent pixels: --background COLOUR composes" in found
    assert np.array_equal(
        data.load(tmp_path / "out").images(torch.arange(1))[0], COLOUR[1].transpose(2, 0, 1)
    )
    assert pack(tmp_path / "a", tmp_path / "white", "--background", "white") == 0
    rows = data.load(tmp_path / "white").images(torch.arange(3)).permute(0, 2, 3, 1).double().numpy()
    for row, pixels in zip(rows, (COLOUR[0], GREY[0][..., None]), strict=False):
        share = alpha[..., None] / 255
        assert np.abs(row - (share * pixels + (1 - share) * 255)).max() < 1
    assert pack(tmp_path / "a", tmp_path / "white", "--background", "black") == 1
    assert "background was [255, 255, 255], now it is [0, 0, 0]" in said(capsys)


def said(capsys, stream="err"):
    return getattr(capsys.readouterr(), stream)


def write_npz(**arrays):
    def write(root):
        np.savez(root / "a.npz", **arrays)
        return [root / "a.npz"]

    return write


def write_npy(images, labels=None):
    def write(root):
        np.save(root / "x.npy", images)
        if labels is None:
            return [root / "x.npy"]
        np.save(root / "y.npy", labels)
        return [root / "x.npy", "--labels", root / "y.npy"]

    return write


def write_idx(**files):
    def write(root):
        for name, content in files.items():
            (root / name.replace("_", "-")).write_bytes(content)
        return [root]

    return write


def write_tar(*members, mode="w"):
    def write(root):
        with tarfile.open(root / "a.tar", mode) as file:
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
        return [root / "a.tar"]

    return write


def truncated(form, name):
    def write(root):
        command = form(root, GREY)
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[: len(content) // 2])
        return command

    return write


def with_options(form, *options):
    return lambda root: [*form(root, GREY), *options]


def both(root):
    image_files.tar_cls(root, GREY)
    (root / "sub").mkdir()
    image_files.class_folders(root / "sub", GREY)
    return [root]


def several(root):
    image_files.npz(root, GREY)
    image_files.tar_cls(root, GREY)
    return [root / "a.npz", root / "train-0.tar"]


def one_image(root):
    (root / "a.png").write_bytes(png(GREY[0]))
    return [root / "a.png"]


IMAGES, ONE = image_files.idx_bytes(GREY), png(GREY[0])
BYTES = LABELS.astype(np.uint8)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda root: [root / "nowhere"],
            "nowhere: no such file or folder; SOURCE must be a folder of images",
        ),
        (one_image, "a.png: SOURCE must be .* got an image; name its folder"),
        (several, "SOURCE must be files of one form, got .*a.npz and .*train-0.tar"),
        (lambda root: [root, root], "SOURCE must be one folder, or files of one form, got the folder"),
        (both, "must hold images or files of images, got both, .* name these files as SOURCE"),
        (with_options(image_files.idx, "--label-key", "y"), "--label-key is not for IDX files; leave it out"),
        (
            with_options(image_files.class_folders, "--image-key", "x"),
            "--image-key is not for a folder of images",
        ),
        (
            with_options(image_files.npy, "--unconditional"),
            "--unconditional reads no labels: leave --labels out",
        ),
        (
            with_options(image_files.class_folders, "--class-names", "a,b"),
            r"must be 3 names, .*\(ant, bee, cat\)",
        ),
        (
            with_options(image_files.idx, "--class-names", "a,b"),
            "labels must be below the 2 class names, got 2",
        ),
        (
            with_options(image_files.idx, "--class-names", "a,b,a"),
            "must be different names, none of them empty",
        ),
        (
            with_options(image_files.idx, "--class-names", "names.txt"),
            "names between commas, or a file with a",
        ),
        (write_npz(z=GREY), "must hold images in an array x or .* got z; --image-key NAME says"),
        (write_npz(x=GREY), "must hold labels in an array y, got x; --label-key NAME .* --unconditional"),
        (write_npz(x=GREY, y=LABELS[:5]), "must have a label for each of 12 images, got 5"),
        (write_npz(x=GREY, y=np.eye(3)[LABELS]), r"labels must be \[N\], got \[12, 3\]; one-hot\?"),
        (write_npz(x=GREY, y=LABELS / 1), "labels must be integers or texts, got float64"),
        (write_npz(x=GREY, y=LABELS - 1), "labels must be at least 0, got -1, as in a test split"),
        (write_npz(x=GREY, y=LABELS * 2), "0 ... 4 with none left out, got no image of label 1; number them"),
        (write_npz(x=GREY, y=np.array([1, "a"], object)), "a pickle; objects are not unpickled"),
        (write_npz(x=GREY / 255, y=LABELS), r"must be uint8, got float64; store \(255 \* x\)"),
        (write_npz(x=GREY.astype(int), y=LABELS), r"must be uint8, got int64; store x.astype"),
        (write_npz(x=GREY.reshape(12, -1), y=LABELS), r"got \[12, 36\]; flat rows\? Reshape"),
        (write_npz(x=COLOUR.transpose(0, 3, 1, 2), y=LABELS), r"got \[12, 3, 6, 6\]; channels first\?"),
        (write_npz(x=GREY[:0], y=LABELS[:0]), r"must have pixels, got \[0, 6, 6\]"),
        (
            write_npz(x=GREY[:, :4], y=LABELS),
            "--size is needed where .* x.* of 6 x 4 pixels|a.npz:0 of 6 x 4",
        ),
        (truncated(image_files.npz, "a.npz"), "a.npz: no whole NumPy file of plain arrays"),
        (write_npy(GREY, LABELS[:7]), "must have a label for each of 12 images, got 7"),
        (write_npy(np.array([None])), "x.npy: no whole NumPy file .* a pickle; objects are not unpickled"),
        (
            with_options(lambda r, x: write_npy(x)(r), "--labels", "y.txt"),
            "--labels must be a .npy file .* y.txt",
        ),
        (
            write_idx(train_images_idx3_ubyte=IMAGES),
            "must have its labels in train-labels-idx1-ubyte beside it",
        ),
        (write_idx(train_labels_idx1_ubyte=image_files.idx_bytes(BYTES)), "must be images, got labels alone"),
        (
            write_idx(a_images_ubyte=IMAGES, a_labels_ubyte=image_files.idx_bytes(BYTES[:5])),
            "a-labels-ubyte: must have labels of the 12 images in a-images-ubyte, got 5",
        ),
        (
            write_idx(a_images_ubyte=IMAGES[:100]),
            r"must have 448 bytes for \[12, 6, 6\], got 100: is it whole",
        ),
        (write_idx(a_images_ubyte=b"<html>404"), "a-images-ubyte: must be an IDX file, .* got another"),
        (write_idx(a_images_ubyte=b"\x1f\x8b\x08"), "a-images-ubyte: could not be read: .* is it whole"),
        (write_idx(a_ubyte=b"\0\0\x0d\3" + bytes(8)), "must have 3 sizes, got an end of the file"),
        (
            write_tar(("a.png", ONE)),
            "every image must have a label beside it in .cls, .json, .txt .* such as a",
        ),
        (write_tar(("a.png", ONE), ("a.jpg", ONE)), "sample a must have one image, got .*a.png and a.jpg"),
        (write_tar(("a.png", ONE), ("a.txt", b"an ant,\nand a bee")), r"a caption\? --unconditional trains"),
        (write_tar(("a.png", ONE), ("a.json", b"{")), "a.json: a label must be text in UTF-8, or JSON, got"),
        (
            write_tar(("a.png", ONE), ("a.json", b'{"label": [1]}')),
            r"must be an integer or a text, got \[1\]",
        ),
        (write_tar(("a.png", ONE), ("a.cls", b"\xff")), "a.cls: a label must be text in UTF-8"),
        (write_tar(("a.png", ONE), ("a.cls", b"1")), "0 ... 1 with none left out, got no image of label 0"),
        (
            write_tar(("a.cls", b"0")),
            "must hold files that end in an image's extension, such as jpg, got none",
        ),
        (write_tar(("a.png", ONE), ("a.cls", b"0"), mode="w:gz"), "without compression, .* gunzip it"),
        (truncated(image_files.tar_cls, "train-0.tar"), "train-0.tar: "),
    ],
)
def test_wrong_sources_are_named(write, message, tmp_path, capsys):
    (tmp_path / "source").mkdir()
    sources, options = split(write(tmp_path / "source"))
    assert pack(*sources, tmp_path / "out", *options) == 1
    found = said(capsys)
    assert "Traceback" not in found
    assert re.search(message, found), found
    assert not (tmp_path / "out" / "index.json").exists()


def write_parquet(**columns):
    def write(root):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(columns), root / "a.parquet")
        return [root / "a.parquet"]

    return write


def put(form, name, content):
    def write(root):
        command = form(root, GREY)
        (root / name).write_text(content)
        return command

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_parquet(image=[ONE] * 2), "must have a column label, got image .binary.; --label-key NAME"),
        (
            write_parquet(a=[ONE], b=[ONE], label=[0]),
            "one column of images as bytes, got 2 among a .binary., b",
        ),
        (
            write_parquet(image=["a.png"], label=[0]),
            "one column of images as bytes, got 0 among image .string.",
        ),
        (write_parquet(image=[ONE] * 2, label=[0, None]), "every row must have a label, got none for 1 of 2"),
        (write_parquet(image=[ONE] * 2, label=[0.5, 1.5]), "labels must be integers or texts, got float64"),
        (truncated(image_files.parquet, "data/train-00000-of-00002.parquet"), "not a whole table"),
        (truncated(image_files.arrow, "data-00001-of-00002.arrow"), "not a whole table|none of the"),
        (put(image_files.arrow, "state.json", "{}"), "state.json: must name files of this folder, got None"),
        (
            put(image_files.arrow, "state.json", json.dumps({"_data_files": [{"filename": "../../secret"}]})),
            "state.json: must name files of this folder, got .*secret",
        ),
        (put(image_files.arrow_splits, "dataset_dict.json", '{"splits": []}'), "must name splits, got"),
        (
            put(image_files.arrow_splits, "dataset_dict.json", '{"splits": ["a", "b"]}'),
            "must have one split with train in its name, got a, b; name the folder of one",
        ),
    ],
)
def test_wrong_tables_are_named(write, message, tmp_path, capsys):
    pytest.importorskip("pyarrow", reason="tables need pyarrow")
    test_wrong_sources_are_named(write, message, tmp_path, capsys)


def test_tables_without_pyarrow(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert pack(tmp_path / "a.parquet", tmp_path / "out") == 1
    assert "a.parquet: tables need pyarrow: pip install -e '.[data]'" in said(capsys)


def test_rows_without_bytes_are_skipped(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="tables need pyarrow")
    from pyarrow import parquet

    rows = [{"bytes": ONE, "path": ""}, {"bytes": None, "path": "/a.png"}, None]
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    table = pyarrow.table({"image": pyarrow.array(rows, kind), "label": [0, 0, 0]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert pack(tmp_path / "a.parquet", tmp_path / "out") == 0
    assert (tmp_path / "out" / "skipped.tsv").read_text().splitlines() == [
        "a.parquet:1\tonly the path of a file, not its bytes, is in the table",
        "a.parquet:2\tno value",
    ]


def test_a_tar_that_shrinks_is_no_broken_image(tmp_path, capsys):
    image_files.tar_cls(tmp_path, GREY)
    source = find([tmp_path], Options())
    path = tmp_path / "train-1.tar"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"deep/11\.png: could not be read: train-1\.tar has become shorter"):
        list(source.decoded([11], Form(6, 1), 1, ahead=1))


def test_both_forms_of_a_gzipped_file_are_one(tmp_path):
    """As torchvision leaves them."""
    image_files.idx(tmp_path, GREY)
    (tmp_path / "packed").mkdir()
    image_files.idx_gzipped(tmp_path / "packed", GREY)
    for path in (tmp_path / "packed").iterdir():
        shutil.move(path, tmp_path)
    (tmp_path / "packed").rmdir()
    assert len(find([tmp_path]).files) == 12


@pytest.mark.parametrize(
    "form",
    [x for x in image_files.FORMS if x not in image_files.TABLES and x is not image_files.npy],
    ids=lambda form: form.__name__,
)
def test_training_on_raw_images_says_how_to_pack_them(form, tmp_path):
    sources, _ = split(form(tmp_path, GREY))
    for path in sources:
        with pytest.raises(
            UserError, match=rf"holds raw images; .* imf\.data\.prepare {path} .*-packed --pixels"
        ):
            data.load(path)

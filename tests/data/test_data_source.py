"""Image folders: which files and labels there are, and the crop of ADM."""

import numpy as np
import pytest
from PIL import Image

from imf.data.prepare.form import Form, center_crop
from imf.data.prepare.formats import find as find_in
from imf.data.prepare.source import Options
from imf.images import BrokenImage, decode
from imf.program import UserError
from tests.helpers import tiny_data


def find(root, label_file=None):
    return find_in([root], Options(label_file))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny_data.images(tmp_path_factory.mktemp("source"))


def test_center_crop():
    """A step of each kind by hand: halved by averages while twice too large, bicubic, cut in the centre."""
    exact = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    assert np.array_equal(center_crop(Image.fromarray(exact), 4), exact[:, 1:5].transpose(2, 0, 1))
    odd = np.arange(4 * 7 * 3, dtype=np.uint8).reshape(4, 7, 3)  # 3 columns too many: 1 before, 2 after
    assert np.array_equal(center_crop(Image.fromarray(odd), 4), odd[:, 1:5].transpose(2, 0, 1))
    rng = np.random.default_rng(0)
    large = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)  # 16 -> 8 -> 4: twice halved, nothing bicubic
    halved = large
    for axis in (1, 0, 1, 0):  # Pillow rounds after each direction
        pairs = halved.take(range(0, halved.shape[axis], 2), axis).astype(int)
        halved = ((pairs + halved.take(range(1, halved.shape[axis], 2), axis) + 1) // 2).astype(np.uint8)
    assert np.array_equal(center_crop(Image.fromarray(large), 4), halved.transpose(2, 0, 1))
    tall = Image.fromarray(rng.integers(0, 256, (50, 30, 3), dtype=np.uint8))  # 30 < 2 · 16: bicubic alone
    expected = np.asarray(tall.resize((16, 27), Image.Resampling.BICUBIC))[5:21]
    assert np.array_equal(center_crop(tall, 16), expected.transpose(2, 0, 1))
    assert center_crop(Image.fromarray(exact), 64).shape == (3, 64, 64)  # smaller images grow


def test_grey_and_transparent_images_become_rgb(tmp_path):
    for mode in ("L", "LA", "P", "RGBA", "CMYK", "1"):
        path = tmp_path / f"a.{'tif' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (9, 9)).save(path)
        assert Form(8, background=(0, 0, 0))(decode(path.read_bytes())).shape == (3, 8, 8)
    with pytest.raises(BrokenImage):
        decode(b"\x89PNG\r\n\x1a\n")


def test_class_folders_and_imagenet_trees(images, tmp_path):
    found = find(images)
    assert found.class_names == ["ant", "bee"] and found.labels.tolist() == [0] * 5 + [1] * 5
    assert [name for name, _ in found.files[4:6]] == ["ant/04.png", "bee/00.png"]
    (tmp_path / "val").symlink_to(images / "bee")
    (tmp_path / "train").symlink_to(images)
    tree = find(tmp_path)
    assert tree.root == tmp_path / "train" and tree.fingerprint() == found.fingerprint()
    (tmp_path / "car").symlink_to(images / "ant")  # a class beside it: now train is a class too
    assert find(tmp_path).class_names == ["car", "train", "val"]


@pytest.mark.parametrize("separator", ["\t", ",", " "])
def test_label_file(images, tmp_path, separator):
    names = [name for name, _ in find(images).files]
    path = tmp_path / "labels"
    path.write_text("".join(f"{name}{separator}{i % 3}\n" for i, name in enumerate(names)))
    assert find(images, path).labels.tolist() == [i % 3 for i in range(10)]
    path.write_text("".join(f"{name}{separator}{'ba'[i % 2]}\n" for i, name in enumerate(names)))
    assert find(images, path).class_names == ["a", "b"] and find(images, path).labels.tolist() == [1, 0] * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[1:], r"1 images have no label in .* such as ant/00\.png"),
        (lambda lines: [*lines, "cat/00.png 1"], r"1 labels have no image in .* such as cat/00\.png"),
        (
            lambda lines: [*lines, "ant/00.png 1"],
            r"line 11 gives ant/00\.png the label 1, a line before it 0",
        ),
        (lambda lines: [*lines[:-1], "bee/04.png"], r"line 10 must be `file label`, got 'bee/04\.png'"),
        (lambda lines: [line.replace(" 0", " 2") for line in lines], "got no image of label 0"),
    ],
)
def test_label_files_that_disagree(images, tmp_path, change, message):
    lines = [
        f"{name} {label}" for (name, _), label in zip(find(images).files, find(images).labels, strict=True)
    ]
    (tmp_path / "labels").write_text("\n".join(change(lines)))
    with pytest.raises(UserError, match=message):
        find(images, tmp_path / "labels")


def test_sources_that_are_none(images, tmp_path):
    for path, message in (
        (tmp_path / "nowhere", "no such file or folder; SOURCE must be"),
        (tmp_path, "a folder of images per class, got none; files .* are named themselves"),
    ):
        with pytest.raises(UserError, match=message):
            find(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: must hold images, one class per folder, got none"):
        find(tmp_path)
    (tmp_path / "empty" / "again").symlink_to(tmp_path / "empty")
    with pytest.raises(UserError, match="a link to a folder that is met already"):
        find(tmp_path)


def test_an_image_that_cannot_be_read_is_no_broken_image(images, tmp_path, capsys):
    """A disk that fails, or a file that is gone: an error, not an image less."""
    source = find(images)
    (images / "ant" / "00.png").rename(images / "ant" / "gone")
    try:
        with pytest.raises(UserError, match=r"ant/00\.png: could not be read: .* there when this began"):
            list(source.decoded(range(3), Form(8), 1, ahead=1))
    finally:
        (images / "ant" / "gone").rename(images / "ant" / "00.png")

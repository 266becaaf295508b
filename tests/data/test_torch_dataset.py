"""A `torch.utils.data.Dataset` becomes a data set in memory, or the error names the wrong item."""

import numpy as np
import pytest
import torch
from PIL import Image

from imf import data
from imf.data import torch_dataset
from imf.program import UserError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 4, 4), np.uint8)
COLOUR = RNG.integers(0, 256, (6, 4, 4, 3), np.uint8)
LABELS = [0, 2, 1, 2, 0, 1]
FLOATS = torch.from_numpy(COLOUR).permute(0, 3, 1, 2).float() / 127.5 - 1


class Pairs(torch.utils.data.Dataset):
    """A map-style data set without __iter__, as people write them."""

    def __init__(self, items, **attributes):
        self.items = list(items)
        vars(self).update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ([Image.fromarray(x) for x in GREY], GREY[:, None]),
        ([Image.fromarray(x) for x in COLOUR], COLOUR.transpose(0, 3, 1, 2)),
        ([Image.fromarray(x).convert("RGBA") for x in COLOUR], COLOUR.transpose(0, 3, 1, 2)),  # opaque
        (GREY, GREY[:, None]),
        (GREY[..., None], GREY[:, None]),
        (GREY[:, None], GREY[:, None]),
        (COLOUR, COLOUR.transpose(0, 3, 1, 2)),
        (COLOUR.transpose(0, 3, 1, 2), COLOUR.transpose(0, 3, 1, 2)),
        (torch.from_numpy(GREY), GREY[:, None]),
        (torch.from_numpy(COLOUR).permute(0, 3, 1, 2), COLOUR.transpose(0, 3, 1, 2)),
    ],
)
def test_images_of_every_form_are_the_same_bytes(images, expected):
    found = data.from_dataset(Pairs(zip(images, LABELS, strict=True)))
    assert found.images.dtype == torch.uint8 and np.array_equal(found.images, expected)
    assert found.shape == expected.shape[1:] and len(found) == 6
    x, y = found.fetch(torch.tensor([3, 1]), torch.Generator())
    assert torch.equal(x, (torch.tensor(expected[[3, 1]]).float() - 127.5) / 127.5) and y.tolist() == [2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_floats_stay_floats(dtype):
    found = data.from_dataset(torch.utils.data.TensorDataset(FLOATS.to(dtype), torch.tensor(LABELS)))
    assert found.images.dtype == torch.float32 and torch.equal(found.images, FLOATS.to(dtype).float())
    x, _ = found.fetch(torch.tensor([5]), torch.Generator())
    assert torch.equal(x, found.images[5:])


@pytest.mark.parametrize("kind", [int, np.int64, torch.tensor, lambda label: np.array([label])])
def test_labels_of_every_kind(kind):
    found = data.from_dataset(Pairs(zip(GREY, map(kind, LABELS), strict=True)))
    assert found.labels.tolist() == LABELS and found.labels.dtype == torch.int64
    assert found.num_classes == 3 and list(found.class_names) == ["0", "1", "2"]


def test_names_and_numbers_of_classes():
    items = list(zip(GREY, LABELS, strict=True))
    assert data.from_dataset(Pairs(items, classes=["ant", "bee", "cat"])).class_names == ["ant", "bee", "cat"]
    assert data.from_dataset(Pairs(items), class_names=["a", "b", "c", "d"]).num_classes == 4
    assert data.from_dataset(Pairs(items, classes=4)).num_classes == 3  # another attribute of this name
    found = data.from_dataset(Pairs([(x, 2 * y) for x, y in items]), num_classes=5)  # gaps, as asked for
    assert found.num_classes == 5 and found.labels.max() == 4


@pytest.mark.parametrize("item", [lambda x: x, lambda x: (x,), lambda x: (x, None)])
def test_images_without_labels_are_one_class(item):
    found = data.from_dataset(Pairs(map(item, GREY)))
    assert found.class_names == ["all"] and found.num_classes == 1 and found.labels.tolist() == [0] * 6


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(GREY)


def changed(index, item, images=GREY):
    items = list(zip(images, LABELS, strict=True))
    items[index] = item
    return Pairs(items)


TRANSPARENT = Image.fromarray(np.dstack([COLOUR[0], GREY[0]]))
HIGH = torch.full((1, 4, 4), 1.5)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (Stream(), {}, "dataset must be map-style, .* got Stream; a stream can be made a list"),
        (7, {}, "dataset must be map-style, .* got int"),
        ([], {}, "dataset must have an item, got an empty one"),
        (
            changed(2, {"image": GREY[0]}),
            {},
            r"dataset\[2\] must be \(image, label\) .* a dict of \['image'\]",
        ),
        (changed(2, (GREY[0], 0, 0)), {}, r"dataset\[2\] must be \(image, label\) .* got 3 parts"),
        (changed(2, (None, 0)), {}, r"dataset\[2\]: image must be a PIL image, .* got NoneType"),
        (changed(2, ("a.png", 0)), {}, r"dataset\[2\]: image must be .* got str; add a transform"),
        (changed(2, (GREY[0, :3, :3], 0)), {}, r"dataset\[2\]: image must be \[1, 4, 4\] .* got \[1, 3, 3\]"),
        (changed(2, (COLOUR[0], 0)), {}, r"dataset\[2\]: image must be \[1, 4, 4\] .* one size, channels"),
        (changed(2, (FLOATS[0, :1], 0)), {}, r"must be \[1, 4, 4\] torch.uint8 .* got .* torch.float32"),
        (changed(2, (GREY[0, :3], 0)), {}, r"dataset\[2\]: image must be square, got 3 x 4; crop or pad"),
        (changed(2, (TRANSPARENT, 0)), {}, r"dataset\[2\]: image must be opaque, .*\(mode RGBA\); compose"),
        (
            changed(2, (np.asarray(TRANSPARENT), 0)),
            {},
            r"channels, got \[4, 4, 4\]; with transparency",
        ),
        (changed(2, (torch.from_numpy(COLOUR[0]), 0)), {}, r"got \[4, 4, 3\]; channels last\? image.permute"),
        (changed(2, (torch.zeros(2, 1, 4, 4), 0)), {}, r"got \[2, 1, 4, 4\]; a batch\? Items are single"),
        (changed(2, (GREY[0].astype(np.int64), 0)), {}, r"must be uint8, or float .* got torch.int64"),
        (changed(2, (GREY[0].astype("U3"), 0)), {}, "must be uint8, or float .* got <U3"),
        (changed(2, (Image.new("F", (4, 4)), 0)), {}, "must have 8 bits per channel, got floating-point"),
        (changed(0, (torch.full((1, 4, 4), float("nan")), 0)), {}, r"finite in \[-1, 1\], got nan"),
        (
            changed(0, (HIGH, 0)),
            {},
            r"image must be finite in \[-1, 1\], got 1.5 ... 1.5; in 0",
        ),
        (Pairs([((x + 1) / 2, 0) for x in FLOATS]), {}, r"no value below 0: .* ToTensor, .* 2 \* x - 1"),
        (changed(2, (GREY[0], "ant")), {}, r"dataset\[2\]: label must be an integer, got 'ant'; number the"),
        (changed(2, (GREY[0], 0.5)), {}, r"dataset\[2\]: label must be an integer, got 0.5"),
        (changed(2, (GREY[0], torch.eye(3)[0])), {}, r"dataset\[2\]: label must be an integer, got tensor"),
        (changed(2, (GREY[0], True)), {}, r"dataset\[2\]: label must be an integer, got True"),
        (changed(2, (GREY[0], -1)), {}, r"dataset\[2\]: label must be at least 0 .* got -1"),
        (changed(2, GREY[0]), {}, r"every item or none must have a label, got none for dataset\[2\]"),
        (changed(2, (GREY[0], 4)), {}, "labels must be 0 ... 4 with none left out, got no image of label 3"),
        (changed(2, (GREY[0], 3)), {"num_classes": 3}, r"dataset\[2\]: label must be below the 3 .* got 3"),
        (changed(2, (GREY[0], 0)), {"class_names": "abc"}, "class_names must be a list of different texts"),
        (changed(2, (GREY[0], 0)), {"class_names": ["a", "b", "a"]}, "class_names must be a list of diff"),
        (changed(2, (GREY[0], 0)), {"class_names": ["a", "b", "c"], "num_classes": 4}, "must be 3, as there"),
        (Pairs(GREY), {"num_classes": 4}, "num_classes must be 1 for images without labels, got 4"),
    ],
)
def test_wrong_data_sets_are_named(dataset, options, message):
    with pytest.raises(UserError, match=f"^from_dataset: .*{message}"):
        data.from_dataset(dataset, **options)


def test_more_than_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr(torch_dataset.os, "sysconf", lambda name: 9)
    with pytest.raises(UserError, match=r"6 images \[1, 4, 4\] torch.uint8 need 96 bytes .* has 81; store"):
        data.from_dataset(Pairs(GREY))

"""The same labelled images in every form of files that `imf.data.prepare` reads."""

import gzip
import io
import json
import struct
import tarfile

import numpy as np
from PIL import Image

NAMES = ("ant", "bee", "cat")
LABELS = np.repeat(np.arange(3), 4)
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (12, 6, 6), np.uint8)
COLOUR = RNG.integers(0, 256, (12, 6, 6, 3), np.uint8)


def png(pixels):
    """The bytes of a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def class_folders(root, images):
    for i, pixels in enumerate(images):
        (root / NAMES[LABELS[i]]).mkdir(exist_ok=True)
        (root / NAMES[LABELS[i]] / f"{i:02d}.png").write_bytes(png(pixels))
    return [root]


def flat(root, images):
    (root / "flat").mkdir()
    for i, pixels in enumerate(images):
        (root / "flat" / f"{i:02d}.png").write_bytes(png(pixels))
    lines = (f"{i:02d}.png {NAMES[label]}\n" for i, label in enumerate(LABELS))
    (root / "labels.txt").write_text("".join(lines))
    return [root / "flat", "--labels", root / "labels.txt"]


def npy(root, images):
    np.save(root / "x.npy", images)
    np.save(root / "y.npy", LABELS.astype(np.int16)[:, None])
    return [root / "x.npy", "--labels", root / "y.npy"]


def npz(root, images):
    np.savez_compressed(root / "a.npz", x_train=images, y_train=np.array(NAMES)[LABELS], x_test=images[:1])
    return [root / "a.npz"]


def npz_of_other_names(root, images):
    np.savez(root / "a.npz", pictures=images, kinds=LABELS.astype(np.uint8))
    return [root / "a.npz", "--image-key", "pictures", "--label-key", "kinds"]


def idx_bytes(values):
    """An IDX file of unsigned bytes."""
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def idx(root, images, write=lambda path, content: path.write_bytes(content), end=""):
    labels = LABELS.astype(np.uint8)
    for split, n in (("train", len(images)), ("t10k", 2)):
        write(root / f"{split}-images-idx3-ubyte{end}", idx_bytes(images[:n]))
        write(root / f"{split}-labels-idx1-ubyte{end}", idx_bytes(labels[:n]))
    return [root]


def idx_gzipped(root, images):
    idx(root, images, lambda path, content: path.write_bytes(gzip.compress(content)), ".gz")
    return [root / "train-labels-idx1-ubyte.gz", root / "train-images-idx3-ubyte.gz"]


def idx_in_parts(root, images):
    labels = LABELS.astype(np.uint8)
    for name, part in (("a", slice(0, 5)), ("b", slice(5, 12))):
        (root / f"{name}-images.idx3-ubyte").write_bytes(idx_bytes(images[part]))
        (root / f"{name}-labels.idx1-ubyte").write_bytes(idx_bytes(labels[part]))
    return sorted(root.iterdir())


def tar(root, images, label, extension, parts=((0, 12),), name="train-{}.tar"):
    for number, (first, last) in enumerate(parts):
        with tarfile.open(root / name.format(number), "w") as file:
            for i in range(first, last):
                for end, content in (("png", png(images[i])), (extension, label(i)), ("note", b"?")):
                    member = tarfile.TarInfo(f"./deep/{i:02d}.{end}")
                    member.size = len(content)
                    file.addfile(member, io.BytesIO(content))
    return [root]


def tar_cls(root, images):
    return tar(root, images, lambda i: b"%d\n" % LABELS[i], "cls", parts=((0, 5), (5, 12)))


def tar_json(root, images):
    return tar(root, images, lambda i: json.dumps({"label": int(LABELS[i])}).encode(), "json")


def tar_of_fields(root, images):
    tar(root, images, lambda i: json.dumps({"kind": NAMES[LABELS[i]], "label": "x"}).encode(), "json")
    return [root / "train-0.tar", "--label-key", "kind"]


def tar_txt(root, images):
    return tar(root, images, lambda i: NAMES[LABELS[i]].encode(), "txt")


def _table(images, label=None):
    import pyarrow

    rows = [{"bytes": png(pixels), "path": f"{i}.png"} for i, pixels in enumerate(images)]
    features = {"image": {"_type": "Image"}, "label": {"names": list(NAMES), "_type": "ClassLabel"}}
    schema = pyarrow.schema(
        {
            "image": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}),
            "label": pyarrow.int64(),
        },
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    return pyarrow.table({"image": rows, "label": LABELS[: len(images)].tolist()}, schema=schema)


def parquet(root, images):
    from pyarrow import parquet

    (root / "data").mkdir()
    table = _table(images)
    for number, (first, last) in enumerate(((0, 7), (7, 12))):
        path = root / "data" / f"train-{number:05d}-of-00002.parquet"
        parquet.write_table(table.slice(first, last - first), path, row_group_size=3)
    parquet.write_table(table.slice(0, 2), root / "data" / "test-00000-of-00001.parquet")
    return [root]


def parquet_of_other_columns(root, images):
    import pyarrow
    from pyarrow import parquet

    columns = {"jpg": [png(x) for x in images], "mask": [b""] * 12, "kind": [NAMES[i] for i in LABELS]}
    parquet.write_table(pyarrow.table(columns), root / "a.parquet")
    return [root / "a.parquet", "--image-key", "jpg", "--label-key", "kind"]


def arrow(root, images):
    """A folder as Dataset.save_to_disk leaves it."""
    import pyarrow

    root.mkdir(exist_ok=True)
    table, names = _table(images), ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, first, last in zip(names, (0, 5), (5, len(images)), strict=True):
        with (
            pyarrow.OSFile(str(root / name), "wb") as file,
            pyarrow.ipc.new_stream(file, table.schema) as out,
        ):
            out.write_table(table.slice(first, last - first), max_chunksize=3)
    (root / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (root / "dataset_info.json").write_text("{}")
    return [root]


def arrow_splits(root, images):
    """A folder as DatasetDict.save_to_disk leaves it."""
    arrow(root / "train", images)
    arrow(root / "test", images[:8])
    (root / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return [root]


FORMS = (
    class_folders, flat, npy, npz, npz_of_other_names, idx, idx_gzipped, idx_in_parts, tar_cls, tar_json,
    tar_of_fields, tar_txt, parquet, parquet_of_other_columns, arrow, arrow_splits,
)  # fmt: skip
TABLES = (parquet, parquet_of_other_columns, arrow, arrow_splits)  # need pyarrow

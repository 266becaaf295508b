"""Images in columns of tables: parquet files, and folders in which Hugging Face's `datasets` saves them."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imf.data.files import list_of, short
from imf.data.prepare import labels
from imf.data.prepare.source import Options, Source, check_file, left_out
from imf.images import MAX_BYTES, BrokenImage
from imf.io import read_json
from imf.program import UserError

STATE, SPLITS = "state.json", "dataset_dict.json"  # in the folder of a data set, and of several splits
_KEPT = 4  # groups of rows in memory


class _Cells:
    """Reader of the cells of a column, bytes or structs with a field `bytes`, in groups of rows.

    groups: reads the column in each group.  starts: number of the first row of each, and of the end.
    """

    def __init__(self, groups: Sequence[Callable[[], Any]], starts: Sequence[int]) -> None:
        self._groups, self._starts = groups, np.array(starts, np.int64)
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, place: int) -> bytes:
        group = int(np.searchsorted(self._starts, place, side="right")) - 1
        with self._lock:  # readers of files are not for several threads
            if group not in self._cache:
                while len(self._cache) >= _KEPT:
                    self._cache.popitem(last=False)
                self._cache[group] = self._read(group)
            self._cache.move_to_end(group)
            column = self._cache[group]
        value = column[place - int(self._starts[group])].as_py()
        if isinstance(value, dict):
            if value.get("bytes") is None and value.get("path"):
                raise BrokenImage("only the path of a file, not its bytes, is in the table")
            value = value.get("bytes")
        if value is None:
            raise BrokenImage("no value")
        if len(value) > MAX_BYTES:
            raise BrokenImage(f"{len(value):,} bytes: at most {MAX_BYTES:,} are read")
        return bytes(value)

    def _read(self, group: int) -> Any:
        from pyarrow import ArrowException

        try:
            return self._groups[group]()
        except ArrowException as error:
            raise OSError(f"a damaged table: {error}") from error


def read_parquet(paths: list[Path], options: Options) -> Source:
    """Reads the columns of images and labels of parquet files, one file after another.

    Raises: UserError without pyarrow, or if a file is damaged or has no such columns.
    """
    return _read(paths[0].parent, paths, _parquet, options)


def read_arrow(folder: Path, options: Options) -> Source:
    """Reads a folder that `datasets.Dataset.save_to_disk` wrote, or the training split of several.

    Raises: UserError without pyarrow, or if the folder is not whole or has no such columns.
    """
    others: list[str] = []
    if (folder / SPLITS).is_file():
        splits = read_json(folder / SPLITS).get("splits")
        if not isinstance(splits, list) or not splits or not all(map(_is_plain, splits)):
            raise UserError(
                f"{folder / SPLITS}: must name splits, got {short(splits)}; save the data set again"
            )
        kept, others = left_out([folder / split for split in splits])
        if len(kept) > 1:
            raise UserError(
                f"{folder}: must have one split with train in its name, got {', '.join(splits)}; name the "
                "folder of one as SOURCE"
            )
        (folder,) = kept
    listed = read_json(folder / STATE).get("_data_files")
    names = [entry.get("filename") for entry in listed or () if isinstance(entry, dict)]
    if not names or not all(map(_is_plain, names)):
        raise UserError(
            f"{folder / STATE}: must name files of this folder, got {short(listed)}; save it again"
        )
    source = _read(folder, [folder / str(name) for name in names], _stream, options)
    source.others.extend(others)
    return source


class _Table(NamedTuple):
    """An open file.  groups: rows of each group, and what reads a column of it.  column: reads one of all."""

    schema: Any
    groups: Sequence[tuple[int, Callable[[str], Any]]]
    column: Callable[[str], Any]


def _parquet(path: Path) -> _Table:
    from pyarrow import parquet

    file = parquet.ParquetFile(path, memory_map=True)

    def read(group: int, name: str) -> Any:
        return file.read_row_group(group, columns=[name]).column(name)

    counts = (file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
    groups = [(count, partial(read, group)) for group, count in enumerate(counts)]
    return _Table(file.schema_arrow, groups, lambda name: file.read(columns=[name]).column(name))


def _stream(path: Path) -> _Table:
    import pyarrow

    table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
    return _Table(table.schema, [(len(x), x.column) for x in table.to_batches()], table.column)


def _read(root: Path, paths: list[Path], open_table: Callable[[Path], _Table], options: Options) -> Source:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise UserError(f"{paths[0]}: tables need pyarrow: pip install -e '.[data]' ({error})") from error
    groups: list[Callable[[], Any]] = []
    starts, values, files, containers = [0], list[Any](), list[tuple[str, int]](), []
    schema: Any = None
    image, label = "", None
    for path in paths:
        containers.append((path.name, check_file(path)))
        try:
            table = open_table(path)
            if schema is None:
                schema, (image, label) = table.schema, _columns(path, table.schema, options)
            _check_columns(path, table.schema, schema, (image, label))
            for count, read in table.groups:
                groups.append(partial(read, image))
                starts.append(starts[-1] + count)
            if label is not None:
                values += table.column(label).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a whole table: {error}") from error
        files += [(f"{path.name}:{row}", 0) for row in range(starts[-1] - len(files))]
    if not files:
        raise UserError(f"{paths[0]}: must have rows, got none")
    if label is None:
        numbered = labels.unconditional(len(files), options.class_names)
    else:
        where = f"{paths[0]}: column {label}:"
        if missing := sum(value is None for value in values):
            raise UserError(
                f"{where} every row must have a label, got none for {missing:,} of {len(values):,}"
            )
        names = options.class_names or _class_names(schema, label)
        numbered = labels.of_array(np.array(values), where, names)
    others = [f"column {name}" for name in schema.names if name not in (image, label)]
    return Source(root, files, *numbered, _Cells(groups, starts), others, containers)


def _columns(path: Path, schema: Any, options: Options) -> tuple[str, str | None]:
    """Chooses the columns of images and of labels; UserError, naming those that are there."""
    there = ", ".join(f"{x.name} ({x.type})" for x in schema)
    images = [x.name for x in schema if _holds_bytes(x.type)]
    image = options.image_key
    if image is None:
        named = [name for name in images if name in ("image", "img")]
        if len(named or images) != 1:
            raise UserError(
                f"{path}: must have one column of images as bytes, got {len(images)} among {there}; "
                "--image-key NAME says which holds them"
            )
        (image,) = named or images
    elif image not in images:
        raise UserError(f"{path}: --image-key must be a column of images as bytes, got {image} among {there}")
    if options.unconditional:
        return image, None
    label = options.label_key
    if label is None:
        classes = [name for name in schema.names if _class_names(schema, name)]
        found = ["label"] if "label" in schema.names else classes
        if len(found) != 1:
            raise UserError(
                f"{path}: must have a column label, got {there}; --label-key NAME says which holds the "
                "labels, --unconditional trains without"
            )
        (label,) = found
    elif label not in schema.names:
        raise UserError(f"{path}: --label-key must be a column, got {label}, not among {there}")
    return image, label


def _check_columns(path: Path, schema: Any, first: Any, keys: tuple[str, str | None]) -> None:
    for name in keys:
        if name is not None and (
            name not in schema.names or schema.field(name).type != first.field(name).type
        ):
            got = schema.field(name).type if name in schema.names else "none"
            raise UserError(
                f"{path}: column {name} must be {first.field(name).type} as in the first file, got {got}"
            )


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(
            kind.field(i).name == "bytes" and _holds_bytes(kind.field(i).type) for i in range(len(kind))
        )
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _class_names(schema: Any, column: str) -> list[str] | None:
    """Returns the names of a column's classes, which `datasets` notes in the schema; None without."""
    try:
        noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = noted["info"]["features"][column]
        names = feature["names"] if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return names if list_of(lambda x: isinstance(x, str))(names) and names else None


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name

"""Recognises the form of a source by the names of its files, and reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from imf.data.prepare.readers import arrays, folders, tables, tars
from imf.data.prepare.source import Options, Source, left_out
from imf.images import entries, is_image
from imf.program import UserError


@dataclass(frozen=True)
class Format:
    """A form of files that hold many images.

    name: for messages.  fits: whether a file is of this form, by its name.  read: makes a source of files.
    options: those of `Options` that it takes, besides unconditional and class_names.
    choose: splits the files of a folder into those to read and the names of the others; None if SOURCE must
        be the file: beside images such a file is often something else.
    """

    name: str
    fits: Callable[[Path], bool]
    read: Callable[[list[Path], Options], Source]
    options: tuple[str, ...] = ()
    choose: Callable[[Sequence[Path]], tuple[list[Path], list[str]]] | None = left_out


def _ends(*endings: str) -> Callable[[Path], bool]:
    return lambda path: path.name.lower().endswith(endings)


KEYS = ("image_key", "label_key")
FORMATS = (
    Format("parquet files", _ends(".parquet"), tables.read_parquet, KEYS),
    Format("tar files", _ends(".tar", ".tar.gz", ".tgz"), tars.read_tars, KEYS),
    Format("IDX files", arrays.is_idx, arrays.read_idx, choose=arrays.idx_files),
    Format(".npz files", _ends(".npz"), arrays.read_npz, KEYS, None),
    Format(".npy files", _ends(".npy"), arrays.read_npy, ("label_file",), None),
)
WANTED = (
    "a folder of images, or of a folder per class; parquet, tar or IDX files or a folder of them; a .npz or "
    ".npy file; a folder of Dataset.save_to_disk"
)
DEPTH = 3  # of folders in which such files are looked for


def find(paths: Sequence[Path], options: Options | None = None) -> Source:
    """Finds the images and labels in a folder, or in files of one form.

    Raises: UserError if there is none, the form is unknown, an option is of another form, or the files are
    damaged or disagree.
    """
    options = options or Options()
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; SOURCE must be {WANTED}")
    if len(paths) == 1 and paths[0].is_dir():
        return _in_folder(paths[0], options)
    if mixed := [path for path in paths if path.is_dir()]:
        raise UserError(
            f"SOURCE must be one folder, or files of one form, got the folder {mixed[0]} among several"
        )
    formats = [_format_of(path) for path in paths]
    for path, found in zip(paths, formats, strict=True):
        if found is None:
            kind = "an image; name its folder" if is_image(path.name) else "a file of another name"
            raise UserError(f"{path}: SOURCE must be {WANTED}; got {kind}")
        if found != formats[0]:
            raise UserError(f"SOURCE must be files of one form, got {paths[0]} and {path}")
    first = formats[0]
    assert first is not None
    _check_options(first.name, first.options, options)
    return first.read(list(paths), options)


def _in_folder(folder: Path, options: Options) -> Source:
    if any((folder / name).is_file() for name in (tables.STATE, tables.SPLITS)):
        _check_options("a folder of Dataset.save_to_disk", KEYS, options)
        return tables.read_arrow(folder, options)
    format, place = _look_around(folder)
    if format is None or format.choose is None:
        _check_options("a folder of images", ("label_file",), options)
        return folders.read_folder(folder, options)
    _check_options(format.name, format.options, options)
    listed = sorted(Path(entry.path) for entry in entries(place) if entry.is_file())
    paths, others = format.choose([path for path in listed if format.fits(path)])
    source = format.read(paths, options)
    source.others.extend(others)
    return source


def _look_around(folder: Path) -> tuple[Format | None, Path]:
    """Returns the form of the files of images in a folder, and where they lie; None for single images.

    Raises: UserError if there are both.
    """
    found: tuple[Format, Path] | None = None
    level = [folder]
    for _ in range(DEPTH):
        below: list[Path] = []
        for place in level:
            for entry in sorted(entries(place), key=lambda entry: entry.name):
                path, format = Path(entry.path), _format_of(Path(entry.path))
                if entry.is_dir():
                    below.append(path)
                elif is_image(entry.name):
                    if found is None:
                        return None, folder
                    raise UserError(
                        f"{folder}: must hold images or files of images, got both, such as {path} and "
                        f"{found[0].name} in {found[1]}; name these files as SOURCE, or move one kind away"
                    )
                elif format is not None and format.choose is not None:
                    found = found or (format, place)
        level = below
    return found or (None, folder)


def _format_of(path: Path) -> Format | None:
    return next((format for format in FORMATS if format.fits(path)), None)


def _check_options(name: str, taken: tuple[str, ...], options: Options) -> None:
    """UserError for an option that this form has no use for: it would be ignored."""
    flags = {"label_file": "--labels", "image_key": "--image-key", "label_key": "--label-key"}
    for option, flag in flags.items():
        if getattr(options, option) is None:
            continue
        if option not in taken:
            raise UserError(f"{flag} is not for {name}; leave it out")
        if options.unconditional and option != "image_key":
            raise UserError(f"--unconditional reads no labels: leave {flag} out")

"""Files that appear under their name whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path, *, synced: bool = False) -> Iterator[Path]:
    """A temporary path to write to; what is there when the block ends well gets the name `path`.

    A block that fails leaves no temporary file; a process that is killed leaves the old file or the new one,
    and perhaps a temporary one, named .<name>.tmp.

    synced: file and name are on the disk when this ends.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # same folder, so the rename stays inside one file system
    try:
        yield temporary
        if synced:
            sync(temporary)
        os.replace(temporary, path)
        if synced:
            sync(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

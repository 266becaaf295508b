"""Samples by number, stored as images or made in memory, and folders of images.

The noise of sample i is a function of (seed, i), its class one of (i, count), so samples can be made in any
order, by any number of processes, and again; another batch size may change the last bit of a pixel.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from imf import random
from imf.images import BrokenImage, read_image, walk
from imf.io import check_regular, naming, replacing, write_json
from imf.model.config import config_of
from imf.model.sampler import generate
from imf.program import UserError
from imf.sampling import to_uint8

SETTINGS = "settings.json"
_THREADS = 4  # that compress and read PNGs while the network computes


@dataclass(frozen=True)
class Settings:
    """All that decides a set of samples, together with the software.

    weights, vae: `imf.io.fingerprint` of the network's and the autoencoder's, "" for none.
    precision: "fp32" or "bf16".  count: number of samples.  seed: of the noise.
    Others: as `imf.generate` takes them.
    """

    weights: str
    vae: str
    precision: str
    count: int
    seed: int
    steps: int
    omega: float
    t_min: float
    t_max: float
    random_scheme: int = random.SCHEME

    @property
    def name(self) -> str:
        """Names of a folder of these samples, unique within a grid."""
        return f"steps-{self.steps}_omega-{self.omega:g}_interval-{self.t_min:g}-{self.t_max:g}"


def noise(seed: int, indices: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Draws standard normal noise [n, *shape], fp32, of the samples of these numbers."""
    rows = [torch.randn(shape, generator=random.generator(seed, "sample", i)) for i in indices]
    return torch.stack(rows) if rows else torch.empty(0, *shape)


def classes(indices: Iterable[int], count: int, num_classes: int) -> Tensor:
    """Returns labels [n] int64 of these of `count` samples: as many of each class, in class order.

    Raises: UserError if count is not a positive multiple of the number of classes.
    """
    if count < 1 or count % num_classes:
        wanted = f"a positive multiple of the {num_classes} classes (as many samples of each)"
        raise UserError(f"count must be {wanted}, got {count}")
    return torch.tensor([i // (count // num_classes) for i in indices], dtype=torch.int64)


def to_bytes(images: Tensor) -> Tensor:
    """Converts images in [-1, 1], clipped, to uint8 as a PNG stores them; UserError unless finite."""
    if not images.isfinite().all():
        raise UserError("samples must be finite, got inf or NaN: a wrong checkpoint, or one that diverged?")
    return to_uint8(images)


def sample_images(
    model: nn.Module,
    settings: Settings,
    rows: range,
    *,
    batch_size: int = 64,
    decode: Callable[[Tensor], Tensor] | None = None,
    folder: Path | None = None,
) -> Iterator[Tensor]:
    """Makes the samples of the numbers `rows`, in batches [B, C, H, W] uint8 on the CPU.

    With a folder, samples that lie in it are read, the others are written to it as PNGs, each whole or not
    at all: after an interruption the same call resumes.  decode: makes images of latents.
    Raises: UserError for settings that do not fit the network, samples that are not finite, or a folder of
        other samples.
    """
    config: Any = config_of(model)
    shape = config.in_channels, config.input_size, config.input_size
    classes(range(0), settings.count, config.num_classes)  # before anything is written
    if folder is not None:
        claim(folder, settings)
    options = {name: getattr(settings, name) for name in ("steps", "omega", "t_min", "t_max")}
    writes: list[Future[None]] = []  # of the batch before: they proceed while the network computes
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            paths = {i: folder / f"{i:06d}.png" for i in batch} if folder else {}
            stored = zip(paths, pool.map(_read, paths.values()), strict=True)
            images = {i: x for i, x in stored if isinstance(x, Tensor)}
            if missing := [i for i in batch if i not in images]:
                y = classes(missing, settings.count, config.num_classes)
                x = generate(model, noise(settings.seed, missing, shape), y, **options)
                images |= zip(missing, to_bytes(decode(x) if decode else x).cpu(), strict=True)
                for write in writes:
                    write.result()
                writes = [pool.submit(write_png, paths[i], images[i]) for i in missing if paths]
            shapes = {i: list(images[i].shape) for i in paths}
            for i, path in paths.items():
                if shapes[i] != (first := shapes[batch[0]]):
                    wrong = f"must be {first} like the sample before it, got {shapes[i]}"
                    raise UserError(f"{path}: {wrong}; delete the one that does not belong here")
            yield torch.stack([images[i] for i in batch])
        for write in writes:
            write.result()


def claim(folder: Path, settings: Settings) -> None:
    """Makes the folder one for samples of these settings; UserError if it holds others."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    try:
        check_regular(path)
        held = dict(json.loads(path.read_text()))
    except FileNotFoundError:
        if count := len(image_files(folder)):
            found = f"holds {count} images and no {SETTINGS}"
            raise UserError(f"{folder}: {found}; choose an empty folder for samples") from None
        write_json(path, asdict(settings))
        return
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: no JSON object: {error}; choose an empty folder for samples") from error
    if differences := different(held, asdict(settings)):
        raise UserError(f"{folder}: holds other samples, of {differences}; choose another folder")


def different(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Describes what differs between two sets of settings; "" if nothing does."""
    values = {name: (held.get(name), wanted.get(name)) for name in {**wanted, **held}}
    return ", ".join(f"{name} {a!r} (not {b!r})" for name, (a, b) in values.items() if a != b)


def image_files(folder: Path) -> list[Path]:
    """Lists the images in a folder and the folders in it, sorted, as `imf.images.walk` finds them."""
    return sorted(folder / name for name, _ in walk(folder))


def read_images(paths: list[Path], batch_size: int = 64) -> Iterator[Tensor]:
    """Reads images in batches [B, C, H, W] uint8, C = 1 if the first is grey, else 3.

    Raises: UserError for images of several sizes, or broken ones, all of which it lists.
    """
    broken: list[tuple[Path, Exception]] = []
    first: Tensor | None = None
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            images = []
            for path, image in zip(batch, pool.map(_read, batch), strict=True):
                if not isinstance(image, Tensor):
                    broken.append((path, image))
                    continue
                first = image if first is None else first
                if len(image) == 1 and image.shape[1:] == first.shape[1:]:
                    image = image.expand_as(first)  # grey among colour
                if image.shape != first.shape:
                    raise UserError(
                        f"{path}: images must be of one size, {list(first.shape)} like the first, "
                        f"got {list(image.shape)}; imf.data.prepare crops them, and writes statistics too"
                    )
                images.append(image)
            if images and not broken:  # once one is broken only the others are looked for
                yield torch.stack(images)
    if broken:
        names = ", ".join(str(path) for path, _ in broken[:5]) + (" …" if len(broken) > 5 else "")
        found = f"{len(broken)} of {len(paths)} images cannot be read: {names}"
        raise UserError(f"{found}; of the first: {broken[0][1]}")


def write_png(path: Path, image: Tensor) -> None:
    """Writes an image [C, H, W] uint8, C = 1 or 3, whole or not at all."""
    if (c := len(image)) not in (1, 3):
        raise UserError(f"an image must have 1 or 3 channels, got {c}: latents are decoded by an autoencoder")
    array = image.permute(1, 2, 0).numpy()
    with naming(path), replacing(path) as temporary:
        Image.fromarray(array[..., 0] if c == 1 else array).save(temporary, "PNG", compress_level=1)


def _read(path: Path) -> Tensor | Exception:
    """Reads an image [C, H, W] uint8, C = 1 if it is grey; returns why where there is none."""
    try:
        array = np.asarray(read_image(path))
    except (BrokenImage, OSError) as error:
        return error
    return torch.from_numpy(array.copy()).reshape(*array.shape[:2], -1).permute(2, 0, 1)

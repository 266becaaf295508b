"""Samples by number, as images on disk or in memory: what an evaluation at scale looks at.

The noise of sample i is a function of (seed, i), its class one of (i, count), so samples can be made in any
order, in batches of any size and by any number of processes, and made again. With batches of another size the
network's sums round differently: a pixel may then differ in its last bit, the noise never does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from imf import sampling
from imf.evaluation import vae as autoencoder
from imf.images import BrokenImage, read_image, walk
from imf.io import check_regular, naming, replacing, write_json
from imf.program import UserError

SETTINGS = "settings.json"
_THREADS = 4  # that compress and read PNGs while the network computes


@dataclass(frozen=True)
class Settings:
    """What decides a set of samples, together with the software.

    weights: `fingerprint` of the network's.  vae: that of the autoencoder's, "" for none.
    count: how many samples, in all.  steps, omega, t_min, t_max: as `imf.sample.sample` takes them.
    precision: "fp32" or "bf16".
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

    @property
    def name(self) -> str:
        """Of a folder for these samples beside others of a grid."""
        return f"steps-{self.steps}_omega-{self.omega:g}_interval-{self.t_min:g}-{self.t_max:g}"


def noise(seed: int, indices: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise [n, *shape], fp32, of the samples of these numbers.

    Philox, a counter-based generator, keyed by the seed; sample i starts at block i 2^64 of its sequence.
    """
    rows = [
        np.random.Generator(np.random.Philox(key=seed, counter=i << 64)).standard_normal(
            shape, dtype=np.float32
        )
        for i in indices
    ]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, *shape)


def classes(indices: Iterable[int], count: int, num_classes: int) -> Tensor:
    """Labels [n] int64 of the samples of these numbers out of `count`: as many of each class, in class order.

    Raises: ValueError if count is not a positive multiple of the number of classes.
    """
    if count < 1 or count % num_classes:
        raise ValueError(
            f"count must be a positive multiple of the {num_classes} classes (as many samples of each), "
            f"got {count}"
        )
    return torch.tensor([i // (count // num_classes) for i in indices], dtype=torch.int64)


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1], clipped, as uint8: what a PNG stores."""
    if not images.isfinite().all():
        raise UserError("samples must be finite, got inf or NaN: a wrong checkpoint, or one that diverged?")
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def generate(
    model: nn.Module,
    settings: Settings,
    rows: range,
    *,
    batch_size: int = 64,
    vae: Any = None,
    folder: Path | None = None,
) -> Iterator[Tensor]:
    """Samples of the numbers `rows`, in batches [B, C, H, W] uint8 on the CPU, decoded by `vae` if given.

    With a folder, samples that lie in it are read, the others are written to it as PNGs, each whole or not
    at all: after an interruption the same call goes on.

    Raises: ValueError for settings that do not fit the network, UserError for samples that are not finite or
    a folder that holds samples of other settings, UserError for an autoencoder that does not fit.
    """
    config: Any = model.config
    device = next(model.parameters()).device
    shape = (config.in_channels, config.input_size, config.input_size)
    classes(range(0), settings.count, config.num_classes)  # before anything is written
    if folder is not None:
        claim(folder, settings)
    guidance = {"omega": settings.omega, "t_min": settings.t_min, "t_max": settings.t_max}
    writes: list[Future[None]] = []  # of the batch before: they go on while the network computes
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(rows.start, rows.stop, batch_size):
            batch = range(start, min(start + batch_size, rows.stop))
            found: dict[int, Tensor] = {}
            if folder is not None:
                stored = pool.map(_read, (_path(folder, i) for i in batch))
                found = {i: x for i, x in zip(batch, stored, strict=True) if isinstance(x, Tensor)}
            if missing := [i for i in batch if i not in found]:
                z = noise(settings.seed, missing, shape).to(device)
                y = classes(missing, settings.count, config.num_classes).to(device)
                x = sampling.generate(model, z, y, steps=settings.steps, **guidance)
                new = to_bytes(x if vae is None else autoencoder.decode(vae, x)).cpu()
                found |= zip(missing, new, strict=True)
                if folder is not None:
                    for write in writes:
                        write.result()
                    writes = [pool.submit(write_png, _path(folder, i), found[i]) for i in missing]
            samples = [found[i] for i in batch]
            for i in batch:
                if folder is not None and found[i].shape != samples[0].shape:
                    raise UserError(
                        f"{_path(folder, i)}: must be {list(samples[0].shape)} like the sample before it, "
                        f"got {list(found[i].shape)}; delete the one that does not belong here"
                    )
            yield torch.stack(samples)
        for write in writes:
            write.result()


def claim(folder: Path, settings: Settings) -> None:
    """Make the folder one for samples of these settings; UserError if it holds others."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    try:
        check_regular(path)
        held = json.loads(path.read_text())
    except FileNotFoundError:
        if others := image_files(folder):
            raise UserError(
                f"{folder}: holds {len(others)} images and no {SETTINGS}; choose an empty folder for samples"
            ) from None
        write_json(path, asdict(settings))
        return
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no JSON: {error}; choose an empty folder for samples") from error
    if not isinstance(held, dict):
        raise UserError(f"{path}: must be a JSON object, got {type(held).__name__}; choose an empty folder")
    if differences := different(held, asdict(settings)):
        raise UserError(f"{folder}: holds other samples, of {differences}; choose another folder")


def different(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What differs between two sets of settings, as text; "" if nothing does."""
    names = sorted({*held, *wanted})
    return ", ".join(
        f"{name} {held.get(name)!r} (not {wanted.get(name)!r})"
        for name in names
        if held.get(name) != wanted.get(name)
    )


def image_files(folder: Path) -> list[Path]:
    """Images in a folder and the folders in it, in the order of their paths; hidden files are left out.

    Raises: UserError for what cannot be listed, see `imf.images.walk`.
    """
    return sorted(folder / name for name, _ in walk(folder))


def read_images(paths: list[Path], batch_size: int = 64) -> Iterator[Tensor]:
    """Images of files, in batches [B, C, H, W] uint8, C = 1 if the first is grey, else 3.

    Raises: UserError for images of several sizes, or broken ones, all of which it lists.
    """
    broken: list[Path] = []
    reason: Exception | None = None  # of the first
    first: Tensor | None = None
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            whole = []
            for path, image in zip(batch, pool.map(_read, batch), strict=True):
                if not isinstance(image, Tensor):
                    reason = reason or image
                    broken.append(path)
                    continue
                first = image if first is None else first
                if len(image) == 1 and image.shape[1:] == first.shape[1:]:
                    image = image.expand_as(first)  # grey among colour
                if image.shape != first.shape:
                    raise UserError(
                        f"{path}: images must be of one size, {list(first.shape)} like the first, "
                        f"got {list(image.shape)}; imf.data.prepare crops them, and writes statistics too"
                    )
                whole.append(image)
            if whole and not broken:  # once one is broken only the others are looked for
                yield torch.stack(whole)
    if broken:
        names = ", ".join(map(str, broken[:5])) + (" …" if len(broken) > 5 else "")
        raise UserError(
            f"{len(broken)} of {len(paths)} images cannot be read: {names}; of the first: {reason}"
        )


def write_png(path: Path, image: Tensor) -> None:
    """Write an image [C, H, W] uint8, C = 1 or 3, whole or not at all."""
    if image.shape[0] not in (1, 3):
        raise UserError(
            f"an image must have 1 or 3 channels, got {image.shape[0]}: latents are decoded by an autoencoder"
        )
    array = image.permute(1, 2, 0).numpy()
    with naming(path), replacing(path) as temporary:
        Image.fromarray(array[..., 0] if len(image) == 1 else array).save(temporary, "PNG", compress_level=1)


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Sixteen digits that tell one set of weights from another, whatever file they came in."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"


def _read(path: Path) -> Tensor | Exception:
    """An image [C, H, W] uint8, C = 1 if it is grey, or why there is none."""
    try:
        array = np.asarray(read_image(path))
    except (BrokenImage, OSError) as error:
        return error
    return torch.from_numpy(array.copy()).reshape(*array.shape[:2], -1).permute(2, 0, 1)

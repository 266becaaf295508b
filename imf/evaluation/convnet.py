"""Features of images by a small convolutional network that the data's own labels train in seconds.

It needs no download, and its file in a run's folder serves every later figure. It sees images at 32 pixels or
less: what is finer does not count. Figures are comparable where data and network are the same, and with no
figure of Inception. Where all labels are the same it learns to tell by how many quarter turns an image is
rotated; then its features serve, and there is no classifier.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, max_pool2d

from imf import random
from imf.io import check_regular, fingerprint, naming, replacing
from imf.program import UserError, progress

FILE = "extractor.safetensors"  # in a run's folder
KEY = "imf_extractor"  # of the metadata
WIDTHS = 16, 32, 64, 128  # channels; the last are the features
SIDE = 32  # pixels that it sees at most
IMAGES = 10_000  # that it is trained on and checked with, at most
BATCH, RATE = 128, 3e-3
LEAST, STEPS, EPOCHS = 30, 300, 30  # steps, and epochs that end before them
TASKS = "labels", "rotations"


@dataclass(frozen=True)
class About:
    """Description of a network: its channels of images, its classes, and what it was trained for.

    task: "labels", or "rotations" by 0 … 3 quarter turns.  held_out: accuracy on images not trained on.
    fingerprint: of the weights.
    """

    channels: int
    classes: int
    task: str
    held_out: float
    fingerprint: str = ""

    def __post_init__(self) -> None:
        counts = (self.channels, self.classes)
        fits = all(type(x) is int and 1 <= x <= 2**20 for x in counts) and self.task in TASKS
        if not fits or not isinstance(self.held_out, float) or not isinstance(self.fingerprint, str):
            raise ValueError(f"of an unknown form: {self}")


class ConvNet(nn.Module):
    """Network from images [B, C, H, W] fp32 in [-1, 1] of any size to features [B, 128] and logits [B, K]."""

    def __init__(self, about: About) -> None:
        super().__init__()
        self.about = about
        pairs = zip((about.channels, *WIDTHS), WIDTHS, strict=False)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in WIDTHS)
        self.head = nn.Linear(WIDTHS[-1], about.classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = shrink(images)
        for layer, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            if layer and min(x.shape[2:]) >= 6:
                x = max_pool2d(x, 2)
            x = norm(convolution(x)).relu()
        features = x.mean((2, 3))
        return features, self.head(features)


@dataclass(frozen=True)
class RunExtractor:
    """Extractor, see `imf.evaluation.inception`, by a run's own network; logits where it knows labels."""

    network: ConvNet

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns features of images [B, C, H, W] uint8, and logits.

        Raises: UserError for images of another number of channels.
        """
        about, device = self.network.about, self.network.head.weight.device
        if images.ndim != 4 or images.shape[1] != about.channels:
            wanted = f"[B, {about.channels}, H, W] like the data that it was trained on"
            raise UserError(f"the run's own extractor: images must be {wanted}, got {list(images.shape)}")
        features, logits = self.network(images.to(device).float() / 127.5 - 1)
        return features, logits if about.task == "labels" else None


def shrink(images: Tensor) -> Tensor:
    """Averages images [B, C, H, W] over areas, to at most `SIDE` pixels."""
    height, width = images.shape[2:]
    return adaptive_avg_pool2d(images, (min(height, SIDE), min(width, SIDE)))


def train(batches: Iterable[tuple[Tensor, Tensor]], num_classes: int) -> ConvNet:
    """Trains a network on images [B, C, H, W] fp32 in [-1, 1] and their labels [B], in batches, on the CPU.

    One image in ten is held out. A function of the data, the versions and the number of threads: no seed of a
    run changes it.  num_classes: 1 for data without labels.
    Raises: UserError for fewer than 2 images, or images that are not square, which no rotation keeps.
    """
    parts = [(shrink(images.cpu()), labels.cpu()) for images, labels in batches]
    if sum(len(labels) for _, labels in parts) < 2:
        raise UserError("the extractor needs at least 2 images to be trained")
    images, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    task, classes = ("labels", num_classes) if num_classes > 1 else ("rotations", 4)
    if task == "rotations" and images.shape[2] != images.shape[3]:
        raise UserError(f"the extractor: images without labels must be square, got {list(images.shape)}")
    order = torch.randperm(len(images), generator=random.generator(0, "extractor split"))
    held_out, trained = order.split([hold := max(1, len(order) // 10), len(order) - hold])
    chance = random.generator(0, "extractor")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random.key(0, "extractor weights"))
        network = ConvNet(About(images.shape[1], classes, task, 0.0))

    def examples(rows: Tensor) -> tuple[Tensor, Tensor]:
        return _turned(images[rows]) if task == "rotations" else (images[rows], labels[rows])

    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    steps = min(STEPS, max(LEAST, EPOCHS * len(trained) // BATCH))
    title = f"training an extractor on the data's {task}"
    with progress(None, title, "step", total=steps, brief=True) as shown:
        for step in range(steps):
            rate = min(1, (step + 1) / 20) * (1 - step / steps)
            optimizer.param_groups[0]["lr"] = RATE * rate
            rows = trained[torch.randint(len(trained), (BATCH,), generator=chance)]
            x, y = examples(rows)
            cross_entropy(network(x)[1], y, label_smoothing=0.05).backward()
            optimizer.step()
            optimizer.zero_grad()
            shown.update()
    network.eval().requires_grad_(False)
    right = 0
    for rows in held_out.split(BATCH):
        x, y = examples(rows)
        right += int((network(x)[1].argmax(1) == y).sum())
    digits = fingerprint(network.state_dict())
    network.about = About(images.shape[1], classes, task, right / len(held_out), digits)
    return network


def _turned(images: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates image i by i mod 4 quarter turns; returns the images, reordered, and their turns."""
    parts = [torch.rot90(images[turns::4], turns, (2, 3)) for turns in range(4)]
    return torch.cat(parts), torch.cat([torch.full((len(x),), turns) for turns, x in enumerate(parts)])


def save(network: ConvNet, path: Path) -> None:
    """Writes a network to a file of safetensors, whole or not at all; OSError if that fails."""
    state = {name: x.contiguous() for name, x in network.state_dict().items()}
    with naming(path), replacing(path) as temporary:
        save_file(state, temporary, {KEY: json.dumps(asdict(network.about))})


def is_convnet(path: Path) -> bool:
    """Tells whether a file of safetensors says that it holds such a network."""
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            return KEY in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def load(path: Path) -> ConvNet:
    """Reads a network that `save` wrote, onto the CPU; nothing is unpickled.

    Raises: UserError if the file is missing, of another form, or damaged.
    """
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            about: Any = json.loads((file.metadata() or {})[KEY])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        network = ConvNet(About(**about))
        network.load_state_dict(state)
        if fingerprint(network.state_dict()) != network.about.fingerprint:
            raise ValueError("its weights have changed since they were written")
    except FileNotFoundError as error:
        wanted = "wanted the extractor that imf.train keeps in a run's folder"
        raise UserError(f"{path}: no such file; {wanted}") from error
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: no extractor of a run can be read from it: {reason}; delete it, and "
            f"imf.train --resume trains it again"
        ) from error
    return network.eval().requires_grad_(False)

"""How fast packed latents reach training: sampled from their posteriors, normalised, in random order.

The record (`--benchmark-json`) has latents a second of the fastest round, as `latents/s`: of `fetch` by the
processor time of its one thread, of `Batches` by the clock.

    pytest benchmarks/data/bench_data.py --benchmark-only
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from imf import data
from imf.data.packed import PackedData
from imf.data.prepare.encoder import Encoder
from imf.data.prepare.form import Form
from imf.data.prepare.pack import pack
from imf.data.prepare.source import Source

IMAGES, BATCH = 16384, 1024  # 512 MiB of latents


class Noise(Encoder):
    """Latents of the size of 256 x 256 images, from no image."""

    kind, dtype, shape, row_shape = "latents", "float32", (4, 32, 32), (2, 4, 32, 32)
    about = {"mean": [0.0] * 4, "std": [1.0] * 4}  # noqa: RUF012

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.random.default_rng(0).random((len(images), *self.row_shape), np.float32)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedData:
    folder: Path = tmp_path_factory.mktemp("data")
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    size = (folder / "a.png").stat().st_size
    labels = np.arange(IMAGES) % 1000
    names = [str(label) for label in range(1000)]
    source = Source(folder, [("a.png", size)] * IMAGES, labels, names, lambda _: folder / "a.png")
    sizes = {"batch_size": 512, "shard_size": 2048, "workers": 2}
    return pack(source, folder / "out", Noise(), form=Form(8), **sizes)


@pytest.mark.benchmark(timer=time.thread_time)
def test_fetch(benchmark, packed: PackedData) -> None:
    """A batch by its rows, in the calling thread, whatever else keeps the machine busy."""
    steps = itertools.count()

    def fetch() -> torch.Tensor:
        rows = data.batch_indices(len(packed), BATCH, seed=0, step=next(steps))
        return packed.fetch(rows, torch.Generator().manual_seed(0))[0]

    x = benchmark.pedantic(fetch, rounds=20, warmup_rounds=16)  # an epoch brings all pages into memory
    assert x.shape == (BATCH, 4, 32, 32) and abs(float(x.mean()) - 0.5) < 0.01
    benchmark.extra_info["latents/s"] = round(BATCH / benchmark.stats.stats.min)


def test_batches(benchmark, packed: PackedData) -> None:
    """Batches one after another, made by the thread that works ahead."""
    with data.Batches(packed, batch_size=BATCH, seed=0, first=16, ahead=3) as batches:
        benchmark.pedantic(lambda: next(batches), rounds=20, warmup_rounds=16)
    benchmark.extra_info["latents/s"] = round(BATCH / benchmark.stats.stats.min)

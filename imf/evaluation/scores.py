"""Scores of a network's samples compared with the data that it learns, while and after it trains.

Features and classifier by the data: for scikit-learn's digits the pixels and an SVC, which are as good as any
there; for others the small network of `imf.evaluation.convnet`. Any extractor of `imf.evaluation.inception`
may give the features instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imf import random
from imf.distributed import DistributedContext
from imf.evaluation import convnet, inception, quality
from imf.evaluation.quality import Classifier, Features, Population
from imf.evaluation.samples import noise
from imf.model.config import config_of
from imf.model.sampler import generate
from imf.program import progress
from imf.sampling import to_uint8

SAMPLES = 1_800  # of the scores after training
REFERENCE = 10_000  # images of the data, at most, that samples are compared with
EXTRACTORS = "auto", "pixels", "network"  # that are no file
_BATCH = 64  # images of the data at a time
_COLUMNS = {
    "steps": ("steps", 5, ""),
    "frechet_distance": ("Fréchet distance", 16, ".3f"),
    "variance_ratio": ("variance", 8, ".3f"),
    "precision": ("precision", 9, ".3f"),
    "recall": ("recall", 6, ".3f"),
    "accuracy": ("accuracy", 8, ".3f"),
}


@dataclass(frozen=True)
class Score:
    """One row of the table: samples in `steps` network calls compared with the data.

    Others: as `imf.evaluation.quality.figures` returns them, None where there is no such figure.
    """

    steps: int
    frechet_distance: float
    variance_ratio: float | None
    precision: float | None
    recall: float | None
    accuracy: float | None = None

    @property
    def figures(self) -> dict[str, float]:
        """The figures that there are, by name."""
        return {name: x for name, x in asdict(self).items() if x is not None and name != "steps"}


@dataclass(frozen=True)
class Judge:
    """Judge of samples of one data set.

    features, classifier: see `imf.evaluation.quality`; no classifier for data without labels.
    of: what the features are.  classified_by, held_out: what the classifier is, "" for none, and its accuracy
    on data that it was not trained on.  data: at most `REFERENCE` images, evenly spaced.  labels: theirs [M].
    """

    features: Features
    classifier: Classifier | None
    of: str
    classified_by: str
    held_out: float | None
    data: Population
    labels: Tensor

    def labels_like(self, count: int) -> Tensor:
        """Returns labels [count] int64, sorted, in the proportions of the data's."""
        places = (2 * torch.arange(count) + 1) * len(self.labels) // (2 * count)
        return self.labels.sort().values[places]

    def score(self, samples: Tensor, labels: Tensor, steps: int, device: torch.device | str = "cpu") -> Score:
        """Scores samples [N, C, H, W] fp32, not clipped, of labels [N], that `steps` calls made.

        Raises: UserError unless all are finite.
        """
        batches = zip(samples.split(_BATCH), labels.split(_BATCH), strict=True)
        found = quality.observe(batches, self.features, self.classifier)
        figures: dict[str, Any] = quality.compare(found, self.data, device=device, quiet=False)
        return Score(steps, **figures)


def judge_of(
    dataset: Any,
    extractor: str = "auto",
    *,
    digits: bool = False,
    path: Path | None = None,
    device: torch.device | None = None,
) -> Judge:
    """Makes the judge of a data set (`imf.data.DataSet`) of images.

    extractor: "pixels", "network" (the small one), a file as `imf.evaluation.inception.load` takes it, or
        "auto", the first for the digits and the second for others.
    digits: whether the data are scikit-learn's digits, for which an SVC's settings are known.
    path: of the small network: read if it is there, else trained and written.
    Raises: UserError for an extractor that cannot be used, or a damaged file.
    """
    device = device or torch.device("cpu")
    rows = quality.spaced(torch.arange(len(dataset)), REFERENCE)

    def batches(title: str) -> Iterator[tuple[Tensor, Tensor]]:
        with progress(None, title, "image", total=len(rows), brief=True) as shown:
            for part in rows.split(_BATCH):
                yield dataset.fetch(part, random.generator(0, "reference", int(part[0])))
                shown.update(len(part))

    if extractor == "auto":
        extractor = "pixels" if digits else "network"
    own: convnet.RunExtractor | None = None
    if extractor == "network" or (dataset.num_classes > 1 and not digits):
        if path is not None and path.exists():
            network = convnet.load(path)
        else:
            network = convnet.train(batches("reading"), dataset.num_classes)
            if path is not None:
                convnet.save(network, path)
        own = convnet.RunExtractor(network.to(device))

    features: Features = quality.flat
    of = "pixels in [-1, 1]"
    if extractor == "network":
        assert own is not None
        features = _of_bytes(own)
        of = f"features of the run's own small network, trained on the data's {own.network.about.task}"
    elif extractor != "pixels":
        features, of = _of_bytes(inception.load(extractor, device)), f"features of {extractor}"

    classifier: Classifier | None = None
    classified_by, held_out = "", None
    if digits:
        images, labels = dataset.fetch(rows, random.generator(0, "reference"))
        classifier, held_out = svc(images, labels)
        classified_by = "an SVC"
    elif own is not None and own.network.about.task == "labels":
        classifier, held_out = _classes_of(own), own.network.about.held_out
        classified_by = "the run's own small network"

    data = quality.observe(batches("reference"), features)
    return Judge(features, classifier, of, classified_by, held_out, data, torch.cat(data.labels))


def _of_bytes(extractor: inception.Extractor) -> Features:
    """Features of images as a PNG stores them: clipped, in 8 bits, as `imf.evaluate` judges them."""
    return lambda images: extractor(to_uint8(images))[0]


def _classes_of(extractor: convnet.RunExtractor) -> Classifier:
    def classify(images: Tensor) -> Tensor:
        logits = extractor(to_uint8(images))[1]
        assert logits is not None
        return logits.argmax(1)

    return classify


def svc(images: Tensor, labels: Tensor) -> tuple[Classifier, float]:
    """Fits an SVC to the digits; returns it, and the accuracy on every fifth of one fitted to the others."""
    from sklearn.svm import SVC  # importing it takes a second

    def fitted(rows: Tensor) -> Any:
        # An RBF kernel of width 0.001 on pixels 0 ... 16 separates the digits; here they are 8 times smaller.
        return SVC(kernel="rbf", gamma=0.064, C=10.0).fit(x[rows].numpy(), labels[rows].numpy())

    x = images.flatten(1)
    rows = torch.arange(len(x))
    held_out = rows % 5 == 0
    checked = fitted(~held_out).score(x[held_out].numpy(), labels[held_out].numpy())
    whole = fitted(rows >= 0)

    def classify(images: Tensor) -> Tensor:
        return torch.from_numpy(whole.predict(images.cpu().flatten(1).numpy()))

    return classify, float(checked)


def sample(
    model: nn.Module,
    labels: Tensor,
    *,
    seed: int = 0,
    batch_size: int = 64,
    processes: DistributedContext | None = None,
    title: str = "samples",
    **options: Any,
) -> Tensor:
    """Samples an image per label [N] int64: [N, C, H, W] fp32 on the CPU of the first process.

    The noise of sample i is that of `imf.evaluate`, a function of (seed, i). Every process calls the network
    as often as the others, as FSDP2 needs it; those after the first get an empty tensor.
    options: of `imf.generate`.
    """
    processes = processes or DistributedContext()
    config = config_of(model)
    shape = config.in_channels, config.input_size, config.input_size
    count, share = len(labels), -(-len(labels) // processes.count)
    first = processes.rank * share
    own = torch.arange(first, first + share).clamp(max=count - 1)  # what is there twice is cut off below
    parts = []
    with progress(None, title, "image", total=share, brief=True, quiet=processes.rank > 0) as shown:
        for rows in own.split(batch_size):
            x = generate(model, noise(seed, rows.tolist(), shape), labels[rows], **options)
            parts.append(x.cpu())
            shown.update(len(rows))
    found = processes.gather(torch.cat(parts))
    return torch.cat(found)[:count] if found else torch.empty(0, *shape)


def table(scores: Sequence[Score]) -> str:
    """Formats the scores as aligned text; — where there is no figure."""
    lines = ["  ".join(f"{title:>{width}}" for title, width, _ in _COLUMNS.values())]
    for score in scores:
        values = ((getattr(score, name), width, form) for name, (_, width, form) in _COLUMNS.items())
        lines.append(
            "  ".join(f"{'—' if x is None else format(x, form):>{width}}" for x, width, form in values)
        )
    return "\n".join(lines)


def line(score: Score) -> str:
    """Formats the figures of one score as a line."""
    return ", ".join(f"{_COLUMNS[name][0]} {x:.3f}" for name, x in score.figures.items())

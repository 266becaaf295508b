"""Feature extractors: from images to the numbers that FID, IS, precision and recall are computed from.

No file is unpickled by Python. PyTorch's interpreter runs the program in a TorchScript file (`.pt`, `.ts`):
take one from a source that you trust. `.safetensors` and `.pth` (read with `weights_only`) are weights of
torch-fidelity's Inception-v3, the one of the published figures.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imf.evaluation import convnet
from imf.io import read_torch
from imf.program import UserError

FORMS = (
    "pixels, a run's folder (the small network in it), a TorchScript file (.pt, .ts), or weights of "
    "torch-fidelity's Inception (.pth, .safetensors)"
)
# Images [B, C, H, W] uint8 → features [B, D] fp32, and logits [B, K] fp32 where there are any.
Extractor = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def load(name: str, device: torch.device) -> Extractor:
    """Loads the extractor of that name, one of `FORMS`, onto `device`.

    Raises: UserError if there is none, its file cannot be read, or torch-fidelity is not installed; the
        extractor, if it fails on images or returns tensors of other shapes.
    """
    path = check(name)
    if path is None:
        return pixels
    if convnet.is_convnet(path):
        return convnet.RunExtractor(convnet.load(path).to(device))
    readers = {".pt": _torchscript, ".ts": _torchscript, ".pth": _inception, ".safetensors": _inception}
    return partial(_extract, path, readers[path.suffix](path, device), device)


def check(name: str) -> Path | None:
    """Returns the file of the extractor of that name, None for `pixels`; UserError if there is none."""
    if name == "pixels":
        return None
    path = Path(name)
    if path.is_dir():
        path = path / convnet.FILE
    if path.suffix == ".pt2":
        raise UserError(f"{path}: torch.export's files are unpickled when read; save it as TorchScript")
    if path.suffix not in (".pt", ".ts", ".pth", ".safetensors"):
        raise UserError(f"extractor must be {FORMS}, got {name!r}")
    if not path.is_file():
        raise UserError(f"{path}: no such file; the extractor must be {FORMS}")
    return path


def pixels(images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns the pixels themselves, in [-1, 1], as features [B, C H W]; for tests and the digits."""
    return images.flatten(1).float() / 127.5 - 1, None


@torch.no_grad()
def _extract(
    path: Path, network: Callable[[Tensor], Any], device: torch.device, images: Tensor
) -> tuple[Tensor, Tensor | None]:
    images = images.to(device)
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    try:
        result = network(images)
    except torch.OutOfMemoryError as error:
        raise UserError(f"--batch-size must be smaller than {len(images)} here: {error}") from error
    except RuntimeError as error:  # of the interpreter of TorchScript: its last line says why
        shape, reason = list(images.shape), " ".join(str(error).strip().splitlines()[-1:])
        raise UserError(f"{path}: the module fails on images {shape} uint8: {reason}") from error
    features, logits = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    outputs: dict[str, Any] = {"features": features} | ({} if logits is None else {"logits": logits})
    for name, value in outputs.items():
        fits = isinstance(value, Tensor) and not value.is_complex()
        if not fits or value.ndim != 2 or len(value) != len(images) or not value.shape[1]:
            got = f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"{path}: {name} must be [{len(images)}, width], got {got}")
    return features.float(), None if logits is None else logits.float()


def _torchscript(path: Path, device: torch.device) -> Any:
    """Loads a TorchScript module: images [B, 3, H, W] uint8 → features, or (features, logits).

    NVIDIA's Inception of StyleGAN2 and later (`inception-2015-12-05.pt`), known by its arguments, is called
    once for features and once for probabilities.
    """
    try:
        module: Any = torch.jit.load(path, map_location=device).eval()
        arguments = {argument.name for argument in module.forward.schema.arguments}
    except (RuntimeError, AttributeError) as error:
        raise UserError(f"{path}: no TorchScript module can be read from it: {error}") from error
    if {"return_features", "no_output_bias"} <= arguments:
        return lambda x: (module(x, return_features=True), module(x, no_output_bias=True).log())
    return module


def _inception(path: Path, device: torch.device) -> Any:
    """Builds torch-fidelity's Inception-v3: 2,048 features and the logits without bias, as published."""
    try:
        network = torch_fidelitys_inception()
    except ImportError as error:
        raise UserError(
            f"{path}: weights of Inception need torch-fidelity ({error}): "
            "pip install --no-deps torch-fidelity; a TorchScript extractor does not need it"
        ) from error
    file = io.BytesIO()  # torch-fidelity unpickles what it is given, so it gets what was just checked
    torch.save(read_torch(path), file)
    file.seek(0)
    outputs = ["2048", "logits_unbiased"]
    try:
        return network("inception-v3-compat", outputs, feature_extractor_weights_path=file).to(device)
    except RuntimeError as error:
        raise UserError(f"{path}: no weights of torch-fidelity's Inception: {error}") from error


def torch_fidelitys_inception() -> Any:
    """Imports the class of torch-fidelity's Inception-v3 without torchvision; ImportError if it is missing.

    The package's `__init__` imports torchvision, which its Inception does not use and CPU builds of PyTorch
    cannot import from PyPI.
    """
    name = "torch_fidelity"
    imported = name in sys.modules
    try:
        if not imported:
            if (spec := importlib.util.find_spec(name)) is None:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            sys.modules[name] = importlib.util.module_from_spec(spec)  # a package whose __init__ has not run
        return importlib.import_module(f"{name}.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    finally:
        if not imported:  # the next `import torch_fidelity` is a full one
            for module in [m for m in sys.modules if m.partition(".")[0] == name]:
                del sys.modules[module]

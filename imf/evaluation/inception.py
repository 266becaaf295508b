"""Feature extractors: what turns an image into the numbers that FID and IS are computed from.

No file is unpickled by Python. `.pt` and `.ts` are TorchScript: PyTorch's own interpreter runs the program in
them, so take one from a source that you trust. `.safetensors` and `.pth` (read with `weights_only`) are
weights of torch-fidelity's Inception-v3, the one of the published figures. torch.export's `.pt2` is unpickled
when it is read, and therefore refused.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import sys
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from imf.official.formats import read_torch
from imf.program import UserError

FORMS = "pixels, a TorchScript file (.pt, .ts), or weights of torch-fidelity's Inception (.pth, .safetensors)"


class Extractor(Protocol):
    """Images [B, C, H, W] uint8 → features [B, D] fp32, and logits [B, K] fp32 where there are any."""

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]: ...


def load(name: str, device: torch.device) -> Extractor:
    """The extractor of that name, on `device`: one of `FORMS`.

    Raises: UserError if there is none, its file cannot be read, or torch-fidelity is not installed.
    """
    if name == "pixels":
        return pixels
    path = Path(name)
    if path.suffix == ".pt2":
        raise UserError(f"{path}: torch.export's files are unpickled when read; save it as TorchScript")
    if path.suffix not in (".pt", ".ts", ".pth", ".safetensors"):
        raise UserError(f"extractor must be {FORMS}, got {name!r}")
    if not path.is_file():
        raise UserError(f"{path}: no such file; the extractor must be {FORMS}")
    if path.suffix in (".pt", ".ts"):
        return TorchScript(path, device)
    return Inception(path, device)


def pixels(images: Tensor) -> tuple[Tensor, Tensor | None]:
    """The pixels themselves, in [-1, 1], as features [B, C H W]; for tests and the digits."""
    return images.flatten(1).float() / 127.5 - 1, None


class TorchScript:
    """A TorchScript module that takes images [B, 3, H, W] uint8 and returns features, or (features, logits).

    A module with arguments `return_features` and `no_output_bias` is taken for NVIDIA's Inception of
    StyleGAN2 and later (`inception-2015-12-05.pt`): it is called once for features, once for probabilities.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device = path, device
        try:
            self.module: Any = torch.jit.load(path, map_location=device).eval()
            arguments = {argument.name for argument in self.module.forward.schema.arguments}
        except (RuntimeError, AttributeError) as error:
            raise UserError(f"{path}: no TorchScript module can be read from it: {error}") from error
        self.nvidia = {"return_features", "no_output_bias"} <= arguments

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        images = _three_channels(images.to(self.device))
        try:
            if self.nvidia:
                features = self.module(images, return_features=True)
                return _checked(self.path, images, features, self.module(images, no_output_bias=True).log())
            result = self.module(images)
        except torch.OutOfMemoryError as error:
            raise UserError(f"--batch-size must be smaller than {len(images)} here: {error}") from error
        except RuntimeError as error:  # of the interpreter of TorchScript: its last line says why
            shape, reason = list(images.shape), str(error).strip().splitlines()[-1:]
            raise UserError(
                f"{self.path}: the module fails on images {shape} uint8: {' '.join(reason)}"
            ) from error
        features, logits = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
        return _checked(self.path, images, features, logits)


class Inception:
    """torch-fidelity's Inception-v3: 2,048 features, and logits without bias, as in the published figures."""

    def __init__(self, path: Path, device: torch.device) -> None:
        try:
            network = torch_fidelitys_inception()
        except ImportError as error:
            raise UserError(
                f"{path}: weights of Inception need torch-fidelity ({error}): "
                "pip install --no-deps torch-fidelity; a TorchScript extractor does not need it"
            ) from error
        self.path, self.device = path, device
        try:
            state = read_torch(path)
            file = io.BytesIO()  # torch-fidelity unpickles what it is given: so it gets what was just checked
            torch.save(state, file)
            file.seek(0)
            module: nn.Module = network(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=file
            )
        except RuntimeError as error:
            raise UserError(f"{path}: no weights of torch-fidelity's Inception: {error}") from error
        self.module = module.to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        images = _three_channels(images.to(self.device))
        return _checked(self.path, images, *self.module(images))


def torch_fidelitys_inception() -> Any:
    """The class of torch-fidelity's Inception-v3, imported without torchvision; ImportError if it is missing.

    The package's own `__init__` imports torchvision, which its Inception does not use. PyPI's torchvision is
    built for CUDA: a CPU build of PyTorch cannot import it, and pip may replace PyTorch to fit it.
    """
    name = "torch_fidelity"
    before = sys.modules.get(name)
    try:
        if before is None:
            spec = importlib.util.find_spec(name)
            if spec is None:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            sys.modules[name] = importlib.util.module_from_spec(spec)  # a package whose __init__ has not run
        return importlib.import_module(f"{name}.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    finally:
        if before is None:  # the next `import torch_fidelity` is a full one
            for loaded in [m for m in sys.modules if m.partition(".")[0] == name]:
                del sys.modules[loaded]


def _three_channels(images: Tensor) -> Tensor:
    """Grey images become grey colour images."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def _checked(path: Path, images: Tensor, features: Any, logits: Any) -> tuple[Tensor, Tensor | None]:
    for name, value in (("features", features), ("logits", logits)):
        if value is None and name == "logits":
            continue
        fits = isinstance(value, Tensor) and not value.is_complex()
        if not fits or value.ndim != 2 or len(value) != len(images) or not value.shape[1]:
            got = f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"{path}: {name} must be [{len(images)}, width], got {got}")
    return features.float(), None if logits is None else logits.float()

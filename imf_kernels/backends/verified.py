"""Which kernels are verified on a device: by this repository's records, and by those of `imf_kernels.verify`.

A record of `imf_kernels.verify` is a JSON file in the user's cache. Its key names the processor or GPU, the
driver and the versions of PyTorch, Triton and this package; under another key it does not count. The records
of this repository, records.json, are by architecture. Importing reads nothing: the records of a device are
read once per process, when one of its calls first chooses a backend.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import platform
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import imf_kernels
from imf_kernels import _C
from imf_kernels.backends import triton_launch
from imf_kernels.backends.dispatch import FLASH, constant

ON_GPU = ("triton", "cuda")
Results = Mapping[str, Mapping[str, Mapping[str, "str | None"]]]


@dataclass(frozen=True)
class Record:
    """Results of `imf_kernels.verify` on one device.

    Attributes:
        key: what they hold for, see `key_of`.
        results: by operation, backend and dtype: what failed, or `None` where all passed.
        ratios: by operation, the time of `cuda` relative to Triton's.
    """

    key: Mapping[str, str]
    results: Results = field(default_factory=dict)
    ratios: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, key: Mapping[str, str]) -> Record:
        """Reads the record of a key; ValueError or OSError for a file that holds none."""

        def by_name(x: Any, depth: int, kinds: tuple[type, ...]) -> bool:
            if depth == 0:
                return isinstance(x, kinds)
            return isinstance(x, dict) and all(by_name(y, depth - 1, kinds) for y in x.values())

        if not path.is_file():
            raise ValueError("it is not a regular file")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or set(content) != {"key", "results", "ratios"}:
            raise ValueError("it is not a record of imf_kernels.verify")
        if content["key"] != key:
            raise ValueError(f"its key must be {key}, got {content['key']}")
        if not by_name(content["results"], 3, (str, type(None))) or not by_name(
            content["ratios"], 1, (float,)
        ):
            raise ValueError("results must be texts or null, and ratios numbers")
        return cls(**content)

    def write(self) -> Path:
        """Writes the record into the user's cache, complete or not at all, and returns its path."""
        path = path_of(self.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(vars(self), indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def failed(self) -> list[str]:
        """Returns "rms_norm (triton, bfloat16)", … of all kernels that failed."""
        return [
            f"{operation} ({backend}, {dtype})"
            for operation, backends in self.results.items()
            for backend, dtypes in backends.items()
            for dtype, failure in dtypes.items()
            if failure is not None and backend != "reference"
        ]


def devices() -> list[str]:
    """Returns the names of the processor and the GPUs: "cpu", "cuda:0", …"""
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()) if torch.cuda.is_available())]


@functools.cache
def key_of(device: str) -> dict[str, str]:
    """Returns what a record of a device, "cpu" or "cuda:0", holds for: hardware, driver, versions."""
    versions = {"torch": torch.__version__, "imf_kernels": imf_kernels.__version__}
    if device == "cpu":
        return {"device": f"{_processor()}, {_C.get_isa()}", **versions}
    versions["triton"] = triton_launch.missing() or importlib.import_module("triton").__version__
    name = f"{torch.cuda.get_device_name(device)}, {architecture(device)}"
    return {"device": name, "driver": _driver(), **versions}


def _processor() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return f"{platform.machine()} {platform.processor()}".strip()


def _driver() -> str:
    """Returns the version of NVIDIA's or AMD's kernel module, else of the CUDA that the driver offers."""
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        if found := re.search(r"\b\d+\.\d+(\.\d+)*", next(iter(_lines(path)), "")):
            return found[0]
    return str(getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")())


def _lines(path: str) -> list[str]:
    """Returns the first lines of a file of the system; none where it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.readlines(4096)
    except OSError:
        return []


def path_of(key: Mapping[str, str]) -> Path:
    """Returns the file of the record with this key, which need not exist."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = re.sub(r"[^a-z0-9]+", "-", key["device"].lower()).strip("-")
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return Path(folder) / "imf_kernels" / f"{name}-{digest[:8]}.json"


@functools.cache
def record_of(device: str) -> Record | None:
    """Returns this machine's record of a device; `None` without one, or with a warning if it is damaged."""
    path = path_of(key := key_of(device))
    try:
        return Record.read(path, key) if os.path.lexists(path) else None
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(
            f"imf_kernels: {path} is ignored: {error}. `python -m imf_kernels.verify` writes it again",
            stacklevel=2,
        )
        return None


@functools.cache
def committed() -> dict[str, list[str]]:
    """Returns the architectures that this repository verifies, and on each the operations for `cuda`."""
    return json.loads(Path(__file__).with_name("records.json").read_text(encoding="utf-8"))


def architecture(device: str) -> str:
    """Returns "sm_90", "gfx942", … of a GPU, "cpu" of the processor."""
    return "cpu" if device == "cpu" else triton_launch.architecture_of(torch.device(device).index)


def _tried(operation: str, backend: str, device: str) -> Mapping[str, str | None]:
    record = record_of(device)
    return {} if record is None else record.results.get(operation, {}).get(backend, {})


def reason(operation: str, backend: str, device: str, dtype: str) -> str | None:
    """Returns why a backend runs on the device only if named; `None` where it may be the default."""
    tried = _tried(operation, backend, device)
    if failure := tried.get(dtype):
        return f"it failed imf_kernels.verify, {path_of(key_of(device))}: {failure}"
    if backend == FLASH:
        return "it runs on request: its results have other last bits than those of calls with a tangent"
    if backend != "cuda":
        return None
    record = record_of(device)
    if record is not None and tried:
        is_faster = record.ratios.get(operation, 1.0) < 1
    else:
        is_faster = operation in committed().get(architecture(device), ())
    return None if is_faster else f"it runs on request, no record shows it faster on {architecture(device)}"


def on_request(operation: str, backend: str, asked: Any) -> str | None:
    """Returns the `reason` for tensors, and warns once per device of all that failed."""
    device = asked[0].device.type
    if device not in ("cpu", "cuda"):
        return None
    if device == "cuda":
        device = f"cuda:{asked[0].get_device()}"
    for x in asked:
        if isinstance(x, Tensor) and (found := _on_request(operation, backend, device, str(x.dtype))):
            return found
    return None


@constant
def _on_request(operation: str, backend: str, device: str, dtype: str) -> str | None:
    dtype = dtype.removeprefix("torch.")
    if _tried(operation, backend, device).get(dtype):
        _warn_of_failures(device)
    return reason(operation, backend, device, dtype)


@functools.cache
def _warn_of_failures(device: str) -> None:
    record = record_of(device)
    assert record is not None
    warnings.warn(
        f"imf_kernels: {', '.join(record.failed())} failed imf_kernels.verify on {record.key['device']} "
        f"and run only if named (backend=...), by the record {path_of(record.key)}",
        stacklevel=2,
    )


def warn_unverified(operation: str, backend: str, asked: Any) -> None:
    """Warns once per GPU of kernels that no record there tells of."""
    if backend in ON_GPU and asked[0].device.type == "cuda":
        _warn_unverified(operation, backend, f"cuda:{asked[0].get_device()}", str(asked[0].dtype))


@constant
def _warn_unverified(operation: str, backend: str, device: str, dtype: str) -> None:
    tried = dtype.removeprefix("torch.") in _tried(operation, backend, device)
    if not tried and architecture(device) not in committed():
        _warn_of_gpu(device)


@functools.cache
def _warn_of_gpu(device: str) -> None:
    warnings.warn(
        f"imf_kernels: the kernels have not been verified on {torch.cuda.get_device_name(device)} "
        f"({architecture(device)}); `python -m imf_kernels.verify` does it. "
        "backend='reference' is the plain PyTorch to compare with",
        stacklevel=2,
    )


def status(device: str) -> str:
    """Returns which record verifies a device, and what failed."""
    record = record_of(device)
    if record is not None:
        failed = ", ".join(record.failed()) or "none"
        return f"{len(record.results)} operations checked, {failed} failed, by {path_of(record.key)}"
    if architecture(device) in committed():
        return f"by this repository's record of {architecture(device)}"
    return "no record; `python -m imf_kernels.verify` makes one"

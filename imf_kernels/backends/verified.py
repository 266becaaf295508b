"""Which kernels are verified on a device: by this repository's records, and by those of `imf_kernels.verify`.

A record of `imf_kernels.verify` is a JSON file in the user's cache. Its key names the processor or GPU, the
driver and the versions of PyTorch, Triton and this package; under another key it does not count. The records
of this repository, records.json, are by architecture. Both hold for the kernels that they were made with:
what they say of an operation on a backend counts as long as the digest of its sources is the same. Importing
reads nothing: the records of a device are read once per process, when one of its calls first chooses a
backend.
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
from imf_kernels.backends import sources, triton_launch
from imf_kernels.backends.dispatch import FLASH, constant

ON_GPU = ("triton", "cuda")
_VERIFIES = "`python -m imf_kernels.verify` verifies what is installed"
Results = Mapping[str, Mapping[str, Mapping[str, "str | None"]]]


@dataclass(frozen=True)
class Record:
    """Results of `imf_kernels.verify`, or of this repository's tests, on one device.

    Attributes:
        key: what they hold for, see `key_of`; of a committed record, what it was made with.
        results: by operation, backend and dtype: what failed, or `None` where all passed.
        ratios: by operation, the time of `cuda` relative to Triton's.
        sources: by operation and backend, the digest of the kernels.
    """

    key: Mapping[str, str]
    results: Results = field(default_factory=dict)
    ratios: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

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
        if not isinstance(content, dict) or set(content) != {"key", "results", "ratios", "sources"}:
            raise ValueError("it is not a record of imf_kernels.verify")
        if content["key"] != key:
            raise ValueError(f"its key must be {key}, got {content['key']}")
        if not by_name(content["results"], 3, (str, type(None))) or not by_name(
            content["ratios"], 1, (float,)
        ):
            raise ValueError("results must be texts or null, and ratios numbers")
        if not by_name(content["sources"], 2, (str,)):
            raise ValueError("sources must be texts")
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

    def holds(self, operation: str, backend: str) -> bool:
        """Returns whether the kernels are those that the record was made with."""
        return self.sources.get(operation, {}).get(backend) == sources.digest(operation, backend)

    def failed(self) -> list[str]:
        """Returns "rms_norm (triton, bfloat16)", … of all kernels that failed and are still the same."""
        return [
            f"{operation} ({backend}, {dtype})"
            for operation, backends in self.results.items()
            for backend, dtypes in backends.items()
            for dtype, failure in dtypes.items()
            if failure is not None and backend != "reference" and self.holds(operation, backend)
        ]

    def changed(self) -> list[str]:
        """Returns "rms_norm (triton)", … of all kernels that are others than those of the record."""
        return [
            f"{operation} ({backend})"
            for operation, backends in self.results.items()
            for backend in backends
            if not self.holds(operation, backend)
        ]

    def made(self) -> str:
        """Returns what a committed record was made with: "NVIDIA H100, sm_90, imf_kernels 0.1.0, …"."""
        return ", ".join(v if name == "device" else f"{name} {v}" for name, v in self.key.items())


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
def committed() -> dict[str, Record]:
    """Returns this repository's records by architecture."""
    content = json.loads(Path(__file__).with_name("records.json").read_text(encoding="utf-8"))
    return {name: Record(**record) for name, record in content.items()}


def architecture(device: str) -> str:
    """Returns "sm_90", "gfx942", … of a GPU, "cpu" of the processor."""
    return "cpu" if device == "cpu" else triton_launch.architecture_of(torch.device(device).index)


def _record_for(operation: str, backend: str, device: str) -> Record:
    """Returns the record that tells of these kernels: this machine's, else this repository's, else none's."""
    for record in (record_of(device), committed().get(architecture(device))):
        if record and backend in record.results.get(operation, {}) and record.holds(operation, backend):
            return record
    return Record({})


def _tried(operation: str, backend: str, device: str) -> Mapping[str, str | None]:
    return _record_for(operation, backend, device).results.get(operation, {}).get(backend, {})


def reason(operation: str, backend: str, device: str, dtype: str) -> str | None:
    """Returns why a backend runs on the device only if named; `None` where it may be the default."""
    if failure := _tried(operation, backend, device).get(dtype):
        return f"it failed imf_kernels.verify, {path_of(key_of(device))}: {failure}"
    if backend == FLASH:
        return "it runs on request: its results have other last bits than those of calls with a tangent"
    if backend != "cuda":
        return None
    if _record_for(operation, backend, device).ratios.get(operation, 1.0) < 1:
        return None
    return f"it runs on request, no record of these kernels shows it faster on {architecture(device)}"


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
    """Warns once per GPU of kernels that no record tells of."""
    if backend in ON_GPU and asked[0].device.type == "cuda":
        _warn_unverified(operation, backend, f"cuda:{asked[0].get_device()}", str(asked[0].dtype))


@constant
def _warn_unverified(operation: str, backend: str, device: str, dtype: str) -> None:
    if dtype.removeprefix("torch.") not in _tried(operation, backend, device):
        _warn_of_gpu(device)


@functools.cache
def _warn_of_gpu(device: str) -> None:
    name = architecture(device)
    earlier = committed().get(name)
    warnings.warn(
        f"imf_kernels: the kernels have not been verified on {torch.cuda.get_device_name(device)} ({name})"
        f"{f' as they are now, but at an earlier version ({earlier.made()})' if earlier else ''}; "
        f"{_VERIFIES}. backend='reference' is the plain PyTorch to compare with",
        stacklevel=2,
    )


def status(device: str) -> str:
    """Returns which record verifies a device, what failed, and what has changed since."""
    if own := record_of(device):
        failed = ", ".join(own.failed()) or "none"
        text = f"{len(own.results)} operations checked, {failed} failed, by {path_of(own.key)}"
        return text + _since(own)
    if ours := committed().get(architecture(device)):
        text = f"by this repository's record ({ours.made()})"
        return f"{'at an earlier version, ' if ours.changed() else ''}{text}{_since(ours)}"
    return f"no record; {_VERIFIES}"


def _since(record: Record) -> str:
    changed = record.changed()
    if not changed:
        return ""
    names = "all kernels" if len(changed) == sum(map(len, record.results.values())) else ", ".join(changed)
    return f"; changed since: {names}; {_VERIFIES}"

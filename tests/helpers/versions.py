"""Tests the project under other versions of Python, PyTorch, Triton and the compiler, under other settings
of PyTorch's libraries and on other numbers of threads; prints a table.

    python -m tests.helpers.versions                        every row (`make test-versions`)
    python -m tests.helpers.versions 'python3.10*'          the rows of these names
    python -m tests.helpers.versions '*=*'  the settings: instructions of the libraries, threads
    python -m tests.helpers.versions --tests tests/transforms/test_jvp.py,tests/transforms/test_compile.py

Each row has a folder under build/versions, reused by the next run: a copy of the sources, so that no row
writes into this tree, an environment, and a log. A row that cannot run here says why and does not fail.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import functools
import os
import platform
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "versions"
NOT_COPIED = shutil.ignore_patterns(".*", "build", "runs", "*.so", "*.egg-info", "__pycache__")

# Run with another compiler: the tests that execute the compiled kernels.
OF_KERNELS = (
    "tests/ops/test_operations.py",
    "tests/ops/test_edge_cases.py",
    "tests/ops/test_any_shape.py",
    "tests/ops/test_attention_masks.py",
    "tests/ops/test_properties.py",
    "tests/backends/test_threads.py",
    "tests/csrc/test_vec.py",
)
# Run on an emulated processor: of those, the ones that take an instruction set or several threads.
ON_EMULATOR = (*OF_KERNELS, "-k", "neon or plain or number_of_threads or several_threads or side_by_side")
# Run with another Triton alone.
OF_TRITON = (
    "tests/backends/test_triton.py",
    "tests/backends/test_triton_compile.py",
    "tests/ops/test_operations.py",
)


class Missing(Exception):
    """A row needs something that this machine does not have."""


@dataclass
class Outcome:
    """The result of a row: what ran, how many tests ended how, and the first that failed."""

    versions: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    first_failure: str = ""


@dataclass
class Place:
    """A row's folder, and the tests to run instead of the fast ones, if any."""

    folder: Path
    tests: tuple[str, ...]

    @property
    def source(self) -> Path:
        return self.folder / "source"

    def copy_sources(self) -> None:
        """Replaces the copy of the sources; what CMake built there stays, for the next build to reuse."""
        self.source.mkdir(parents=True, exist_ok=True)
        for entry in self.source.iterdir():
            if entry.is_dir() and entry.name != "build":
                shutil.rmtree(entry)
            elif entry.is_file():
                entry.unlink()
        shutil.copytree(ROOT, self.source, ignore=NOT_COPIED, dirs_exist_ok=True)

    def run(self, *command: str | Path, check: bool = True, **environment: str) -> str:
        """Runs a command in the copy of the sources and returns its output, which the log gets too."""
        with open(self.folder / "log", "a+", errors="replace") as log:
            print("$", *command, file=log, flush=True)
            start = log.tell()
            done = subprocess.run(
                [str(part) for part in command],
                cwd=self.source,
                env={**os.environ, "PYTHONPATH": str(self.source), "OMP_WAIT_POLICY": "passive"}
                | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            log.seek(start)
            output = log.read()
        if check and done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, output)
        return output

    def test(self, python: Path, versions: str, tests: tuple[str, ...] = (), **environment: str) -> Outcome:
        """Runs the fast tests (of these files only, where some are given) and counts them."""
        report = self.folder / "report.xml"
        report.unlink(missing_ok=True)
        fast = ("-m", "not slow", "-n", "auto", "--maxprocesses", "8", "--dist", "loadfile")
        chosen = self.tests or tests
        command = (python, "-m", "pytest", *fast, f"--junitxml={report}", *chosen)
        output = self.run(*command, check=False, **environment)
        if not report.exists():
            return Outcome(versions, failed=1, first_failure=last_line(output))
        cases = list(xml.parse(report).iter("testcase"))
        failures = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
        skipped = sum(c.find("skipped") is not None for c in cases)
        names = [f"{c.get('classname', '').rpartition('.')[2]}::{c.get('name')}" for c in failures]
        passed = len(cases) - len(failures) - skipped
        return Outcome(versions, passed, len(failures), skipped, names[0] if names else "")


Row = Callable[[Place], Outcome]


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no output"


def interpreter(version: str) -> str:
    """The Python of this version on PATH, or among those of pyenv."""
    of_pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))
    for found in (shutil.which(f"python{version}"), *of_pyenv):
        question = "import ensurepip, venv, sys; print('%d.%d' % sys.version_info[:2])"
        if found and subprocess.run([found, "-c", question], capture_output=True).returncode == 0:
            return str(found)
    raise Missing(f"python{version} is neither on PATH nor in ~/.pyenv/versions")


def program(name: str) -> str:
    if found := shutil.which(name):
        return found
    raise Missing(f"{name} is not installed")


VERSIONS = """
import importlib.metadata as metadata, platform
print("Python", platform.python_version(), end="")
for name in ("torch", "triton", "numpy"):
    try:
        print(",", name, metadata.version(name), end="")
    except metadata.PackageNotFoundError:
        print(", no", name, end="")
"""


def installed(
    place: Place, *, python: str, torch: str, triton: str | None = None, tests: tuple[str, ...] = ()
) -> Outcome:
    """Tests the project installed with this Python and PyTorch.

    A `triton` is installed by a command of its own: pip refuses one that PyTorch's requirements exclude.
    """
    bin = place.folder / "environment" / "bin"
    if not (bin / "python").exists():
        subprocess.run([interpreter(python), "-m", "venv", bin.parent], check=True)
    place.copy_sources()
    pip = (bin / "python", "-m", "pip", "install", "-q", "--upgrade")
    place.run(*pip, torch, "-e", ".[dev]")
    if triton:
        place.run(*pip, triton)
    versions = last_line(place.run(bin / "python", "-c", VERSIONS))
    return place.test(bin / "python", versions, tests)


def compiled(place: Place, *, c: str, cxx: str) -> Outcome:
    """Tests the kernels built by another compiler, with the packages of the Python that runs this."""
    compilers = {"CC": program(c), "CXX": program(cxx)}
    place.copy_sources()
    tools = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # cmake and ninja
    place.run(sys.executable, "setup.py", "build_ext", "--inplace", PATH=tools, IMF_CUDA="OFF", **compilers)
    version = place.run(cxx, "--version").splitlines()[0]
    versions = last_line(place.run(sys.executable, "-c", VERSIONS))
    return place.test(Path(sys.executable), f"{version}, {versions}", OF_KERNELS)


def emulated(place: Place) -> Outcome:
    """Tests the kernels of 64-bit ARM processors on an emulated one (tests/helpers/remote_kernels.py)."""
    needed = program("aarch64-linux-gnu-g++"), program("qemu-aarch64")
    place.copy_sources()
    versions = ", ".join(place.run(name, "--version").splitlines()[0] for name in needed)
    command = last_line(place.run(sys.executable, "-m", "tests.helpers.remote_kernels", "build/aarch64"))
    return place.test(Path(sys.executable), versions, ON_EMULATOR, IMF_REMOTE_KERNELS=command)


def under(place: Place, **settings: str) -> Outcome:
    """Tests the project with these environment variables, with the Python and the kernels of this tree."""
    place.copy_sources()
    for module in (ROOT / "imf_kernels").glob("_C.*.so"):
        shutil.copy(module, place.source / "imf_kernels")
    versions = last_line(place.run(sys.executable, "-c", VERSIONS))
    return place.test(Path(sys.executable), versions, **settings)


# What PyTorch's libraries may do otherwise on another processor, and the number of threads.
SETTINGS: tuple[dict[str, str], ...] = (
    {"OMP_NUM_THREADS": "1"},
    {"OMP_NUM_THREADS": "3"},
    {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "OMP_NUM_THREADS": "2"},
    {"MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "2"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "2"},
    {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "2"},
)

OLDEST, MIDDLE, NEWEST = "torch==2.11.*", "torch==2.13.*", "torch"
ROWS: dict[str, Row] = {
    "python3.10 torch-2.11": functools.partial(installed, python="3.10", torch=OLDEST),
    "python3.11 torch-2.13": functools.partial(installed, python="3.11", torch=MIDDLE),
    "python3.12 torch-newest": functools.partial(installed, python="3.12", torch=NEWEST),
    "python3.13 torch-newest": functools.partial(installed, python="3.13", torch=NEWEST),
    "python3.14 torch-newest": functools.partial(installed, python="3.14", torch=NEWEST),
    # Triton 3.6 comes with PyTorch 2.11, there with the NumPy of Python 3.10; here with the newest one.
    "triton-3.6 numpy-newest": functools.partial(
        installed, python="3.11", torch=MIDDLE, triton="triton==3.6.*", tests=OF_TRITON
    ),
    "triton-newest": functools.partial(
        installed, python="3.13", torch=NEWEST, triton="triton", tests=OF_TRITON
    ),
    "g++-11": functools.partial(compiled, c="gcc-11", cxx="g++-11"),
    "clang": functools.partial(compiled, c="clang", cxx="clang++"),
    "aarch64": emulated,
    **{
        " ".join(f"{name}={value}" for name, value in settings.items()): functools.partial(under, **settings)
        for settings in SETTINGS
    },
}


def outcome(name: str, tests: tuple[str, ...]) -> tuple[str, Outcome]:
    """Runs a row; returns its state in a word and its outcome. A failed installation fails this row alone."""
    place = Place(FOLDER / name.replace(" ", "-"), tests)
    place.folder.mkdir(parents=True, exist_ok=True)
    (place.folder / "log").unlink(missing_ok=True)
    try:
        found = ROWS[name](place)
    except Missing as reason:
        return "missing", Outcome(str(reason))
    except subprocess.CalledProcessError as error:
        command = " ".join(map(str, error.cmd[:6]))
        return "failed", Outcome("", failed=1, first_failure=f"{command} …: {last_line(error.output or '')}")
    return ("failed" if found.failed else "passed"), found


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("rows", nargs="*", default=["*"], metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--tests", default="", help="these instead of the fast ones, separated by commas")
    options = parser.parse_args()
    names = [name for name in ROWS if any(fnmatch.fnmatch(name, pattern) for pattern in options.rows)]
    if not names:
        parser.error(f"no row fits {options.rows}; there are {', '.join(ROWS)}")
    print(f"Processor: {processor()}\n")
    print("| row | versions | result | passed | failed | skipped | first failure |")
    print("| --- | --- | --- | ---: | ---: | ---: | --- |", flush=True)
    states = []
    for name in names:
        state, found = outcome(name, tuple(filter(None, options.tests.split(","))))
        states.append(state)
        numbers = f"{found.passed} | {found.failed} | {found.skipped}"
        print(f"| {name} | {found.versions} | {state} | {numbers} | {found.first_failure} |", flush=True)
    return int("failed" in states)


if __name__ == "__main__":
    sys.exit(main())

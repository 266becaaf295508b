"""The package from outside: what it ships, what it needs, and how much importing it takes."""

import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import imf
import imf_kernels

ROOT = Path(__file__).parents[2]
# python -m <module>
COMMANDS = ("imf.train", "imf.sample", "imf.evaluate", "imf.convert", "imf.data.prepare")
COMMANDS += ("imf_kernels.info", "imf_kernels.verify")
# Each takes up to a second to import, so nothing imports them before it needs them.
SLOW = (
    "sklearn",
    "scipy",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
    "tensorboard",
    "matplotlib",
    "diffusers",
)
# imf's, and Triton, which PyTorch's CPU build does without.
NOT_FOR_KERNELS = (
    *("numpy", "scipy", "safetensors", "sklearn", "PIL", "tensorboard", "tqdm"),
    *("pytest", "pytest_benchmark", "triton", "imf"),
)


def run(*command, **options):
    """The output of a program that must succeed."""
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=1800, **options
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_help_imports_nothing_slow():
    script = """
import contextlib, importlib, os, sys
for name in sys.argv[1].split():
    module = importlib.import_module(name)
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(open(os.devnull, "w")):
        if hasattr(module, "main"):
            module.main(["--help"])
print(*(name for name in sys.argv[2].split() if name in sys.modules))
"""
    assert run(sys.executable, "-c", script, " ".join(COMMANDS), " ".join(SLOW)).split() == []


KERNELS = """
import torch, imf_kernels as ik
x, x_dot = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
weight = torch.ones(16, requires_grad=True)
y = ik.rms_norm(ik.Dual(x, x_dot), weight, backend="cpu")
_, expected = torch.func.jvp(lambda x: ik.rms_norm(x, weight.detach(), backend="reference"), (x,), (x_dot,))
torch.testing.assert_close(y.tangent.detach(), expected)
y.primal.sum().backward()
assert weight.grad.isfinite().all()
"""


def test_the_kernels_need_torch_alone():
    script = f"""
import sys
for name in {NOT_FOR_KERNELS!r}:
    sys.modules[name] = None  # importing it raises ImportError
{KERNELS}
u, du = ik.jvp(torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU()), (x,), (x_dot,))
assert du.shape == u.shape
print("fine")
"""
    assert run(sys.executable, "-W", "ignore:Failed to initialize NumPy", "-c", script) == "fine\n"


def test_one_version():
    assert imf.__version__ == imf_kernels.__version__
    assert f"\nversion: {imf.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def source_distribution(folder):
    """The archive of a copy of the sources to which files have come that belong to this machine alone."""
    tree = folder / "tree"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "imf", "imf_kernels", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, tree)
    for name in ("imf_kernels/_C.none.so", "imf_kernels/__pycache__/x.pyc", "build/x.o", "runs/x/x.json"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    run(
        *(
            sys.executable,
            "-c",
            "from setuptools import build_meta as b; import sys; b.build_sdist(sys.argv[1])",
        ),
        folder,
        cwd=tree,
    )
    (archive,) = folder.glob("*.tar.gz")
    return archive


def test_the_source_distribution_holds_what_a_build_needs(tmp_path):
    pytest.importorskip("pybind11", reason="pybind11 is not installed")
    archive = source_distribution(tmp_path)
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames() if not file.getmember(name).isdir()}
    needed = {
        str(path.relative_to(ROOT))
        for folder in ("csrc", "imf", "imf_kernels")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc")
    }
    needed |= {
        "CMakeLists.txt",
        "pyproject.toml",
        "setup.py",
        "README.md",
        "LICENSE",
        "NOTICE",
        "MANIFEST.in",
    }
    assert needed - names == set()
    made = {name for name in names - needed if ".egg-info/" not in name}
    assert made == {"CITATION.cff", "PKG-INFO", "setup.cfg"}


def clean_environment(folder, requirements):
    """An environment with what `requirements` need and nothing else, as links to the packages of this one.

    Nothing is downloaded, and a requirement that is not named is missing. Returns its interpreter.
    """
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    target = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    waiting, done = list(requirements), set()
    while waiting:
        requirement = waiting.pop()
        name = canonical(requirement)
        if name in done or ("extra ==" in requirement):
            continue
        done.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another system, says its marker; else pip's check finds it missing
        waiting += distribution.requires or []
        for top in {path.parts[0] for path in distribution.files or ()} - {"..", "__pycache__"}:
            link = target / top
            if not link.exists():
                link.symlink_to(distribution.locate_file(top))
    return python


def canonical(requirement):
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def test_benchmarks_start_with_the_requirements_alone(tmp_path):
    """`pytest benchmarks/ --benchmark-only` after a plain `pip install -e .`, as far as collecting them."""
    python = clean_environment(tmp_path / "environment", importlib.metadata.requires("imf-kernels"))
    # Of this suite's own workers it must not know: beside them benchmarks are disabled.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    listed = run(
        *(python, "-m", "pytest", "benchmarks", "--benchmark-only", "--collect-only", "-q"),
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
    )
    assert "bench_operations.py::" in listed and "bench_step.py::" in listed


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="makes links")
def test_source_distribution_to_training(tmp_path):
    """sdist → wheel → an environment with the requirements alone → information, a kernel, two steps."""
    pytest.importorskip("pybind11", reason="pybind11 is not installed")
    pip = (sys.executable, "-m", "pip", "--quiet")
    wheels = tmp_path / "wheels"
    run(
        *pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", wheels,
        source_distribution(tmp_path),
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "IMF_CUDA": "OFF"},
    )  # fmt: skip
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as file:
        (metadata,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        fields = email.message_from_bytes(file.read(metadata))
    assert fields["Version"] == imf_kernels.__version__

    python = clean_environment(tmp_path / "environment", fields.get_all("Requires-Dist"))
    # --no-index: what is missing of the requirements is an error.
    run(python, "-m", "pip", "--quiet", "install", "--no-index", wheel)
    outside = {
        "cwd": tmp_path,
        "env": {name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    }
    where = run(python, "-c", "import imf_kernels._C as c, imf; print(c.__file__, imf.__file__)", **outside)
    assert where.count(str(tmp_path / "environment")) == 2
    assert "instruction sets" in run(python, "-m", "imf_kernels.info", **outside)
    run(python, "-c", KERNELS, **outside)
    run(python, "-m", "imf.train", "--steps", "2", "--depth", "2", "--aux-head-depth", "1", **outside)
    assert (tmp_path / "runs" / "digits" / "results.json").exists()

"""The package from outside: how much importing it takes."""

import subprocess
import sys

# With a program of their own: python -m <module>.
COMMANDS = ("imf.train", "imf.sample", "imf.evaluate", "imf.convert", "imf.data.prepare", "imf_kernels.info")
# A second each to import, so nothing imports them before it needs them.
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


def python(script, *arguments, **options):
    """The output of a script in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=300, **options
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


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
    assert python(script, " ".join(COMMANDS), " ".join(SLOW)).split() == []

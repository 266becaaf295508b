"""Commands in documents, parsed by the programs that they call but not run; shared by test_docs.py."""

import argparse
import functools
import inspect
import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

from torch.distributed.run import get_args_parser

ROOT = Path(__file__).parents[2]
SHELL = ("bash", "console")


class Fence(NamedTuple):
    """A fenced block: its language, the rest of the info string, its text and the line of the fence."""

    language: str
    info: str
    text: str
    line: int


def fences(page):
    text = page.read_text()
    for match in re.finditer(r"^( *)```(\w*) *(.*)\n((?:.*\n)*?)\1```$", text, re.MULTILINE):
        yield Fence(match[2], match[3], inspect.cleandoc(match[4]), text[: match.start()].count("\n") + 1)


class Parsed(BaseException):
    """Raised where a program has parsed its arguments, instead of running it."""


def parse(run):
    """Runs a program up to the point where its arguments are parsed; AssertionError if they are wrong."""

    def stop(parser, args=None, namespace=None):
        original(parser, args, namespace)
        raise Parsed

    original = argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = stop
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of runpy: the module was imported before
            run()
    except Parsed:
        return
    except SystemExit as end:
        assert end.code == 0, f"{sys.argv}: the program refuses these arguments"
        return
    finally:
        argparse.ArgumentParser.parse_args = original
    raise AssertionError(f"{sys.argv}: the program parses no arguments")


def source(module):
    return Path(pkgutil.resolve_name(module).__file__).read_text()


def check_python(words):
    if words[0] != "-m":
        script = ROOT / words[0]
        assert script.is_file(), f"{words[0]}: no such file"
        if "argparse" in script.read_text():
            sys.argv, sys.path[:0] = [str(script), *words[1:]], [str(script.parent), str(ROOT / "tests")]
            parse(functools.partial(runpy.run_path, str(script), run_name="__main__"))
        return
    module, *arguments = words[1:]
    sys.argv = [module, *arguments]
    if module == "imf_kernels.info":
        assert not arguments and pkgutil.resolve_name(module)
    elif module == "pytest":
        check_pytest(arguments)
    elif module.startswith(("tests.", "benchmarks.")) and "argparse" not in source(module):
        assert not arguments[1:], f"python -m {module} takes one argument at most"
    else:
        parse(functools.partial(runpy.run_module, module, run_name="__main__", alter_sys=True))


def check_torchrun(words):
    sys.argv = ["torchrun", *words]
    try:
        given = get_args_parser().parse_args(words)
    except SystemExit as end:
        raise AssertionError(f"torchrun {words}: refused") from end
    check_python([*(["-m"] if given.module else []), given.training_script, *given.training_script_args])


@functools.cache
def pytest_options():
    command = [sys.executable, "-m", "pytest", str(ROOT / "benchmarks"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, cwd=ROOT)
    return set(re.findall(r"(?<![\w-])--?[\w-]+", result.stdout))


def check_pytest(words):
    waiting = iter(words)
    for word in waiting:
        option = word.partition("=")[0]
        if not word.startswith("-"):
            assert (ROOT / word.partition("::")[0]).exists(), f"pytest {word}: no such file"
        else:
            assert option in pytest_options(), f"pytest {option}: no such option"
            if option in ("-m", "-k", "-n", "-p", "--dist", "--benchmark-json") and "=" not in word:
                next(waiting)


def check_make(words):
    makefile = (ROOT / "Makefile").read_text()
    for name in (word.partition("=")[0] for word in words if "=" in word):
        assert f"$({name})" in makefile, f"make {name}=: the Makefile does not read it"
    # `make test ARGS=…` hands its variables to every make below it.
    kept = {name: value for name, value in os.environ.items() if name not in ("ARGS", "MAKEFLAGS")}
    command = ["make", "-n", *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=kept)
    assert result.returncode == 0, result.stderr
    for line in result.stdout.splitlines():
        if re.match(r"\.venv/bin/python -m (imf|tests|benchmarks)[^|]*$", line):
            check_python(shlex.split(line)[1:])


def check_pip(words):
    assert words[0] == "install"
    project = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"\.\[([\w,]+)\]", " ".join(words)):
        for name in extra.split(","):
            assert re.search(rf"^{name} = \[", project, re.MULTILINE), f"pip install .[{name}]: no such extra"


def check_program(words):
    checks = {"torchrun": check_torchrun, "pytest": check_pytest, "make": check_make, "pip": check_pip}
    while re.match(r"\w+=", words[0]):
        words = words[1:]
    program, *arguments = words
    if program in ("python", "python3"):
        check_python(arguments)
    elif program in checks:
        checks[program](arguments)
    elif program not in ("cd", "git"):
        assert os.access(ROOT / program, os.X_OK), f"{program}: no check for this program"


def split(line):
    """The commands of a line, each as its words, without prompt and comment."""
    lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    words = []
    for word in [*lexer, ";"]:
        if word not in (";", "&&", "||", "|"):
            words.append(word)
        elif words:
            yield words
            words = []


def commands(page):
    """The commands of a page's shell blocks, and those in its sentences that leave nothing out."""
    text = page.read_text()
    for fence in fences(page):
        if fence.language in SHELL:
            for line in fence.text.replace("\\\n", " ").splitlines():
                yield from split(line)
    prose = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)
    begins = (
        r"(?:\w+=\S+ )?(?:python (?:-m imf|benchmarks/|tests/|docs/|examples/)|pytest |make |torchrun |pip )"
    )
    for span in re.findall(rf"`({begins}[^`…]+)`", prose):
        for words in split(span.replace("\n", " ")):
            named = len(words) == 3 and words[:2] == ["python", "-m"] and words[2] != "imf_kernels.info"
            yield (
                [*words, "--help"] if named else words
            )  # a sentence may name a program without its arguments

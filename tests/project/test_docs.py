"""The documents: Python blocks run, commands are parsed by their programs, links and names exist."""

import pkgutil
import re
import shlex
import sys
import types

import pytest
import torch

import imf
import imf_kernels as ik
from imf_kernels.backends import dispatch, verified
from imf_kernels.backends.operators import OPERATIONS
from tests.helpers.doc_commands import ROOT, check_program, commands, fences

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
PUBLIC = [
    "Draws",
    "Guidance",
    "IMFConfig",
    "TrainConfig",
    "adapt",
    "build",
    "export_sampler",
    "fit",
    "generate",
]
PUBLIC += ["improved_mean_flow", "load"]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_python_blocks(page, tmp_path, monkeypatch, capsys):
    """One namespace per page; a block `output` is what the block before it prints; `skip="why"` skips one."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace, ran, skipped = {}, 0, []
    for fence in fences(page):
        if fence.language == "output":
            assert capsys.readouterr().out.strip() == fence.text.strip(), f"{page.name}:{fence.line}"
        if fence.language != "python":
            continue
        if fence.info:
            (reason,) = re.fullmatch(r'skip="(.+)"', fence.info).groups()
            skipped.append(f"line {fence.line}: {reason}")
        else:
            capsys.readouterr()
            exec(compile("\n" * fence.line + fence.text, str(page), "exec"), namespace)
            ran += 1
    if skipped:
        print(f"{page.name}: skipped {'; '.join(skipped)}")
    if skipped and not ran:
        pytest.skip("; ".join(skipped))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", sys.path[:])
    assert all(fence.language for fence in fences(page)), "a block without a language"
    for words in commands(page):
        check_program(words)


@pytest.mark.parametrize(
    "command",
    [
        "python -m imf.train --stepps 2",
        "python -m imf.train --preset iMF-C/2",
        "python -m imf.data.prepare IN OUT --size large",
        "torchrun --processes 8 -m imf.train",
        "torchrun --nproc-per-node 8 -m imf.train --widths 3",
        "python -m benchmarks.tools.report --recrd x.json y.json",
        "python benchmarks/no_such_file.py",
        "python -m imf_kernels.info --verbose",
        "pytest benchmarks/training/bench_step.py --benchmark-alone",
        "pytest tests/test_nothing.py",
        "make trian",
        "make train ARGS='--stepps 2'",
        "make train ARG='--steps 2'",
        "pip install -e '.[everything]'",
        "imf-train --steps 2",
    ],
)
def test_a_wrong_command_is_found(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", sys.path[:])
    with pytest.raises((AssertionError, ModuleNotFoundError)):
        check_program(shlex.split(command))


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_files_and_names(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            linked = (page.parent / file).resolve() if file else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target
    if page.name == "CHANGELOG.md":
        return
    folders = "csrc|imf|imf_kernels|tests|benchmarks|docs|examples"
    for file in re.findall(
        rf"(?<![\w/.])((?:{folders})/[\w/.-]+\.(?:py|pyi|sh|md|h|cpp|cu|cuh|json))\b", text
    ):
        assert (ROOT / file).exists(), f"{file} does not exist"
    for name in re.findall(r"(?<![\w/.])((?:imf|imf_kernels)(?:\.[A-Za-z_]\w*)+)(?![\w/])", text):
        if not name.endswith((".pyi", ".so", ".py")):
            pkgutil.resolve_name(name)


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in ROOT.glob("docs/*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


def test_no_page_repeats_another():
    seen = {}
    for page in PAGES:
        for line in page.read_text().splitlines():
            if len(line) > 80 and not line.startswith("| ---"):
                assert seen.setdefault(line, page) == page, f"{page.name} and {seen[line].name}: {line}"


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 900
    assert "import imf_kernels as ik" in text.splitlines()[:40]
    assert len((ROOT / "docs" / "style.md").read_text().splitlines()) <= 60


def test_the_table_of_operations_is_what_is_registered():
    rows = {}
    for line in (ROOT / "docs" / "operations.md").read_text().splitlines():
        if line.startswith("| `"):
            name, _, *marks = (cell.strip() for cell in line.strip("|").split("|"))
            rows[name.strip("`")] = marks
    for operation in OPERATIONS.values():
        has = {backend.name for backend in operation.backends}
        marks = dict(zip(dispatch.NAMES, rows[operation.public], strict=True))
        assert {name for name, mark in marks.items() if mark} == has, operation.name
        assert marks["cuda"] in ("", "on request") or any(verified.committed().values())
    assert set(rows) - {"linear_map"} == {operation.public for operation in OPERATIONS.values()}


def test_public_names_of_imf_kernels():
    names = {name for name, value in vars(ik).items() if not isinstance(value, types.ModuleType)}
    assert sorted(ik.__all__) == sorted(name for name in names if not name.startswith("_"))
    assert sorted(ik.__all__) == [
        *("Dual", "cat", "checkpoint", "explain", "gated_residual", "gated_residual_rms_norm", "gelu"),
        *("group_norm", "jvp", "layer_norm", "layer_norm_modulate", "linear", "linear_map"),
        *("prepend_tokens", "primal", "qk_norm_rope"),
        *("rms_norm", "rope_tables", "scaled_dot_product_attention", "silu", "sinusoidal_embedding"),
        *("swiglu", "use_backend"),
    ]


def test_public_names_of_imf():
    assert sorted(imf.__all__) == PUBLIC
    assert all(getattr(imf, name).__doc__ for name in PUBLIC) and set(PUBLIC) <= set(dir(imf))


def test_load(tmp_path):
    """A run's folder or a checkpoint, as text or as a path: the averaged network."""
    from imf import train

    small = (
        "--hidden-size 16 --depth 2 --num-heads 2 --aux-head-depth 1 --steps 1 --sample-every 0 --threads 1"
    )
    assert train.main([*small.split(), "--runs", str(tmp_path), "--no-tensorboard"]) == 0
    (file,) = (tmp_path / "digits" / "checkpoints").glob("*.safetensors")
    for path in (tmp_path / "digits", str(tmp_path / "digits"), file, str(file)):
        network = imf.load(path)
        assert network.config.hidden_size == 16 and network.generate([3, 7]).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="no such file or folder"):
        imf.load(tmp_path / "nothing")


def test_the_public_ci():
    yaml = pytest.importorskip("yaml", reason="pip install pyyaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    jobs = workflow["jobs"]
    assert set(workflow[True]) >= {"push", "pull_request"}  # YAML 1.1 reads the key `on` as true
    makefile = (ROOT / "Makefile").read_text()
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = {target for run in runs for target in re.findall(r"\bmake ([\w-]+)", run)}
    assert targets >= {"lint", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    used = set(re.findall(r"\$\{\{ matrix\.(\w+) \}\}", str(jobs)))
    matrix = jobs["test"]["strategy"]["matrix"]
    added = matrix.pop("include")
    tried = {key: {*values, *(row[key] for row in added)} for key, values in matrix.items()}
    assert used <= set(tried) and all(set(row) == set(matrix) for row in added)
    assert tried["python"] == {"3.10", "3.11", "3.12", "3.13"} and tried["torch"] == {"2.11.0", "2.13.0"}
    assert tried["cxx"] == {"g++", "clang++"} and any(name.startswith("macos") for name in tried["os"])

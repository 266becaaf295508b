"""Which kernels the committed records of GPUs verify: benchmarks/tools/verified.py."""

import json

import pytest

from benchmarks.tools import verified
from imf_kernels.backends.verified import Record, committed

MACHINE = "commit 0123456789abcdef\nname, driver_version\nNVIDIA A GPU, 580.1, 81559 MiB, 9.0, 1980 MHz\n"
SDPA = verified.ATTENTION
PASSED = f"""
<testcase classname="tests.ops.test_operations" name="test_error_rule[{SDPA} digits, bfloat16-cuda]" />
<testcase classname="tests.ops.test_operations" name="test_error_rule[{SDPA} digits, bfloat16-triton]" />
<testcase classname="tests.ops.test_operations" name="test_error_rule[silu vector, float32-triton]" />
<testcase classname="tests.ops.test_sizes" name="test_sizes[triton-silu]"><skipped /></testcase>
"""


def failed(name, module="tests.ops.test_operations"):
    return f'<testcase classname="{module}" name="{name}"><failure /></testcase>'


@pytest.fixture
def says(tmp_path):
    """What a record of these tests, exit code of the tests, and seconds by cuda and by Triton says."""

    def ask(tests=PASSED, code=0, cuda=1.0, triton=2.0):
        record = tmp_path / "results" / "a-gpu"
        record.mkdir(parents=True, exist_ok=True)
        (record / "machine.txt").write_text(MACHINE)
        (record / "stages.tsv").write_text(f"stage\texit code\tseconds\nbuild\t0\t9\ntests\t{code}\t9\n")
        (record / "tests.xml").write_text(f"<testsuites>{tests}</testsuites>")
        about = {"operation": SDPA, "case": "digits", "dtype": "bf16"}
        seconds = {"cuda": cuda, "triton": triton}
        figures = [
            about | {"form": f"{form}, {backend}", "seconds": s}
            for form in ("dual", "primal")
            for backend, s in seconds.items()
        ]
        (record / "benchmarks.json").write_text(json.dumps({"figures": figures}))
        digests = {name: {"triton": "1", "cuda": "2"} for name in (SDPA, "silu", "gelu")}
        (record / "sources.json").write_text(json.dumps({"imf_kernels": "0.1.0", "sources": digests}))
        found = json.loads(verified.text(record.parent))
        return Record(**found["sm_90"]) if found else None

    return ask


def test_an_architecture_is_verified_by_the_tests_of_the_operations(says):
    record = says()
    assert record.made() == "NVIDIA A GPU, sm_90, imf_kernels 0.1.0, commit 0123456"
    assert record.results == {
        SDPA: {"triton": {"bfloat16": None}, "cuda": {"bfloat16": None}},
        "silu": {"triton": {"float32": None}},
    }
    assert record.sources == {SDPA: {"triton": "1", "cuda": "2"}, "silu": {"triton": "1"}}
    elsewhere = failed("test_average[triton]", "tests.backends.test_moving_average")
    assert says(PASSED + elsewhere, code=1) == record
    assert says(PASSED + failed("test_error_rule[gelu vector, float32-triton]"), code=1) is None
    assert says(code=2) is says(code="no time left") is None  # not to the end
    assert says(tests="") is None


def test_cuda_is_the_default_where_it_passed_and_is_faster(says):
    assert says().ratios == {SDPA: 0.5} and says(cuda=2.5).ratios == {SDPA: 1.25}
    record = says(PASSED + failed(f"test_error_rule[{SDPA} x, float16-cuda]"), code=1)
    assert record.ratios == {} and "cuda" not in record.results[SDPA]


def test_the_package_has_what_the_committed_records_say():
    assert verified.TARGET.read_text() == verified.text(verified.RESULTS)


@pytest.mark.parametrize("page", ["README.md", "docs/gpu.md"])
def test_the_documents_say_whether_kernels_have_changed_since(page):
    """Of each committed record: at which commit it was made, and whether it holds for these kernels."""
    text = " ".join((verified.ROOT / page).read_text().split())
    for record in committed().values():
        since = " and changed since" if record.changed() else ""
        assert f"at commit {record.key['commit']}{since}" in text, page

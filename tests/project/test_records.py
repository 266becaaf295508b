"""Which kernels the committed records of GPUs verify: benchmarks/tools/verified.py."""

import json

import pytest

from benchmarks.tools import verified

MACHINE = "name, driver_version\nNVIDIA A GPU, 580.1, 81559 MiB, 9.0, 1980 MHz\n"
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
        return json.loads(verified.text(record.parent))

    return ask


def test_an_architecture_is_verified_by_the_tests_of_the_operations(says):
    assert says() == {"sm_90": [SDPA]}
    elsewhere = failed("test_average[triton]", "tests.backends.test_moving_average")
    assert says(PASSED + elsewhere, code=1) == {"sm_90": [SDPA]}
    assert says(PASSED + failed("test_error_rule[gelu vector, float32-triton]"), code=1) == {}
    assert says(code=2) == says(code="no time left") == {}  # not to the end
    assert says(tests="") == {}


def test_cuda_is_the_default_where_it_passed_and_is_no_slower(says):
    assert says(cuda=2.1) == {"sm_90": []}
    assert says(PASSED + failed(f"test_error_rule[{SDPA} x, float16-cuda]"), code=1) == {"sm_90": []}


def test_the_package_has_what_the_committed_records_say():
    assert verified.TARGET.read_text() == verified.text(verified.RESULTS)

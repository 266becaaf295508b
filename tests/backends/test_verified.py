"""Records of `imf_kernels.verify`: what they turn off, what they make the default, which do not count."""

import functools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import imf_kernels as ik
from imf_kernels import info
from imf_kernels.backends import sources, verified
from imf_kernels.backends.operators import OPERATIONS
from imf_kernels.backends.verified import Record

ROOT = Path(__file__).parents[2]
RECORD_OF = verified.record_of  # before tests turn it off
SDPA = "scaled_dot_product_attention"
GPU = {"device": "a GPU, sm_90", "driver": "580.1", "torch": "2", "triton": "3", "imf_kernels": "1"}
VERIFIES = "`python -m imf_kernels.verify` verifies what is installed"
X = torch.randn(3, 8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, a process that has read and chosen nothing yet, and no interpreter of Triton."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(verified.triton_launch, "interpreted", lambda: False)
    monkeypatch.setattr(verified, "record_of", functools.cache(RECORD_OF.__wrapped__))
    monkeypatch.setattr(verified, "committed", dict)
    for function in (verified._warn_of_failures, verified._warn_of_gpu):
        function.cache_clear()
    for operation in OPERATIONS.values():
        operation.choices.clear()
    yield tmp_path / "imf_kernels"
    for operation in OPERATIONS.values():
        operation.choices.clear()


@pytest.fixture
def gpu(monkeypatch):
    """What stands for a tensor on a GPU of which there is no record."""
    key_of = verified.key_of
    monkeypatch.setattr(verified, "key_of", lambda device: GPU if device == "cuda:0" else key_of(device))
    monkeypatch.setattr(verified.triton_launch, "architecture_of", lambda index: "sm_90")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    return SimpleNamespace(device=SimpleNamespace(type="cuda"), get_device=lambda: 0, dtype=torch.bfloat16)


def made(key, results=None, ratios=None, by="now"):
    """A record of the kernels as they are `now`, or of earlier ones."""
    results = results or {}
    digests = {o: {b: sources.digest(o, b) if by == "now" else by for b in bs} for o, bs in results.items()}
    return Record(key, results, ratios or {}, digests)


def committed_record(*backends, by="now", ratios=None):
    """A record of silu and attention, as this repository has it."""
    results = {name: {b: {"bfloat16": None} for b in backends} for name in ("silu", SDPA)}
    key = {"device": "a GPU, sm_90", "imf_kernels": "0.0.9", "commit": "abc1234"}
    return made(key, results, ratios, by)


def cpu_key():
    return verified.key_of("cpu")


def chosen(x, name="silu", backend=None):
    return OPERATIONS[name].backend_for(backend, x, None).name


FAILED = {"silu": {"cpu": {"bfloat16": "silu vector, tangent 0: RMS error 1, at most 0.1", "float32": None}}}


def test_what_failed_is_off_until_named_with_one_warning(cache):
    path = made(cpu_key(), {**FAILED, "gelu": {"cpu": {"float32": "gelu vector, output 0: wrong"}}}).write()
    assert path.parent == cache
    half = X.bfloat16()
    with pytest.warns(UserWarning) as warned:
        for _ in range(2):
            assert chosen(half) == "reference" and chosen(X) == "cpu"
            assert chosen(X, "gelu") == "reference" == chosen(X, "gelu_tanh")
            assert chosen(X, "gelu", "cpu") == "cpu" == chosen(half, "silu", "cpu")
        torch.testing.assert_close(ik.silu(half), ik.silu(half, backend="reference"), rtol=0, atol=0)
    (warning,) = warned
    assert "silu (cpu, bfloat16), gelu (cpu, float32) failed imf_kernels.verify on " in str(warning.message)
    assert str(path) in str(warning.message)


def test_what_failed_is_off_in_graphs(cache):
    made(cpu_key(), FAILED).write()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph

    with pytest.warns(UserWarning, match="failed imf_kernels.verify"):
        y = torch.compile(ik.silu, backend=keep, fullgraph=True)(X.bfloat16())
    torch.testing.assert_close(y, ik.silu(X.bfloat16(), backend="reference"), rtol=0, atol=0)
    torch.compile(ik.silu, backend=keep, fullgraph=True, dynamic=False)(X)
    assert ["imf_kernels.silu" in code for code in graphs] == [False, True]
    torch._dynamo.reset()


def test_a_record_is_read_back(cache):
    record = made(cpu_key(), FAILED, {SDPA: 0.6})
    path = record.write()
    assert RECORD_OF.__wrapped__("cpu") == record
    assert list(cache.iterdir()) == [path]


@pytest.mark.parametrize("name", ["device", "torch", "imf_kernels"])
def test_another_key_does_not_count(name, monkeypatch):
    made(cpu_key(), FAILED).write()
    other = {**cpu_key(), name: "another"}
    monkeypatch.setattr(verified, "key_of", lambda device: other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verified.record_of("cpu") is None and chosen(X.bfloat16()) == "cpu"


def test_a_record_of_changed_kernels_does_not_count(cache):
    path = made(cpu_key(), FAILED, by="earlier").write()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(X.bfloat16()) == "cpu"
    record = verified.record_of("cpu")
    assert record.failed() == [] and record.changed() == ["silu (cpu)"]
    status = f"1 operations checked, none failed, by {path}; changed since: all kernels; {VERIFIES}"
    assert verified.status("cpu") == status


def test_what_a_key_has():
    assert cpu_key()["device"].endswith(f", {ik._C.get_isa()}")
    assert {"torch": torch.__version__, "imf_kernels": ik.__version__}.items() <= cpu_key().items()


DAMAGED = {
    "nothing": b"",
    "half of it": b'{"key": {"device',
    "no text": b"\x80\x81",
    "a list": b"[]",
    "other fields": b'{"key": {}, "results": {}}',
    "another key": b'{"key": {}, "results": {}, "ratios": {}, "sources": {}}',
    "without sources": lambda key: {"key": key, "results": {}, "ratios": {}},
    "depths": b"[" * 100_000,
    "wrong results": lambda key: {
        "key": key,
        "results": {"silu": {"cpu": ["float32"]}},
        "ratios": {},
        "sources": {},
    },
    "wrong ratios": lambda key: {"key": key, "results": {}, "ratios": {SDPA: "0.5"}, "sources": {}},
    "wrong sources": lambda key: {"key": key, "results": {}, "ratios": {}, "sources": {"silu": "a"}},
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_is_ignored_with_a_warning(content, cache):
    path = verified.path_of(cpu_key())
    cache.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content(cpu_key())).encode())
    with pytest.warns(UserWarning, match=r"\.json is ignored: .*`python -m imf_kernels\.verify`") as warned:
        assert chosen(X) == "cpu" == chosen(X, "gelu")
    assert len(warned) == 1


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["a folder", "a FIFO"])
def test_something_else_in_the_place_of_a_record(make, cache):
    cache.mkdir()
    make(verified.path_of(cpu_key()))
    with pytest.warns(UserWarning, match="is ignored: it is not a regular file"):
        assert chosen(X) == "cpu"


def test_a_record_is_replaced_or_left(cache, monkeypatch):
    path = made(cpu_key(), FAILED).write()
    before = path.read_bytes()

    def fail(*paths):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        made(cpu_key()).write()
    assert path.read_bytes() == before and list(cache.iterdir()) == [path]


def told(gpu, backend="triton", of="silu"):
    """The message by which a call there warns of kernels that are not verified, or ""."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        verified.warn_unverified(of, backend, [gpu])
        verified.warn_unverified(of, backend, [gpu])
    assert len(warned) <= 1
    text = "".join(str(warning.message) for warning in warned)
    assert not text or ("not been verified on a GPU (sm_90)" in text and VERIFIES in text)
    return text


def test_unverified_kernels_on_a_gpu_are_warned_of_once(gpu):
    assert not told(gpu, "reference") and not told(X, "triton")
    assert told(gpu) and not told(gpu)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_record_of_a_gpu_removes_the_warning(gpu, dtype):
    made(GPU, {"silu": {"triton": {dtype: None}}}).write()
    assert bool(told(gpu)) == (dtype == "float32")


def commit(monkeypatch, record, architecture="sm_90"):
    monkeypatch.setattr(verified, "committed", lambda: {architecture: record})


@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
def test_a_committed_record_removes_the_warning(gpu, architecture, monkeypatch):
    commit(monkeypatch, committed_record("triton"), architecture)
    assert bool(told(gpu)) == (architecture == "sm_100")


@pytest.mark.parametrize(("operation", "by"), [("silu", "earlier"), ("rms_norm", "now")])
def test_a_committed_record_of_other_kernels_verifies_nothing(gpu, operation, by, monkeypatch):
    commit(monkeypatch, committed_record("triton", by=by))
    earlier = "but at an earlier version (a GPU, sm_90, imf_kernels 0.0.9, commit abc1234)"
    assert earlier in told(gpu, of=operation)


def test_this_machines_record_counts_where_the_committed_one_is_of_earlier_kernels(gpu, monkeypatch):
    commit(monkeypatch, committed_record("triton", by="earlier"))
    made(GPU, {"silu": {"triton": {"bfloat16": None}}}).write()
    assert not told(gpu)


FASTER, SLOWER = {SDPA: 0.6}, {SDPA: 1.1}


@pytest.mark.parametrize(
    ("own", "ratios", "ours", "why"),
    [
        (None, {}, {}, "on request"),
        (None, {}, {"sm_90": FASTER}, None),
        (None, {}, {"sm_80": FASTER}, "on request"),
        (None, {}, {"sm_90": SLOWER}, "on request"),
        (None, {}, {"sm_90": {}}, "on request"),
        ("passed", FASTER, {}, None),
        ("passed", SLOWER, {"sm_90": FASTER}, "on request"),
        ("passed", {}, {}, "on request"),
        ("failed", FASTER, {"sm_90": FASTER}, "failed imf_kernels.verify"),
    ],
)
def test_cuda_is_the_default_where_it_passed_and_is_faster(gpu, monkeypatch, own, ratios, ours, why):
    if own is not None:
        failure = "a wrong output" if own == "failed" else None
        made(GPU, {SDPA: {"cuda": {"bfloat16": failure}}}, ratios).write()
    records = {name: committed_record(*verified.ON_GPU, ratios=r) for name, r in ours.items()}
    monkeypatch.setattr(verified, "committed", lambda: records)
    reason = verified.reason(SDPA, "cuda", "cuda:0", "bfloat16")
    assert reason is None if why is None else why in reason
    assert verified.reason(SDPA, "triton", "cuda:0", "bfloat16") is None


@pytest.mark.parametrize("own", [True, False])
def test_cuda_is_no_default_by_a_record_of_earlier_kernels(gpu, monkeypatch, own):
    record = committed_record(*verified.ON_GPU, by="earlier", ratios=FASTER)
    if own:
        Record(GPU, record.results, record.ratios, record.sources).write()
    else:
        commit(monkeypatch, record)
    assert "on request" in verified.reason(SDPA, "cuda", "cuda:0", "bfloat16")


def test_info_shows_the_records(cache, monkeypatch, gpu):
    assert f"verified, cpu       no record; {VERIFIES}" in info.report()
    verified.record_of.cache_clear()
    path = made(cpu_key(), FAILED).write()
    text = info.report()
    assert f"verified, cpu       1 operations checked, silu (cpu, bfloat16) failed, by {path}" in text
    assert "\nsilu                          cpu (on request in bfloat16), " in text
    assert f"\n{SDPA}  cpu, cuda (on request), triton, flash (on request), reference" in text
    monkeypatch.setattr(verified, "devices", lambda: ["cpu", "cuda:0"])
    commit(monkeypatch, committed_record(*verified.ON_GPU, ratios=FASTER))
    text = info.report()
    made_with = "by this repository's record (a GPU, sm_90, imf_kernels 0.0.9, commit abc1234)"
    assert f"verified, cuda:0    {made_with}\n" in text
    assert f"\n{SDPA}  cpu, cuda, triton, flash (on request), reference" in text
    commit(monkeypatch, committed_record(*verified.ON_GPU, ratios=FASTER, by="earlier"))
    text = info.report()
    since = f"changed since: all kernels; {VERIFIES}"
    assert f"verified, cuda:0    at an earlier version, {made_with}; {since}\n" in text
    assert f"\n{SDPA}  cpu, cuda (on request), triton, flash (on request), reference" in text


FILES = """
import os, sys, torch
opened = []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
import imf_kernels as ik
assert not torch.cuda.is_initialized()
assert not any("cpuinfo" in name or name.endswith(".json") for name in opened), opened
x = torch.ones(3)
ik.silu(x)
assert {record!r} in opened, opened
with_tangent = ik.Dual(x, x)
ik.gelu(with_tangent)
opened.clear()
ik.silu(x), ik.gelu(with_tangent), ik.swiglu(torch.ones(2, 4))
assert not opened, opened
"""


def test_importing_reads_no_record_and_calls_read_it_once():
    script = FILES.format(record=str(made(cpu_key()).write()))
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr

"""Preparing data survives being killed, a full disk and a second process: the bytes end up the same."""

import fcntl
import os
import random
import shutil
import signal
import sys
import time

import pytest

from imf import data
from imf.data.prepare import __main__ as prepare
from imf.program import UserError
from tests.helpers import children, tiny_data

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits file sizes")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_data.images(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """What a run that nothing interrupts leaves."""
    out = tmp_path_factory.mktemp("whole")
    assert tiny_data.pack(source, out) == 0
    return tiny_data.content(out)


def test_killed_before_any_change_of_a_file(source, whole, tmp_path):
    """A process for every file operation, killed just before it, each in a folder of its own."""
    for number in range(1, 1000):
        out = tmp_path / str(number)
        status = children.run(tmp_path / "log", tiny_data.pack_until, number, source, out)
        if status != 0:
            assert status == -signal.SIGKILL, (tmp_path / "log").read_text()
            if (out / "index.json").exists():
                assert len(data.load(out)) == 8  # whole, whatever of the scaffold is left
            else:
                with pytest.raises(UserError, match=r"half-made|no index\.json|no such folder"):
                    data.load(out)
        assert tiny_data.pack(source, out) == 0
        assert tiny_data.content(out) == whole, f"killed before file operation {number}"
        if status == 0:
            break
    assert number > 25  # three shards, each with a record, and what comes before and after


def test_killed_again_and_again(source, whole, tmp_path):
    """Every process lives for 13 changes of files, three at its start: what is recorded stays as it is."""
    out, status, runs = tmp_path / "out", None, 0
    while status != 0:
        shards = [out / f"shard-{path.stem}.npy" for path in (out / "records").glob("0*.json")]
        before = {path: path.stat().st_mtime_ns for path in shards if path.exists()}  # the last has no rows
        status = children.run(tmp_path / "log", tiny_data.pack_until, 13, source, out)
        runs += 1
        assert before == {path: path.stat().st_mtime_ns for path in before}
        assert runs < 10, (tmp_path / "log").read_text()
    assert runs > 2 and tiny_data.content(out) == whole


def test_full_disk(source, whole, tmp_path):
    """A limit on the size of files, as a disk without room: said clearly, and gone on from."""
    out = tmp_path / "out"
    # Less than a shard of 4 rows takes.
    assert children.run(tmp_path / "log", tiny_data.pack_in, 700, source, out) == 1
    said = (tmp_path / "log").read_text()
    assert "shard-00000.npy: could not be written" in said and "bytes are free there; make room" in said
    assert "Traceback" not in said and not list(out.rglob(".*.tmp"))
    assert tiny_data.pack(source, out) == 0 and tiny_data.content(out) == whole


def test_truncated_shard_of_a_half_made_folder_is_made_again(source, whole, tmp_path, capsys):
    out = tmp_path / "out"
    assert children.run(tmp_path / "log", tiny_data.pack_until, 10, source, out) == -signal.SIGKILL
    path = out / "shard-00000.npy"
    path.write_bytes(path.read_bytes()[:-1])
    assert tiny_data.pack(source, out) == 0
    assert "shard-00000.npy: must have 896 bytes, got 895; it is made again" in capsys.readouterr().err
    assert tiny_data.content(out) == whole


def test_one_process_at_a_time(source, tmp_path, capsys):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert tiny_data.pack(source, tmp_path) == 1
    finally:
        os.close(descriptor)
    assert "another process is preparing this folder" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    """The whole command, with an autoencoder, killed 20 times at any moment of its life."""
    pytest.importorskip("diffusers")
    source = tiny_data.images(tmp_path / "source", count=100)
    vae = tiny_data.autoencoder(tmp_path / "vae")

    def start(out):
        options = f"--vae {vae} --size 32 --shard-size 3 --batch-size 2 --workers 1 --device cpu".split()
        return children.start(prepare.main, [str(source), str(out), *options])

    def finish(out):
        began = time.monotonic()
        assert children.finish(start(out)) == 0
        return tiny_data.content(out), time.monotonic() - began

    finish(tmp_path / "first")  # in which the imports happen
    whole, duration = finish(tmp_path / "whole")
    rng, out, kills, reached = random.Random(0), tmp_path / "out", 0, set()
    while kills < 20:
        process = start(out)
        time.sleep(rng.uniform(0, duration / 2))
        process.kill()
        if children.finish(process) == 0:  # it had ended: from the start once more
            assert tiny_data.content(out) == whole
            shutil.rmtree(out)
        else:
            kills += 1
            reached.add(len(list((out / "records").glob("0*.json"))))
    assert len(reached) > 3  # kills at several shards, not all of them before the first
    assert finish(out)[0] == whole

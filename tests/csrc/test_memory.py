"""What glibc keeps of freed memory for the next step."""

import os
import platform
import subprocess
import sys

import pytest

ROUNDS = """
import {modules}
import ctypes, resource

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
blocks = [0] * 8

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for i in range(8):  # 48 MiB in blocks of 6
        blocks[i] = libc.malloc(6 << 20)
        ctypes.memset(blocks[i], 0, 6 << 20)
    for block in blocks:
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(), faults()
print(min(faults() for _ in range(3)))
"""


def faults(modules, **limits):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", ROUNDS.format(modules=modules)]
    done = subprocess.run(command, env=environment | limits, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept_for_the_next_step():
    assert faults("imf_kernels") < 1000 < faults("torch")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_limits_of_the_user_stay():
    assert faults("imf_kernels", MALLOC_TRIM_THRESHOLD_="1000000") > 5000

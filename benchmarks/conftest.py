"""Options of the benchmarks, and the memory that they all run in."""

import ctypes
import sys

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-case", action="store_true", help="all shapes, not the default selection")
    parser.addoption("--official-jax", metavar="DIR", help="the official program: time its step too")
    parser.addoption("--jax-python", default=sys.executable, help="the Python that has jax and flax")


@pytest.fixture(scope="session", autouse=True)
def freed_memory_is_kept() -> None:
    """What was freed stays with the process, ready for the next result. Blocks of more than 32 MB otherwise
    come from the system anew each time, and zeroing their pages takes several times as long as a row
    operation: everyone's time would be that of the page faults."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc
        mmap_max, trim_threshold = -4, -1
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)

"""Options of the benchmarks."""

import sys

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-case", action="store_true", help="all shapes, not the default selection")
    parser.addoption("--official-jax", metavar="DIR", help="the official program: time its step too")
    parser.addoption("--jax-python", default=sys.executable, help="the Python that has jax and flax")

"""GPUs on which a committed record shows the tests green. Written by benchmarks/verified.py: not by hand."""

# Architectures on which the compiled CUDA kernels are the default.
CUDA: frozenset[str] = frozenset()

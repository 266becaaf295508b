"""GPUs on which a committed record shows that the tests pass: benchmarks/verified.py lists them."""

# Architectures on which the compiled CUDA kernels are the default.
CUDA: frozenset[str] = frozenset()

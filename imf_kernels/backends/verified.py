"""GPUs on which a committed record shows passing tests; benchmarks/tools/verified.py writes it."""

# Architectures on which the compiled CUDA kernels are the default.
CUDA: frozenset[str] = frozenset()

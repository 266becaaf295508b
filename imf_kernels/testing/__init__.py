"""What tests and benchmarks share: the cases of every operation, the error rule, a timer."""

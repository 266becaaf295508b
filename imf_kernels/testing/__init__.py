"""Cases of every operation, the error rule and a timer, for tests and benchmarks."""

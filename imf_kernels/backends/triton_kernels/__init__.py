"""Kernels in Triton and their launchers, one file per operation; imported by triton_launch only."""

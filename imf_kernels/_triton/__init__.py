"""Kernels in Triton and their launchers, a file an operation; imported by imf_kernels.triton_backend only."""

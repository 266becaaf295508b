"""Improved Mean Flows (arXiv 2512.02012) in PyTorch, on the fused forward-mode kernels of `imf_kernels`."""

"""Improved Mean Flows (arXiv 2512.02012) in PyTorch, on the fused forward-mode kernels of `imf_kernels`."""

from imf_kernels import __version__ as __version__

"""Derivatives of unmodified functions, and the support that they need from PyTorch."""

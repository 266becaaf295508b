"""Derivatives of unmodified functions, and what they need of PyTorch."""

"""Random numbers as a function of what they are for: no generator has a state that a run must keep."""

from __future__ import annotations

import hashlib

import torch

SCHEME = 1  # raise it when the same arguments give other numbers


def key(seed: int, purpose: str, step: int = 0, rank: int = 0) -> int:
    """Hashes its arguments to a seed of 63 bits; other arguments, however near, give an unrelated one."""
    text = f"{purpose} {seed} {step} {rank}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def generator(
    seed: int, purpose: str, step: int = 0, rank: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator of its own for each seed, purpose, step (or number of a sample) and rank, on `device`."""
    return torch.Generator(device).manual_seed(key(seed, purpose, step, rank))

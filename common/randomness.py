"""Generators drawn from (seed, epoch, purpose), so that a resumed run needs no stored generator."""

import zlib

import numpy as np
import torch


def generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """A CPU generator that depends on its arguments alone; two purposes give independent streams."""
    return torch.Generator().manual_seed(seed_of(seed, epoch, purpose))


def seed_of(seed: int, epoch: int, purpose: str, *more: int) -> int:
    """A number of 63 bits that depends on all arguments, the index of an image perhaps among them."""
    entropy = [seed, epoch, zlib.crc32(purpose.encode()), *more]
    words = np.random.SeedSequence(entropy).generate_state(2, np.uint32)
    return int(words[0]) << 31 | int(words[1]) >> 1

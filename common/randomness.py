"""Generators derived from (seed, epoch, purpose), so that resuming needs no saved generator state."""

import zlib

import numpy as np
import torch


def generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """A CPU generator that depends only on its arguments; different purposes have independent streams."""
    return torch.Generator().manual_seed(derive_seed(seed, epoch, purpose))


def derive_seed(seed: int, epoch: int, purpose: str, *more: int) -> int:
    """A 63-bit seed derived from all arguments; `more` can be an image index, for example."""
    entropy = [seed, epoch, zlib.crc32(purpose.encode()), *more]
    words = np.random.SeedSequence(entropy).generate_state(2, np.uint32)
    return int(words[0]) << 31 | int(words[1]) >> 1

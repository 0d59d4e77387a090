"""Generators drawn from (seed, epoch, purpose), so that a resumed run needs no stored generator."""

import zlib

import numpy as np
import torch


def generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """A CPU generator that depends on its arguments alone; two purposes give independent streams."""
    words = np.random.SeedSequence([seed, epoch, zlib.crc32(purpose.encode())]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)

"""Candidate mixed paths <k, delta>, and sampling the set S of each step from them (Sec. 2)."""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from .randomness import generator


class MixedPath(NamedTuple):
    """A forward path that switches networks after stage k.

    delta 1: student up to stage k, bridge, teacher from stage k + 1. delta 0: teacher first, then student.
    """

    k: int
    delta: int


def candidate_paths(num_stages: int, positions: Iterable[int] | None = None) -> list[MixedPath]:
    """All mixed paths at `positions` (default 2..N-1), in both directions.

    Raises:
        ValueError: a position is outside 2..N.
    """
    positions = range(2, num_stages) if positions is None else sorted(set(positions))
    for k in positions:
        if not 2 <= k <= num_stages:
            raise ValueError(f"position {k} is outside 2..{num_stages}, the stages after the stem")
    return [MixedPath(k, delta) for k in positions for delta in (1, 0)]


def sample_paths(
    candidates: list[MixedPath], num_paths: int, steps: int, seed: int, epoch: int
) -> list[list[MixedPath]]:
    """S for every step of an epoch: `num_paths` of `candidates`, uniformly and without replacement.

    Depends on its arguments only. Each S keeps the order of `candidates`.

    Raises:
        ValueError: `num_paths` is negative or exceeds the number of candidates.
    """
    if not 0 <= num_paths <= len(candidates):
        raise ValueError(f"cannot sample {num_paths} paths per step from {len(candidates)} candidates")
    random = torch.rand(steps, len(candidates), generator=generator(seed, epoch, "paths"), device="cpu")
    sampled = random.argsort(dim=1)[:, :num_paths].sort(dim=1).values
    return [[candidates[i] for i in row] for row in sampled.tolist()]

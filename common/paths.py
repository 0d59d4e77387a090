"""The candidate mixed paths <k, delta> and how a step's set S is drawn from them (Sec. 2)."""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from .randomness import generator
from .run.errors import UserError


class MixedPath(NamedTuple):
    """A forward path that changes networks after stage k.

    delta 1: student up to stage k, bridge, teacher from stage k + 1. delta 0: teacher first, then student.
    """

    k: int
    delta: int


def candidate_paths(num_stages: int, positions: Iterable[int] | None = None) -> list[MixedPath]:
    """All mixed paths at `positions` (default 2..N-1), both directions.

    Raises:
        UserError: a position outside 2..N.
    """
    positions = range(2, num_stages) if positions is None else sorted(set(positions))
    for k in positions:
        if not 2 <= k <= num_stages:
            raise UserError(f"position {k} is outside 2..{num_stages}, the stages after the stem")
    return [MixedPath(k, delta) for k in positions for delta in (1, 0)]


def sample_paths(
    candidates: list[MixedPath], num_paths: int, steps: int, seed: int, epoch: int
) -> list[list[MixedPath]]:
    """S for every step of an epoch: `num_paths` of `candidates`, uniformly and without replacement.

    A function of its arguments alone. Each S keeps the order of `candidates`.

    Raises:
        UserError: `num_paths` is negative or more than there are candidates.
    """
    if not 0 <= num_paths <= len(candidates):
        raise UserError(f"cannot draw {num_paths} paths a step: there are {len(candidates)} candidates")
    order = torch.rand(steps, len(candidates), generator=generator(seed, epoch, "paths")).argsort(dim=1)
    drawn = order[:, :num_paths].sort(dim=1).values
    return [[candidates[i] for i in row] for row in drawn.tolist()]

from collections import Counter

import pytest

from common.paths import MixedPath, candidate_paths, sample_paths
from common.randomness import generator
from common.run.errors import UserError


@pytest.mark.parametrize(("stages", "ks"), [(4, {2, 3}), (5, {2, 3, 4})])
def test_default_candidates(stages, ks):
    assert set(candidate_paths(stages)) == {MixedPath(k, delta) for k in ks for delta in (0, 1)}
    assert len(candidate_paths(stages)) == 2 * len(ks)


def test_positions_choose_the_candidates():
    assert set(candidate_paths(4, [4, 2, 4])) == {(2, 0), (2, 1), (4, 0), (4, 1)}
    assert candidate_paths(4, []) == []


@pytest.mark.parametrize("position", [1, 5, -1])
def test_position_outside_the_stages(position):
    with pytest.raises(UserError, match=r"2\.\.4"):
        candidate_paths(4, [position])


def test_draws_are_uniform_over_all_sets_of_both_directions():
    candidates = candidate_paths(4)
    draws = sample_paths(candidates, 2, 6000, seed=0, epoch=0)
    counts = Counter(frozenset(s) for s in draws)
    assert len(counts) == 6  # every pair of four, those of one direction too
    assert all(len(s) == 2 for s in counts)  # without replacement
    assert all(900 < n < 1100 for n in counts.values())  # 1000 expected, deviation 29


def test_draws_depend_on_seed_and_epoch_alone():
    candidates = candidate_paths(5)
    draws = [sample_paths(candidates, 3, 50, *at) for at in [(1, 2), (1, 2), (1, 3), (2, 2)]]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2] != draws[3] != draws[0]
    assert all(s == sorted(s, key=candidates.index) for s in draws[0])


def test_all_and_none():
    candidates = candidate_paths(4)
    assert sample_paths(candidates, 4, 2, 0, 0) == [candidates] * 2
    assert sample_paths(candidates, 0, 2, 0, 0) == [[], []]


@pytest.mark.parametrize("num_paths", [-1, 5])
def test_impossible_numbers(num_paths):
    with pytest.raises(UserError, match="4 candidates"):
        sample_paths(candidate_paths(4), num_paths, 1, 0, 0)


def test_generators_differ_by_seed_epoch_and_purpose():
    seeds = {generator(*at).initial_seed() for at in [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")]}
    assert len(seeds) == 4
    assert generator(0, 1, "a").initial_seed() in seeds

"""Candidate paths, and sampling from them."""

from collections import Counter

import pytest
import torch

from common.paths import MixedPath, candidate_paths, sample_paths
from common.randomness import generator


@pytest.mark.parametrize(("stages", "ks"), [(4, {2, 3}), (5, {2, 3, 4})])
def test_default_candidates(stages, ks):
    assert set(candidate_paths(stages)) == {MixedPath(k, delta) for k in ks for delta in (0, 1)}
    assert len(candidate_paths(stages)) == 2 * len(ks)


def test_positions_select_the_candidates():
    assert set(candidate_paths(4, [4, 2, 4])) == {(2, 0), (2, 1), (4, 0), (4, 1)}
    assert candidate_paths(4, []) == []


@pytest.mark.parametrize("position", [1, 5, -1])
def test_positions_outside_the_stages_are_rejected(position):
    with pytest.raises(ValueError, match=r"2\.\.4"):
        candidate_paths(4, [position])


def test_samples_are_uniform_over_all_subsets():
    candidates = candidate_paths(4)
    samples = sample_paths(candidates, 2, 6000, seed=0, epoch=0)
    counts = Counter(frozenset(s) for s in samples)
    assert len(counts) == 6  # every pair of four, including pairs of one direction
    assert all(len(s) == 2 for s in counts)  # without replacement
    assert all(900 < n < 1100 for n in counts.values())  # expected 1000, standard deviation 29


def test_samples_depend_only_on_seed_and_epoch():
    candidates = candidate_paths(5)
    samples = [sample_paths(candidates, 3, 50, *at) for at in [(1, 2), (1, 2), (1, 3), (2, 2)]]
    assert samples[0] == samples[1]
    assert samples[0] != samples[2] != samples[3] != samples[0]
    assert all(s == sorted(s, key=candidates.index) for s in samples[0])


def test_sampling_all_or_no_candidates():
    candidates = candidate_paths(4)
    assert sample_paths(candidates, 4, 2, 0, 0) == [candidates] * 2
    assert sample_paths(candidates, 0, 2, 0, 0) == [[], []]


@pytest.mark.parametrize("num_paths", [-1, 5])
def test_num_paths_out_of_range_is_rejected(num_paths):
    with pytest.raises(ValueError, match="4 candidates"):
        sample_paths(candidate_paths(4), num_paths, 1, 0, 0)


def test_generators_differ_by_seed_epoch_and_purpose():
    seeds = {generator(*at).initial_seed() for at in [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")]}
    assert len(seeds) == 4
    assert generator(0, 1, "a").initial_seed() in seeds


def test_samples_do_not_depend_on_the_default_device():
    candidates = candidate_paths(4)
    with torch.device("meta"):
        samples = sample_paths(candidates, 2, 20, seed=0, epoch=0)
    assert samples == sample_paths(candidates, 2, 20, seed=0, epoch=0)

"""Which terms, mixed paths and bridges follow from the weights."""

import pytest

from common.fcfd import EQ_9, TERMS, Term
from common.paths import MixedPath, candidate_paths
from common.plan import needs_all_bridges, plan_paths, term_weights


def test_term_weights_match_the_paper():
    zero = dict.fromkeys(TERMS, 0)
    published = {"task": 1, "kd": 1, "app": 0.02, "func_l2": 0.02, "func_kl": 0.2, "func_prime": 0.2}
    assert term_weights(EQ_9, w_l2=0.02, w_kl=0.2) == zero | published
    assert term_weights(("task", "kd", "app"), 5, 1) == zero | {"task": 1, "kd": 1, "app": 5}
    assert term_weights(("task", "func_partial", "func_prime_l2"), 5, 1) == zero | {
        "task": 1,
        "func_partial": 5,
        "func_prime_l2": 5,
    }


def test_plan_paths():
    weights = term_weights(EQ_9, w_l2=5, w_kl=1)
    used = {name: weights[name] for name in EQ_9}
    assert plan_paths(weights, 4) == (used, candidate_paths(4), 2)
    assert plan_paths(weights, 4, num_paths=0) == (used, candidate_paths(4), 0)
    # A path that leaves the last stage has only logits, so it does not feed L2 terms.
    planned, paths, num_paths = plan_paths(weights, 4, [4])
    assert planned == {name: value for name, value in used.items() if name != "func_l2"}
    assert (paths, num_paths) == (candidate_paths(4, [4]), 2)
    # Paths are candidates only if some term reads them.
    planned, paths, num_paths = plan_paths(weights | {"func_prime": 0, "func_kl": 0}, 4, [3, 4])
    assert (paths, num_paths) == ([MixedPath(3, 1)], 1)
    assert plan_paths(term_weights(("task", "kd"), 0, 0), 4) == ({"task": 1, "kd": 1}, [], 0)


def test_plan_paths_rejects_settings_that_cannot_be_trained():
    weights = term_weights(EQ_9, w_l2=5, w_kl=1)
    with pytest.raises(ValueError, match="func_l2"):
        plan_paths(weights, 4, [4], required=["func_l2"])
    plan_paths(weights | {"func_l2": 0}, 4, [4], required=["func_l2"])  # not required without a weight
    with pytest.raises(ValueError, match="func_kl"):
        plan_paths(weights, 4, num_paths=0, required=["app", "func_kl"])
    plan_paths(weights, 4, num_paths=0, required=["app"])
    with pytest.raises(ValueError, match="4 candidates"):
        plan_paths(weights, 4, num_paths=5)
    with pytest.raises(ValueError, match=r"outside 2\.\.4"):
        plan_paths(weights, 4, [5])
    only_mixed = {"func_kl": 1}
    assert plan_paths(only_mixed, 4)[0] == only_mixed
    for kwargs in (
        {"weights": {}},
        {"weights": only_mixed, "num_paths": 0},
        {"weights": {"func_l2": 1}, "positions": [4]},
    ):
        with pytest.raises(ValueError, match="another term a weight"):
            plan_paths(num_stages=4, **kwargs)


def test_needs_all_bridges_only_for_terms_like_l_app():
    assert [name for name in TERMS if needs_all_bridges([name])] == ["app"]
    table = TERMS | {"own": Term(TERMS["app"].function, compares_features=True)}
    assert needs_all_bridges(["own"], table)

"""What follows from the weights of the loss terms: which terms, mixed paths and bridges a run needs."""

from collections.abc import Iterable, Mapping

from .fcfd import TERMS, Term
from .paths import MixedPath, candidate_paths, sample_paths


def term_weights(names: Iterable[str], w_l2: float, w_kl: float, table: Mapping[str, Term] = TERMS) -> dict[str, float]:
    """The weight of every term of `table`: 0 unless in `names`, else the paper's.

    Terms that compare features share `w_l2`, the other terms on mixed paths share `w_kl`, and the rest have weight 1.
    """
    names = set(names)

    def weight(term: Term) -> float:
        if term.compares_features:
            return w_l2
        return 1 if term.delta is None else w_kl

    return {name: weight(term) if name in names else 0 for name, term in table.items()}


def plan_paths(
    weights: Mapping[str, float],
    num_stages: int,
    positions: Iterable[int] | None = None,
    num_paths: int | None = None,
    required: Iterable[str] = (),
    table: Mapping[str, Term] = TERMS,
) -> tuple[dict[str, float], list[MixedPath], int]:
    """(weights of the usable terms, candidate paths that they read, |S|).

    Args:
        weights: by term; terms of weight 0, and terms that read none of the paths at `positions`, are dropped.
        positions: as in `candidate_paths`.
        num_paths: |S|; default 2, or the number of candidates if there are fewer.
        required: terms that must not be dropped if their weight is not 0, such as those set on the command line.

    Raises:
        ValueError: `positions` or `num_paths` is out of range, a required term reads no path, or no term remains.
    """

    def reads(name: str, path: MixedPath) -> bool:
        # A path that leaves stage N enters the classifier directly, so it has no later features to compare.
        return table[name].delta == path.delta and not (table[name].compares_features and path.k == num_stages)

    paths = candidate_paths(num_stages, positions)
    weights = {name: value for name, value in weights.items() if value}
    unusable = [n for n in weights if table[n].delta is not None and not any(reads(n, path) for path in paths)]
    for name in required:
        if name in unusable or (num_paths == 0 and name in weights and table[name].delta is not None):
            raise ValueError(f"{name} has a weight, but reads none of the mixed paths that are sampled")
    weights = {name: value for name, value in weights.items() if name not in unusable}
    paths = [path for path in paths if any(reads(name, path) for name in weights)]
    num_paths = min(2, len(paths)) if num_paths is None else num_paths
    sample_paths(paths, num_paths, steps=1, seed=0, epoch=0)  # raises if num_paths is out of range
    if not num_paths and not any(table[name].delta is None for name in weights):
        raise ValueError("every term has weight 0 or no path: sample mixed paths, or give another term a weight")
    return weights, paths, num_paths


def needs_all_bridges(terms: Iterable[str], table: Mapping[str, Term] = TERMS) -> bool:
    """Whether one of `terms` compares bridged features without reading a mixed path, as L_app does."""
    return any(table[name].compares_features and table[name].delta is None for name in terms)

"""Tab. 10 (App. G): ways to match functions, on top of L_task + L_kd + L_app.

    python ablations/loss_terms.py
    python ablations/loss_terms.py --pairs resnet32x4-resnet8x4 --seeds 1 2 3 --jobs 3

A mixed path gives features and an answer. L_func compares both with the teacher's (Eq. 6: its L2 part and its KL part,
apart here), L_func' the answer alone (Eq. 7). L_func'-L2 would compare the features that the path has in the student's
later part with the student's own; neither of the two is a target, so the gradient reaches both.
Every other option is one of cifar100.py and goes to those of its runs that have a use for it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ablations import tables
from ablations.tables import PAIRS_L2, Row

PAIRS = ["resnet32x4-resnet8x4"]
HEADER = ["L_func-KL", "L_func-L2", "L_func'", "L_func'-L2"]
TERMS = ("func_kl", "func_l2", "func_prime", "func_prime_l2")  # as in HEADER


def row(*terms: str) -> tuple[tuple[str, ...], Row]:
    """The line of the table in which these of TERMS are used."""
    left_out = {f"w_{term}": 0 for term in TERMS[:3] if term not in terms}
    method = {"method": "fcfd", **left_out} if len(left_out) < 3 else {"method": "app"}
    added = {"w_func_prime_l2": PAIRS_L2} if "func_prime_l2" in terms else {}
    return tuple("✓" if term in terms else "" for term in TERMS), Row(method | added)


ROWS = [
    row(),
    row("func_kl"),
    row("func_l2"),
    row("func_prime"),
    row("func_prime_l2"),
    row("func_kl", "func_l2"),
    row("func_prime", "func_prime_l2"),
    row("func_kl", "func_prime"),
    row("func_l2", "func_prime"),
    row("func_kl", "func_l2", "func_prime"),
    row("func_kl", "func_l2", "func_prime", "func_prime_l2"),
]


def main(argv: list[str] | None = None) -> int:
    """Run what is left of the table and write it; the exit code is that of `exit_code`."""
    return tables.main(argv, __doc__, "loss_terms", HEADER, ROWS, PAIRS)


if __name__ == "__main__":
    sys.exit(main())

"""Tab. 10 (App. G): ways to match functions, on top of L_task + L_kd + L_app.

    python ablations/loss_terms.py                                                    three pairs, 240 epochs
    python ablations/loss_terms.py --pairs resnet32x4-resnet8x4 --seeds 1 2 3 --jobs 3

A mixed path has features and an output. L_func compares both with the teacher's (Eq. 6; its L2 and KL parts are
separate here), and L_func' only the output (Eq. 7). L_func'-L2 compares the path's features in the student's later
stages with those of the pure student; neither is a target, so the gradient reaches both.

All other options are those of cifar100.py and go to the runs they apply to.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ablations import tables
from ablations.components import PAIRS
from ablations.rows import PAIRS_L2, Row

HEADER = ["L_func-KL", "L_func-L2", "L_func'", "L_func'-L2"]
TERMS = ("func_kl", "func_l2", "func_prime", "func_prime_l2")  # as in HEADER


def row(*terms: str) -> tuple[tuple[str, ...], Row]:
    """The row of the table with these of TERMS."""
    omitted = {f"w_{term}": 0 for term in TERMS[:3] if term not in terms}
    method = {"method": "fcfd", **omitted} if len(omitted) < 3 else {"method": "app"}
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
    """Complete the runs and write the table. Returns the exit code (see `exit_code`)."""
    return tables.main(argv, __doc__, "loss_terms", HEADER, ROWS, PAIRS)


if __name__ == "__main__":
    sys.exit(main())

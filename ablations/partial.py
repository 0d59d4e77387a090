"""Tab. 14 (H.4): L_func-partial, which looks at the next stage alone, in the place of L_func.

    python ablations/partial.py
    python ablations/partial.py --pairs resnet32x4-resnet8x4 --seeds 1 2 3 --jobs 3

L_func follows the student's feature through all later stages of the teacher and to its answer. L_func-partial stops
after stage k + 1: L2 to the teacher's F^(k+1), without the KL.
Every other option is one of cifar100.py and goes to those of its runs that have a use for it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ablations import tables
from ablations.tables import PAIRS_L2, Row

PAIRS = ["resnet32x4-resnet8x4"]
HEADER = ["beside L_task + L_kd + L_app"]
PARTIAL = {"w_func_partial": PAIRS_L2}
NO_FUNC = {"w_func_l2": 0, "w_func_kl": 0}
ROWS = [
    (("nothing",), Row({"method": "app"})),
    (("L_func-partial",), Row({"method": "app", **PARTIAL})),
    (("L_func",), Row({"method": "fcfd", "w_func_prime": 0})),
    (("L_func'",), Row({"method": "fcfd", **NO_FUNC})),
    (("L_func-partial and L_func'",), Row({"method": "fcfd", **NO_FUNC, **PARTIAL})),
    (("L_func and L_func'",), Row({"method": "fcfd"})),
]


def main(argv: list[str] | None = None) -> int:
    """Run what is left of the table and write it; the exit code is that of `exit_code`."""
    return tables.main(argv, __doc__, "partial", HEADER, ROWS, PAIRS)


if __name__ == "__main__":
    sys.exit(main())

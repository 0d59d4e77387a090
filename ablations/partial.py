"""Tab. 14 (H.4): L_func-partial, which compares only at the next stage, instead of L_func.

    python ablations/partial.py                                                       three pairs, 240 epochs
    python ablations/partial.py --pairs resnet32x4-resnet8x4 --seeds 1 2 3 --jobs 3

L_func feeds the student's feature through all later stages of the teacher, up to its output. L_func-partial stops after
stage k + 1: L2 to the teacher's F^(k+1), no KL.

Before any run starts, the time and the peak memory of a step of each row are measured on the first of --devices, as in
ablations/complexity.py, and saved to cost.json. Mixed paths run up to the logits in every row, although L_func-partial
alone reads only stage k + 1, so its cost includes stages that it does not need.

All other options are those of cifar100.py and go to the runs they apply to.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ablations import tables
from ablations.components import PAIRS
from ablations.rows import PAIRS_L2, Row

HEADER = ["on top of L_task + L_kd + L_app"]
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
    """Complete the runs and write the table. Returns the exit code (see `exit_code`)."""
    return tables.main(argv, __doc__, "partial", HEADER, ROWS, PAIRS, with_costs=True)


if __name__ == "__main__":
    sys.exit(main())

"""Tab. 13 (H.3): functional matching at a single stage, or at all stages by sampling.

    python ablations/positions.py                                                     three pairs, 240 epochs
    python ablations/positions.py --pairs resnet32x4-resnet8x4 --seeds 1 2 3 --jobs 3

All rows have L_app at every stage and sample |S| = 2 paths per step; at a single stage, these are its two directions.
F^4 is the last stage: the bridged feature enters the other network's classifier directly. With only the direction into
the teacher's classifier, and so one path, this is SRRL's idea, a special case of L_func (App. I). SRRL itself has
neither L_kd nor L_app at the other stages.

Before any run starts, the time and the peak memory of a step of each row are measured on the first of --devices, as in
ablations/complexity.py, and saved to cost.json.

All other options are those of cifar100.py and go to the runs they apply to.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ablations import tables
from ablations.components import PAIRS
from ablations.rows import Row

HEADER = ["functional matching at"]
ROWS = [
    (("none (L_app alone)",), Row({"method": "app"})),
    (("F^2",), Row({"method": "fcfd", "positions": [2]})),
    (("F^3",), Row({"method": "fcfd", "positions": [3]})),
    (("F^4",), Row({"method": "fcfd", "positions": [4]})),
    (("F^4, L_func alone (as SRRL)",), Row({"method": "fcfd", "positions": [4], "w_func_prime": 0})),
    (("F^2 and F^3, sampled",), Row({"method": "fcfd"})),
]


def main(argv: list[str] | None = None) -> int:
    """Complete the runs and write the table. Returns the exit code (see `exit_code`)."""
    return tables.main(argv, __doc__, "positions", HEADER, ROWS, PAIRS, num_stages=4, with_costs=True)


if __name__ == "__main__":
    sys.exit(main())

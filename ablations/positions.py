"""Tab. 13 (H.3): where functions are matched: at one stage alone, or at all of them by sampling.

    python ablations/positions.py
    python ablations/positions.py --pairs resnet32x4-resnet8x4 --seeds 1 2 3 --jobs 3

L_app is at every stage in all rows, and |S| = 2 paths are drawn in a step: at one stage alone, both directions.
At F^4, the last, there is no later stage left, but the classifier: the student's feature is sent through a bridge into
the teacher's. That direction only, and so one path, is SRRL's idea, a special case of L_func (App. I). SRRL itself has
neither L_kd nor L_app at the other stages.
Every other option is one of cifar100.py and goes to those of its runs that have a use for it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ablations import tables
from ablations.tables import Row

PAIRS = ["resnet32x4-resnet8x4"]
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
    """Run what is left of the table and write it; the exit code is that of `exit_code`."""
    return tables.main(argv, __doc__, "positions", HEADER, ROWS, PAIRS, num_stages=4)


if __name__ == "__main__":
    sys.exit(main())

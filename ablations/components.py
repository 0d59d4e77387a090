"""Tab. 5: the contributions of L_app, L_func and L_func', on top of L_task + L_kd.

    python ablations/components.py                                                    three pairs, 240 epochs
    python ablations/components.py --pairs resnet32x4-resnet8x4 --seeds 1 2 3 --jobs 3
    python ablations/components.py --pairs resnet20-resnet8 --epochs 30 --dataset folder --data-dir DIR

All other options are those of cifar100.py and go to the runs they apply to. In a row without L_func or L_func', both
paths of a step have the other direction.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ablations import tables
from ablations.rows import Row

PAIRS = ["resnet32x4-resnet8x4", "resnet32x4-ShuffleV1", "resnet32x4-ShuffleV2"]
HEADER = ["L_app", "L_func", "L_func'"]
NO_APP, NO_FUNC, NO_FUNC_PRIME = {"w_app": 0}, {"w_func_l2": 0, "w_func_kl": 0}, {"w_func_prime": 0}
ROWS = [
    (("", "", ""), Row({"method": "kd"})),
    (("✓", "", ""), Row({"method": "app"})),
    (("", "✓", "✓"), Row({"method": "fcfd", **NO_APP})),
    (("✓", "✓", ""), Row({"method": "fcfd", **NO_FUNC_PRIME})),
    (("✓", "", "✓"), Row({"method": "fcfd", **NO_FUNC})),
    (("✓", "✓", "✓"), Row({"method": "fcfd"})),
]


def main(argv: list[str] | None = None) -> int:
    """Complete the runs and write the table. Returns the exit code (see `exit_code`)."""
    return tables.main(argv, __doc__, "components", HEADER, ROWS, PAIRS)


if __name__ == "__main__":
    sys.exit(main())

"""Tab. 5: what each part of the method brings, beside L_task + L_kd: L_app, L_func, L_func'.

    python ablations/components.py                                                    three pairs, 240 epochs
    python ablations/components.py --pairs resnet32x4-resnet8x4 --seeds 1 2 3 --jobs 3
    python ablations/components.py --pairs resnet20-resnet8 --epochs 30 --dataset folder --data-dir DIR

Every other option is one of cifar100.py and goes to those of its runs that have a use for it. Where one of L_func and
L_func' is left out, the two paths of a step are all those of the other direction that there are.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ablations import tables
from ablations.tables import Row

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
    """Run what is left of the table and write it; the exit code is that of `exit_code`."""
    return tables.main(argv, __doc__, "components", HEADER, ROWS, PAIRS)


if __name__ == "__main__":
    sys.exit(main())

"""How closely students match their teacher's predictions on test images, and how accurate they are.

    python ablations/agreement.py --teacher TEACHER_RUN STUDENT_RUN...

All are folders of cifar100.py runs on the same data; the teacher's is the run that trained it. Agreement is the share
of test images on which student and teacher predict the same class; the KL is that of L_kd, T^2 KL(p_t || p_s), always
at T = 4. Runs whose names differ only in the seed form one row: mean ± sample standard deviation.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from ablations.cells import markdown, mean_and_deviation
from ablations.curves import series
from common.data.batches import SIZE, ImageSet, eval_batches
from common.data.sources import load_data
from common.losses import kl
from common.models import build
from common.run.checkpoint import load_network, write_atomically
from common.run.earlier_runs import read_config
from common.run.errors import UserError, exit_code
from common.run.options import Parser
from common.simkd import build_simkd

TEMPERATURE = 4.0
DIGITS = {"accuracy": 2, "agreement": 2, "kl": 3}  # decimals in the table


def load_config(run: Path) -> dict:
    """The settings of a run.

    Raises:
        UserError: `run` is not a folder of a cifar100.py run.
    """
    config = read_config(run)
    if not config or not {"student", "dataset", "data_dir", "fingerprint"} <= config.keys():
        raise UserError(f"{run} is not the folder of a cifar100.py run: it needs config.yaml and student.pth")
    return config


@torch.no_grad()
def compute_logits(run: Path, test: ImageSet, num_classes: int) -> Tensor:
    """Logits [n, num_classes] of a run's trained network for the n test images."""
    config = load_config(run)
    net = build(config["student"], num_classes)
    if config.get("simkd"):
        net = build_simkd(net, build(config["teacher"], num_classes), SIZE)
    load_network(net.eval(), run / "student.pth", config["student"])
    return torch.cat([net(images) for images, _ in eval_batches(test)])


def measure(student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy and agreement in percent, and the KL; logits are [n, K], labels [n]."""
    prediction = student.argmax(1)
    return {
        "accuracy": 100 * (prediction == labels).double().mean().item(),
        "agreement": 100 * (prediction == teacher.argmax(1)).double().mean().item(),
        "kl": kl(student, teacher, TEMPERATURE).item(),
    }


def main(argv: list[str] | None = None) -> int:
    """Print and write the table. Returns the exit code (see `exit_code`)."""

    def script() -> None:
        parser = Parser(__doc__)
        parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folders of students' runs")
        parser.add_argument("--teacher", metavar="RUN", type=Path, required=True, help="folder of the teacher's run")
        parser.add_argument("--data-dir", metavar="DIR", help="default: that of the teacher's run")
        parser.add_argument("--out", metavar="FILE", default="results/agreement/table.md")
        args = parser.parse(argv)
        config = load_config(args.teacher)
        for run in args.runs:
            if load_config(run)["fingerprint"] != config["fingerprint"]:
                raise UserError(f"{run} used other data than {args.teacher}: pass runs on the same images")
        subsets = config.get("subset"), config.get("test_subset")
        data = load_data(config["dataset"], args.data_dir or config["data_dir"], *subsets)
        teacher = compute_logits(args.teacher, data.test, len(data.classes))
        found = {
            name: [
                measure(compute_logits(run, data.test, len(data.classes)), teacher, data.test.labels) for run in runs
            ]
            for name, runs in series(args.runs).items()
        }
        rows = []
        for name, runs in found.items():
            of_key = {key: [run[key] for run in runs] for key in runs[0]}
            texts = [mean_and_deviation(of_key[key], digits) for key, digits in DIGITS.items()]
            rows.append([name, len(runs), *texts])
        text = markdown(["student", "n", "accuracy (%)", "agreement with the teacher (%)", "KL from the teacher"], rows)
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(args.out), lambda file: file.write(text.encode()))
        print(f"{text}\nwritten to {args.out}")

    return exit_code(script, "rerun the command")


if __name__ == "__main__":
    sys.exit(main())

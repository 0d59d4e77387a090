"""How closely students match their teacher's predictions on test images, and how accurate they are.

    python ablations/agreement.py --teacher runs/cifar100-resnet32x4-alone-240ep-seed1-fp16 RUN...
    python ablations/agreement.py --teacher ckpt_epoch_240.pth RUN...

Students are given by the folders of their cifar100.py runs on the same data. The teacher is the folder of the run that
trained it, or a checkpoint of the network that the students name as their teacher. Agreement is the share of test
images on which student and teacher predict the same class; the KL is that of L_kd, T^2 KL(p_t || p_s), always at T = 4.
Runs whose names differ only in the seed form one row: mean ± sample standard deviation.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from ablations.cells import markdown, mean_and_deviation
from ablations.curves import series
from common.data.batches import SIZE, ImageSet, eval_batches
from common.data.sources import load_data
from common.losses import kl
from common.models import StagedNet, build
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
    keys, scripts = {"student", "dataset", "data_dir", "fingerprint"}, (None, "baseline_cifar100")  # None: cifar100
    if not config or not keys <= config.keys() or config.get("script") not in scripts:
        raise UserError(f"{run} is not the folder of a cifar100.py run: it needs config.yaml and student.pth")
    return config


def load_run(run: Path, num_classes: int) -> nn.Module:
    """The trained network of a run."""
    config = load_config(run)
    net = build(config["student"], num_classes)
    if config.get("simkd"):
        net = build_simkd(net, build(config["teacher"], num_classes), SIZE)
    load_network(net, run / "student.pth", config["student"])
    return net


def load_teacher(file: Path, students: list[Path], num_classes: int) -> StagedNet:
    """The network in a checkpoint; its name is that of the teacher in the students' runs.

    Raises:
        UserError: the runs name no teacher, or several; the checkpoint cannot be loaded.
    """
    names = {config["teacher"] for config in map(load_config, students) if config.get("teacher")}
    if len(names) != 1:
        found = " and ".join(sorted(names)) or "none"
        raise UserError(f"--teacher {file}: the runs must name one teacher (they name {found}); pass its run instead")
    net = build(name := names.pop(), num_classes)
    load_network(net, file, name)
    return net


@torch.no_grad()
def compute_logits(net: nn.Module, test: ImageSet) -> Tensor:
    """Logits [n, num_classes] for the n test images."""
    net.eval()
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
        add = parser.add_argument
        add("runs", nargs="+", metavar="RUN", type=Path, help="folders of students' runs")
        add("--teacher", metavar="RUN|FILE", type=Path, required=True, help="the teacher's run, or its checkpoint")
        add("--data-dir", metavar="DIR", help="default: that of the teacher's run, or of the first student's")
        add("--out", metavar="FILE", default="results/agreement/table.md", help="the table")
        args = parser.parse(argv)
        is_file = args.teacher.is_file()
        config = load_config(first := args.runs[0] if is_file else args.teacher)
        for run in args.runs:
            if load_config(run)["fingerprint"] != config["fingerprint"]:
                raise UserError(f"{run} and {first} used different data: pass runs on the same images")
        subsets = config.get("subset"), config.get("test_subset")
        data = load_data(config["dataset"], args.data_dir or config["data_dir"], *subsets)
        if data.fingerprint != config["fingerprint"]:
            where = args.data_dir or config["data_dir"]
            raise UserError(f"{first} did not use the images in {where}: pass its --data-dir")
        n = len(data.classes)
        net = load_teacher(args.teacher, args.runs, n) if is_file else load_run(args.teacher, n)
        teacher = compute_logits(net, data.test)
        found = {
            name: [measure(compute_logits(load_run(run, n), data.test), teacher, data.test.labels) for run in runs]
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

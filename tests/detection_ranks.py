"""Run by test_detection_ranks.py: `torchrun --nproc_per_node=2 tests/detection_ranks.py FOLDER COMMAND...`.

gradients TERMS...  a step on each comma-separated list of terms: gradients with DDP, and each rank's without it
train OPTION...     run detection.py with these options; each rank saves its final state
"""

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_detectors import shrink

import detection
from common.detection.detectors import build_detector
from common.detection.fcfd import TERMS
from common.run.distributed import rank
from common.run.torchrun import distribute, process_group


def gradients(folder, *lists):
    with process_group("cpu"):
        for i, terms in enumerate(lists):
            save_gradients(folder / f"gradients{rank()}-{i}.pt", terms.split(","))


def save_gradients(path, terms):
    torch.manual_seed(rank())  # the ranks start with different weights
    args = detection.parse_args(
        ["--teacher", "resnet18", "--student", "mobilenet_v2", "--device", "cpu", "--amp", "off"]
    )
    teacher = build_detector("resnet18", 3, [96], scratch=True).requires_grad_(False)
    student = build_detector("mobilenet_v2", 3, [96], rois=16, scratch=True)
    vars(args).update({f"w_{name}": float(name in terms) for name in TERMS})
    step = detection.Step(args, student, teacher).train()
    distributed = distribute(step, some_unused="task" not in terms)
    local = copy.deepcopy(step)
    images = [torch.rand(3, 96, 120, generator=torch.Generator().manual_seed(rank()))]
    targets = [{"boxes": torch.tensor([[5.0, 8.0, 60.0, 70.0]]), "labels": torch.tensor([1 + rank()])}]
    for net in (distributed, local):
        for _ in range(2):  # DDP would wait for a parameter without a gradient in the second pass
            net.zero_grad(set_to_none=True)
            torch.manual_seed(10 + rank())
            values = net(images, targets)
            sum(values[term] for term in terms).backward()
    results = {
        name: {key: p.grad for key, p in net.named_parameters() if p.requires_grad}
        for name, net in (("distributed", step), ("local", local))
    }
    torch.save(results, path)


def train(folder, *options):
    steps, make_step, rows, add_row = [], detection.Step, [], detection.add_row

    def make_and_record(*args):
        steps.append(make_step(*args))
        return steps[-1]

    def add_and_record(state, *args):
        rows.append(state["sums"])
        add_row(state, *args)

    detection.Step, detection.add_row = make_and_record, add_and_record
    code = detection.main(list(options))
    if steps:
        torch.save((steps[0].state_dict(), torch.initial_seed(), rows), folder / f"trained{rank()}.pt")
    sys.exit(code)


if __name__ == "__main__":
    folder, command, *more = sys.argv[1:]
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        {"gradients": gradients, "train": train}[command](Path(folder), *more)

"""Run by test_distributed.py on two ranks: `torchrun --nproc_per_node=2 tests/ranks.py FOLDER COMMAND...`.

gradients           one step: gradients with DDP, of the whole batch in one process, and of this rank's share
train OPTION...     run imagenet.py with these options; each rank saves its final state
train-fixed OPT...  the same with every BatchNorm in evaluation mode, so results do not depend on the number of ranks
"""

import copy
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import imagenet
from common.bridges import Bridges
from common.data.image_files import FileData
from common.multipath_bn import track_paths
from common.paths import MixedPath, candidate_paths
from common.run.distributed import rank, world_size
from common.run.torchrun import distribute, process_group

WEIGHTS = {"task": 1.0, "kd": 0.9, "app": 5.0, "func_l2": 3.0, "func_kl": 0.7, "func_prime": 0.3}
PATHS = [MixedPath(2, 1), MixedPath(3, 0)]  # two of six


def build_step(seed):
    """A step in evaluation mode, with updated BatchNorm statistics."""
    options = ["--teacher", "resnet18", "--student", "MobileNetV1", "--image-size", 64, "--seed", seed]
    args = imagenet.parse_args([*map(str, options), "--device", "cpu", "--amp", "off"])
    step = imagenet.Step(args, FileData([], [], ["n1", "n2", "n3"], ""))
    for net in (step.student, step.teacher):
        track_paths(net, [2, 3, 4])
    norms = [module for module in step.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        for _ in range(2):
            step.train()(torch.randn(16, 3, 64, 64), torch.zeros(16, dtype=torch.int64), candidate_paths(5))
    return step.eval()


def weighted_sum(terms):
    return sum(WEIGHTS[name] * value for name, value in terms.items())


def gradients(folder):
    with process_group("cpu"):
        step = build_step(seed=rank())  # the ranks start with different weights
        whole_batch, local = copy.deepcopy(step), copy.deepcopy(step)
        images, labels = torch.randn(7, 3, 64, 64, generator=torch.Generator().manual_seed(9)), torch.arange(7) % 3
        shard = slice(rank(), None, world_size())
        distributed = distribute(step, some_unused=True)
        # DDP would wait for a parameter without a gradient in the second pass.
        for _ in range(2):
            step.zero_grad(set_to_none=True)
            terms, _ = distributed(images[shard], labels[shard], PATHS)
            (weighted_sum(terms) * len(labels[shard]) / len(labels) * world_size()).backward()
        weighted_sum(local(images[shard], labels[shard], PATHS)[0]).backward()
        terms, _ = whole_batch(images, labels, PATHS)
        weighted_sum(terms).backward()

        def named_gradients(net):
            return {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}

        nets = {"distributed": step, "whole_batch": whole_batch, "local": local}
        results = {name: named_gradients(net) for name, net in nets.items()} | {"terms": terms}
        torch.save(results, folder / f"gradients{rank()}.pt")


def fix_batch_norm(step):
    """Make every BatchNorm, on pure and mixed paths, use fixed running statistics with variance 1."""
    for module in step.modules():
        if hasattr(module, "running_var"):
            torch.nn.init.ones_(module.running_var)
        if isinstance(module, (torch.nn.BatchNorm2d, Bridges)):
            module.eval()
            module.train = lambda mode=True: None


def train_fixed(folder, *options):
    train(folder, *options, prepare=fix_batch_norm)


def train(folder, *options, prepare=lambda step: None):
    steps, evaluations = [], []
    evaluate = imagenet.evaluate_distributed

    class RecordedStep(imagenet.Step):
        def __init__(self, *args):
            super().__init__(*args)
            steps.append(self)

    def prepare_and_distribute(step, **options):
        prepare(step)
        return distribute(step, **options)

    def evaluate_and_record(net, *args):
        state = {key: value.clone() for key, value in net.state_dict().items()}
        evaluations.append((state, evaluate(net, *args)))
        return evaluations[-1][1]

    imagenet.train = partial(imagenet.train, make_step=RecordedStep)
    imagenet.distribute = prepare_and_distribute
    imagenet.evaluate_distributed = evaluate_and_record
    code = imagenet.main(list(options))
    torch.save({"step": steps[0].state_dict(), "evaluations": evaluations}, folder / f"trained{rank()}.pt")
    sys.exit(code)


if __name__ == "__main__":
    folder, command, *more = sys.argv[1:]
    {"gradients": gradients, "train": train, "train-fixed": train_fixed}[command](Path(folder), *more)

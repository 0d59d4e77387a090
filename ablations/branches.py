"""Exit branches on a frozen teacher (Sec. 3.4, A.2): an independent test of students' features.

An exit branch is the later part of a CIFAR ResNet with its own classifier, trained to classify the teacher's features
F_t^k. exit_branches.py and tsne.py feed students' features into the branches.
"""

import copy
import hashlib
import json
import math
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import cifar100
from ablations.cells import Cell, first_difference
from common.data.batches import SIZE, Data, ImageSet, eval_batches, normalize, train_batches
from common.models import StagedNet, pool
from common.models.resnet import group
from common.models.staged import init_fan_out
from common.multipath_bn import track_paths
from common.randomness import derive_seed, generator
from common.run.checkpoint import load, save, write_atomically
from common.run.device import AMP, open_device
from common.run.errors import NonFiniteLossError, UserError, user_errors
from common.run.evaluation import evaluate
from common.run.folder import made_with, open_folder, read_state
from common.run.optimizer import sgd

LR = 0.05
CALIBRATION_BATCH = 500  # images
Features = Callable[[Tensor], dict[str, Tensor]]  # images [B, 3, 32, 32] -> str(k): a feature in the space of F_t^k


class Branch(nn.Module):
    """The last groups of a CIFAR ResNet and a classifier, applied to a feature F^k [B, c_in, H, W] of another network.

    Args:
        groups: how many of the ResNet's three groups.
        depth, widths: of the ResNet; widths of the stem and the three groups.
        pre_relu: whether the features come before their ReLU, so that the branch starts with one.
    """

    def __init__(self, c_in: int, groups: int, depth: int, widths: list[int], num_classes: int, pre_relu: bool):
        super().__init__()
        self.pre_relu = pre_relu
        numbers = range(4 - groups, 4)  # of the three groups; the first keeps the resolution
        channels = [c_in, *(widths[i] for i in numbers)]
        self.groups = nn.Sequential(
            *(group(channels[j], channels[j + 1], (depth - 2) // 6, min(i, 2)) for j, i in enumerate(numbers))
        )
        self.fc = nn.Linear(channels[-1], num_classes)
        init_fan_out(self)

    def penultimate(self, feature: Tensor) -> Tensor:
        """The classifier's input, after pooling: [B, C]."""
        return pool(self.groups(F.relu(feature) if self.pre_relu else feature))

    def forward(self, feature: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        return self.fc(self.penultimate(feature))


def build_branches(teacher: StagedNet, c: Namespace, num_classes: int) -> nn.ModuleDict:
    """str(k) -> the branch on F_t^k, k = 2..N-1: the last N - k groups. Initial weights depend only on (seed, k).

    Raises:
        UserError: the teacher has no such k, or more stages than a CIFAR ResNet has groups for.
    """
    n = teacher.num_stages
    if not 3 <= n <= 5:
        raise UserError(f"the teacher has {n} stages: exit branches need 3 to 5")
    branches = {}
    for k, feature in teacher_features(teacher, torch.zeros(1, 3, SIZE, SIZE)).items():
        torch.manual_seed(derive_seed(c.seed, 0, f"branch {k}"))
        shape = (feature.shape[1], n - int(k), c.branch_depth, c.branch_widths)
        branches[k] = Branch(*shape, num_classes, pre_relu=not teacher.post_relu)
    return nn.ModuleDict(branches)


@torch.no_grad()
def teacher_features(teacher: StagedNet, images: Tensor) -> dict[str, Tensor]:
    """str(k) -> F_t^k, k = 2..N-1, with running BatchNorm statistics; leaves the teacher in evaluation mode."""
    teacher.eval()
    features, x = {}, images
    for k in range(1, teacher.num_stages):
        features[str(k)] = x = teacher.stage(k, x)
    del features["1"]
    return features


def train_branches(c: Namespace, folder: Path, teacher: StagedNet, data: Data) -> tuple[nn.ModuleDict, dict[str, Any]]:
    """Train the branches on the frozen `teacher`, or resume from branches.pt: (branches, contents of branches.pt).

    All branches see the same batches and their losses are summed, so each is trained as it would be alone (except that
    with fp16, a step that overflows in one branch is skipped for all).

    The state includes the accuracies on the teacher's own features, as trained ("top1") and recalibrated as for a
    student ("top1_recalibrated").

    Args:
        c: settings; the data's fingerprint and a digest of the teacher's weights are added.

    Raises:
        UserError: branches.pt has different settings, or is another kind of file.
        NonFiniteLossError: training diverged.
    """
    file, device = folder / "branches.pt", open_device(c.device)
    state = load(file) if file.exists() else {}
    if file.exists() and not (isinstance(state, dict) and {"settings", "epoch", "log", "branches"} <= state.keys()):
        raise UserError(f"{file} is not a checkpoint of exit branches: remove it, or choose another --runs")
    stored = state.get("settings", {})
    c.fingerprint, c.teacher_weights = data.fingerprint, digest(teacher)
    check_branch_settings(folder, stored, c)

    branches = build_branches(teacher.cpu(), c, len(data.classes))
    for net in (teacher.requires_grad_(False), branches):
        net.to(device, memory_format=torch.channels_last)
    features = partial(teacher_features, teacher)
    amp = AMP[c.amp]
    optimizer = sgd(branches.parameters(), LR, momentum=0.9, weight_decay=5e-4, nesterov=True)
    scaler = torch.amp.GradScaler(device.type, enabled=c.amp == "fp16")
    if state:
        for name, part in {"branches": branches, "optimizer": optimizer, "scaler": scaler}.items():
            part.load_state_dict(state[name])
    else:
        state = {"settings": vars(c), "epoch": 0, "log": []}

    steps = math.ceil(len(data.train) / c.batch_size)
    for epoch in range(state["epoch"], c.branch_epochs):
        began = time.monotonic()
        lr = cifar100.learning_rate(Namespace(lr=LR, epochs=c.branch_epochs), epoch)
        optimizer.param_groups[0]["lr"] = lr
        branches.train()
        sums = {name: torch.zeros((), device=device) for k in branches for name in (f"loss_{k}", f"train_top1_{k}")}
        for images, labels in train_batches(data.train, c.batch_size, c.seed, epoch):
            with torch.autocast(device.type, amp, enabled=amp is not None):
                logits = {k: branches[k](feature) for k, feature in features(images).items()}
            losses = {k: F.cross_entropy(each.float(), labels) for k, each in logits.items()}
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(sum(losses.values())).backward()
            scaler.step(optimizer)
            scaler.update()
            with torch.no_grad():
                for k in branches:
                    sums[f"loss_{k}"] += losses[k] / steps
                    sums[f"train_top1_{k}"] += 100 * (logits[k].argmax(1) == labels).sum() / len(data.train)

        row = {"epoch": epoch + 1, "lr": lr, **{name: value.item() for name, value in sums.items()}}
        if not all(tensor.isfinite().all() for tensor in (*sums.values(), *branches.state_dict().values())):
            raise NonFiniteLossError(f"in epoch {epoch + 1} of the branches in {folder}")
        if epoch + 1 == c.branch_epochs:
            state["top1"], state["top1_recalibrated"] = (
                accuracies(each, features, data.test)
                for each in (branches, recalibrated(branches, features, data.train))
            )
        state["log"].append(row | {"seconds": time.monotonic() - began})
        saved = {"branches": branches.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        state |= saved | {"epoch": epoch + 1, "made_with": made_with(device)}
        save(state, file)
        parts = (f"after F^{k}: loss {row[f'loss_{k}']:.4f}, {row[f'train_top1_{k}']:.2f} %" for k in branches)
        line = f"branches, epoch {epoch + 1:3}/{c.branch_epochs}  {'  '.join(parts)}  "
        print(f"{line}{state['log'][-1]['seconds']:.1f} s", flush=True)
    return branches.eval(), state


def check_branch_settings(folder: Path, stored: dict[str, Any], c: Namespace) -> None:
    """Raise a UserError if the `stored` settings of the branches in `folder` differ from those that `c` has."""
    if "teacher_weights" in c and stored.get("teacher_weights", c.teacher_weights) != c.teacher_weights:
        raise UserError(f"the branches in {folder} are for another teacher: remove them, or choose another --runs")
    if difference := first_difference(stored, vars(c)):
        raise UserError(
            f"{folder} holds branches with different settings: {difference}; remove it, or choose another --runs"
        )


def digest(net: nn.Module) -> str:
    """SHA-256 of the network's parameters and buffers."""
    digest = hashlib.sha256()
    for key, value in net.state_dict().items():
        digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def student_features(cell: Cell, data: Data, teacher: StagedNet, device: torch.device) -> Features:
    """The bridged features B_st^k(F_s^k), k = 2..N-1, of a finished run's student on its pure path, without gradients.

    Raises:
        UserError: last.pt cannot be read, or the run had another teacher.
    """
    with open_folder(cell.folder, resume=True), user_errors():
        state = read_state(cell.folder, "cifar100", "epoch")
        args = cifar100.parse_args(["--student", cell.given["student"]], state["config"])
        student, _, bridges, candidates, _ = cifar100.build_networks(args, len(data.classes))
        track_paths(student, sorted({path.k for path in candidates}))
    try:
        student.load_state_dict(state["student"])
        bridges.load_state_dict(state["bridges"])
        weights = {key: (state["teacher"][key], value.cpu()) for key, value in teacher.named_parameters()}
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{cell.folder / 'last.pt'} does not fit this run: choose another --runs") from error
    if not all(torch.equal(*pair) for pair in weights.values()):
        raise UserError(f"{cell.folder} was distilled from another {args.teacher}: choose another --runs")
    student, bridges = student.to(device).eval(), bridges.to(device).eval()

    @torch.no_grad()
    def features(images: Tensor) -> dict[str, Tensor]:
        own = student.features(images)
        return {str(k): bridges.s2t[str(k)](own[k - 1]) for k in range(2, student.num_stages)}

    return features


def recalibrated(branches: nn.ModuleDict, features: Features, train: ImageSet) -> nn.ModuleDict:
    """Copies of the branches, in evaluation mode, with BatchNorm statistics of `features` of the training images.

    A layer's statistics are the batch statistics averaged over batches; each batch is normalized by its own. The
    batches cover all images once, without augmentation: in random order, since a dataset may be sorted by class, and
    in sizes as equal as possible, since all batches have the same weight.
    """
    order = torch.randperm(len(train), generator=generator(0, 0, "recalibration")).to(train.labels.device)
    parts = order.tensor_split(math.ceil(len(train) / CALIBRATION_BATCH))
    copies = copy.deepcopy(branches)
    for k, branch in copies.items():
        update_bn((features(normalize(train.images[part]))[k] for part in parts), branch)
    return copies.eval()


def accuracies(branches: nn.ModuleDict, features: Features, test: ImageSet) -> dict[str, float]:
    """str(k) -> top-1 accuracy in percent of the branch on `features` of the test images."""
    return {
        k: evaluate(branch, ((features(images)[k], labels) for images, labels in eval_batches(test)))["top1"]
        for k, branch in branches.items()
    }


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file, or {} if it is missing or cannot be read."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file atomically."""
    write_atomically(file, lambda handle: handle.write(json.dumps(content, indent=1).encode()))

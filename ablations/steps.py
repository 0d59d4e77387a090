"""The training step of each method on a batch of noise, to measure what it costs.

alone                   the unit: one forward and backward of the student in plain eager NCHW float32, without SGD
kd, dkd, app, fcfd      the step of cifar100.py: forward along all paths, loss terms, backward, SGD
plain                   the step of fcfd in eager NCHW float32
reviewkd, crd           the step of train_baseline.py; CRD's banks are those of CIFAR-100

All but "alone" and "plain" are in the form of training: channels_last and autocast.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cifar100
from ablations import train_baseline
from ablations.measure import Step
from common.data.batches import SIZE
from common.fcfd import fcfd_terms, forward_paths, needs_all_bridges
from common.losses import dkd, kl
from common.models import build
from common.multipath_bn import track_paths
from common.paths import sample_paths
from common.run.device import AMP
from common.run.optimizer import sgd

CLASSES = 100
IMAGES = 50_000  # CIFAR-100's training images
BASELINES = ("reviewkd", "crd")
OPTIONS = {  # of cifar100.py, or of train_baseline.py
    "kd": ["--method=kd"],
    "dkd": ["--method=kd", "--kd-loss=dkd"],
    "app": ["--method=app"],
    "fcfd": [],
    "plain": [],
    "reviewkd": ["--method=reviewkd"],
    "crd": ["--method=crd"],
}
Loss = Callable[[int], Tensor]  # of step i; the terms are not weighted


def build_step(pair: str, kind: str, num_paths: int | None, args: Namespace) -> Step:
    """The step `kind` of a pair "TEACHER-STUDENT".

    Args:
        num_paths: |S|, for a step of cifar100.py; each step i < args.repeats samples its own paths.
        args: batch_size, device, amp and repeats.
    """
    teacher, student = pair.split("-")
    images = torch.randn(args.batch_size, 3, SIZE, SIZE, device=args.device)
    labels = torch.randint(CLASSES, (args.batch_size,), device=args.device)
    if kind == "alone":
        return alone_step(build(student, CLASSES).to(args.device), images, labels)

    memory_format, amp = torch.channels_last, args.amp
    if kind == "plain":
        memory_format, amp = torch.contiguous_format, "off"
    images = images.contiguous(memory_format=memory_format)
    words = [f"--teacher={teacher}", f"--student={student}", *OPTIONS[kind]]
    words += [] if num_paths is None else [f"--num-paths={num_paths}"]
    if kind in BASELINES:
        networks, loss, distinct = baseline_loss(words, images, labels)
    else:
        networks, loss, distinct = cifar100_loss(words, images, labels, args.repeats)
    for net in networks:
        net.to(args.device, memory_format=memory_format)
    run = training_step(networks, loss, torch.device(args.device), amp, nesterov=kind not in BASELINES)
    return Step(run, distinct)


def alone_step(student: nn.Module, images: Tensor, labels: Tensor) -> Step:
    """One forward and backward of the student."""

    def step(i: int) -> None:
        student.zero_grad(set_to_none=True)
        F.cross_entropy(student(images), labels).backward()

    return Step(step)


def cifar100_loss(
    words: list[str], images: Tensor, labels: Tensor, steps: int
) -> tuple[list[nn.Module], Loss, list[int]]:
    """The networks and the loss of cifar100.py with the options `words`, and which of its `steps` are distinct."""
    args = cifar100.parse_args(words)
    student, teacher, bridges, candidates, weights = cifar100.build_networks(args, CLASSES)
    for net in (teacher, student):
        track_paths(net, sorted({path.k for path in candidates}))
    paths = sample_paths(candidates, args.num_paths, steps, seed=0, epoch=0)
    kd_loss = partial(dkd, labels=labels, tckd=args.tckd, nckd=args.nckd) if args.kd_loss == "dkd" else kl

    def loss(i: int) -> Tensor:
        flow = forward_paths(teacher, student, bridges, images, paths[i], needs_all_bridges(weights))
        return sum(fcfd_terms(flow, labels, args.temperature, weights, kd_loss).values())

    distinct = sorted({paths.index(S) for S in paths})  # the first step with each S
    return [net for net in (teacher, student, bridges) if net is not None], loss, distinct


def baseline_loss(words: list[str], images: Tensor, labels: Tensor) -> tuple[list[nn.Module], Loss, list[int]]:
    """The same for train_baseline.py, whose steps are alike."""
    args = train_baseline.parse_args(words)
    student, teacher = train_baseline.build_networks(args, CLASSES)
    method = train_baseline.build_method(args.method, teacher, student, torch.randint(CLASSES, (IMAGES,)))
    teacher.eval()
    index, generator = torch.arange(len(images), device=images.device), torch.Generator(images.device)

    def loss(i: int) -> Tensor:
        return sum(train_baseline.terms(method, teacher, student, images, labels, index, generator)[0].values())

    return [teacher, student, method], loss, [0]


def training_step(
    networks: list[nn.Module], loss: Loss, device: torch.device, amp: str, nesterov: bool
) -> Callable[[int], None]:
    """Forward, backward and SGD."""
    parameters = [p for net in networks for p in net.parameters() if p.requires_grad]
    optimizer = sgd(parameters, 0.01, momentum=0.9, weight_decay=5e-4, nesterov=nesterov)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    def step(i: int) -> None:
        with torch.autocast(device.type, AMP[amp], enabled=amp != "off"):
            value = loss(i)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()

    return step

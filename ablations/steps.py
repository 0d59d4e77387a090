"""The training step of a run on a batch of noise, to measure what it costs.

cifar100.py           forward along all paths, loss terms, backward, SGD
baseline_cifar100.py  the step of a method there; CRD's banks have the size of CIFAR-100
student alone         one forward and backward, without SGD: the reference for relative costs

The steps of both scripts use channels_last and autocast, as in training. The plain form and the
student alone use NCHW float32.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cifar100
from ablations import baseline_cifar100
from ablations.baselines.batch import Batch
from ablations.baselines.build import build_method
from ablations.cells import to_argv
from ablations.measure import Step
from common.data.batches import SIZE
from common.fcfd import fcfd_terms, forward_paths
from common.losses import dkd, kl
from common.models import build
from common.multipath_bn import track_paths
from common.paths import sample_paths
from common.plan import needs_all_bridges
from common.run.device import AMP
from common.run.optimizer import sgd

CLASSES = 100
IMAGES = 50_000  # CIFAR-100's training images
BASELINES = ("reviewkd", "crd")
Loss = Callable[[int], Tensor]  # of step i; the terms are not weighted


def build_step(pair: str, options: dict[str, Any], args: Namespace, plain: bool = False) -> Step:
    """A step of the pair "TEACHER-STUDENT". Each step i < args.repeats samples its own paths.

    Args:
        options: of the run by name ("num_paths"), besides its networks; empty for the student alone.
        args: batch_size, device, amp and repeats.
        plain: in the plain form.

    Raises:
        ValueError: as `build_networks` of the run's script.
    """
    teacher, student = pair.split("-")
    images = torch.randn(args.batch_size, 3, SIZE, SIZE, device=args.device)
    labels = torch.randint(CLASSES, (args.batch_size,), device=args.device)
    if not options:
        return alone_step(build(student, CLASSES).to(args.device), images, labels)

    memory_format, amp = (torch.contiguous_format, "off") if plain else (torch.channels_last, args.amp)
    images = images.contiguous(memory_format=memory_format)
    words = to_argv({"teacher": teacher, "student": student} | options)
    nesterov = True
    if options["method"] in BASELINES:
        networks, loss, distinct, nesterov = baseline_loss(words, images, labels)
    else:
        networks, loss, distinct = cifar100_loss(words, images, labels, args.repeats)
    for net in networks:
        net.to(args.device, memory_format=memory_format)
    run = training_step(networks, loss, torch.device(args.device), amp, nesterov)
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
    teacher.train(args.teacher_bn == "batch")
    for net in (teacher, student):
        track_paths(net, sorted({path.k for path in candidates}))
    paths = sample_paths(candidates, args.num_paths, steps, seed=0, epoch=0)
    kd_loss = partial(dkd, labels=labels, tckd=args.tckd, nckd=args.nckd) if args.kd_loss == "dkd" else kl

    def loss(i: int) -> Tensor:
        flow = forward_paths(teacher, student, bridges, images, paths[i], needs_all_bridges(weights))
        return sum(fcfd_terms(flow, labels, args.temperature, weights, kd_loss).values())

    distinct = sorted({paths.index(S) for S in paths})  # the first step with each S
    return [net for net in (teacher, student, bridges) if net is not None], loss, distinct


def baseline_loss(words: list[str], images: Tensor, labels: Tensor) -> tuple[list[nn.Module], Loss, list[int], bool]:
    """The same for baseline_cifar100.py, all of whose steps cost the same, and whether SGD is Nesterov's."""
    args = baseline_cifar100.parse_args(words)
    student, teacher = baseline_cifar100.build_networks(args, CLASSES)
    method = build_method(args, student, teacher, SIZE, torch.randint(CLASSES, (IMAGES,)))
    teacher.train(args.teacher_bn == "batch")
    batch = Batch(labels, torch.arange(len(images), device=images.device), torch.Generator(images.device))

    def loss(i: int) -> Tensor:
        return sum(baseline_cifar100.loss_terms(method, student, teacher, images, batch, args)[0].values())

    return [teacher, student, method], loss, [0], args.optimizer == "nesterov"


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

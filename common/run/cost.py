"""The inference cost that SimKD adds to a student."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..models import build
from ..simkd import build_simkd


@torch.no_grad()
def inference_cost(net: nn.Module, image_size: int) -> tuple[int, int]:
    """(parameters, FLOPs per image of convolutions and linear layers); one multiply-add is two FLOPs."""
    with FlopCounterMode(display=False) as counter:
        net.eval()(next(net.parameters()).new_zeros(1, 3, image_size, image_size))
    return sum(p.numel() for p in net.parameters()), counter.get_total_flops()


def added_cost(student: str, teacher: str, num_classes: int, image_size: int) -> list[tuple[int, int]]:
    """`inference_cost` of a student without and with SimKD, by network name; runs on the meta device."""
    with torch.device("meta"):
        net = build(student, num_classes)
        alone = inference_cost(net, image_size)
        return [alone, inference_cost(build_simkd(net, build(teacher, num_classes), image_size), image_size)]


def cost_line(student: str, teacher: str, num_classes: int, image_size: int) -> str:
    """`added_cost` as a sentence."""
    (p_0, f_0), (p_1, f_1) = added_cost(student, teacher, num_classes, image_size)
    parameters = f"{(p_1 - p_0) / 1e3:.1f}k parameters ({100 * (p_1 / p_0 - 1):+.1f} %)"
    flops = f"{(f_1 - f_0) / 1e6:.1f} MFLOPs per image ({100 * (f_1 / f_0 - 1):+.1f} %)"
    return f"SimKD: projector and teacher's classifier add {parameters} and {flops} to {student} at inference"

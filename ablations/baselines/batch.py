"""What a method may need of a batch besides the features and outputs of both networks."""

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """The labels and indices of a batch's images, and random numbers for this step.

    Attributes:
        labels: [B].
        index: [B], among all training images, without repetition.
        generator: on the device of the images.
    """

    labels: Tensor
    index: Tensor
    generator: torch.Generator

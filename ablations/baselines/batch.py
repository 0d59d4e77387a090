"""What a loss may need besides the Taps of both networks."""

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """The labels and indices of a batch's images, and random numbers for this step.

    Attributes:
        labels: [B].
        index: [B], indices into the training set, all different.
        generator: on the device of the images.
    """

    labels: Tensor
    index: Tensor
    generator: torch.Generator

"""Pictures of what detectors find: an image with its own boxes and with those of each detector, side by side."""

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.utils import draw_bounding_boxes

from ..run.errors import UserError
from .coco import Split, evenly
from .images import BoxedImages, load

MIN_SCORE = 0.5  # of a box that is drawn
SIDE = 320  # pixels: to this longer side smaller images are enlarged
# Told apart by the colour-blind too (Okabe and Ito); label k has the colour k % 7.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442"]


@torch.no_grad()
def draw_found(folder: Path, nets: dict[str, FasterRCNN], split: Split, classes: list[str], n: int) -> None:
    """Write pictures of `n` images, spread evenly over the split, into `folder`, named by number and file of the image.

    The boxes that a detector is less than half sure of are left out. Leaves the nets in evaluation mode.

    Args:
        nets: the detectors, by what is written above their panel.
        classes: the names of the labels 1..K.

    Raises:
        UserError: a picture cannot be written.
    """
    chosen = evenly(len(split), min(n, len(split))).tolist()
    device = next(next(iter(nets.values())).parameters()).device
    batches = load(BoxedImages(split), [[(0, 0, i)] for i in chosen], 0, device)
    for i, [(image, target)] in zip(chosen, batches, strict=True):
        panels = {"ground truth": target}
        for title, net in nets.items():
            found = net.eval()([image])[0]
            # The surest comes first, and is drawn last, over the others.
            panels[title] = {key: value[found["scores"] >= MIN_SCORE].flip(0) for key, value in found.items()}
        parts = [_panel(image, boxes, title, classes) for title, boxes in panels.items()]
        path = folder / f"{i}-{Path(os.fsdecode(split.files[i])).stem[:50]}.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(torch.cat(parts, 2).permute(1, 2, 0).numpy()).save(path)
        except OSError as error:
            raise UserError(f"cannot write {path} ({error}): choose another --out") from error


def _panel(image: Tensor, found: dict[str, Tensor], title: str, classes: list[str]) -> Tensor:
    """The image, its longer side at least SIDE, with its boxes and a title above: uint8 [3, H, W] on the CPU."""
    scale = max(1.0, SIDE / max(image.shape[1:]))
    canvas = torch.nn.functional.interpolate(image[None].cpu(), scale_factor=scale, mode="bilinear")[0]
    labels = found["labels"].tolist()
    scores = [f" {score:.2f}" for score in found["scores"].tolist()] if "scores" in found else [""] * len(labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where there is no box
        canvas = draw_bounding_boxes(
            (255 * canvas).to(torch.uint8),
            found["boxes"].cpu() * scale,
            [classes[label - 1] + score for label, score in zip(labels, scores, strict=True)],
            [COLOURS[label % len(COLOURS)] for label in labels],
            width=2,
            fill_labels=True,
        )
    head = Image.new("RGB", (canvas.shape[2], 20), "white")
    ImageDraw.Draw(head).text((6, 4), title, "black")
    return torch.cat([torch.from_numpy(np.array(head)).permute(2, 0, 1), canvas], 1)

"""Visualizes detections: an image with the ground truth and each detector's boxes, side by side."""

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
from .coco import Split, evenly_spaced
from .images import BoxedImages, load

MIN_SCORE = 0.5  # boxes below it are not drawn
SIDE = 320  # pixels; images are enlarged to a longer side of at least this
# Colorblind-safe (Okabe and Ito); label k has color k % 7.
COLORS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442"]


@torch.no_grad()
def draw_detections(folder: Path, nets: dict[str, FasterRCNN], split: Split, classes: list[str], n: int) -> None:
    """Draw boxes on `n` images, evenly spaced over the split, and save them as <index>-<file name>.png in `folder`.

    Boxes with a score below MIN_SCORE are omitted. Leaves the nets in evaluation mode.

    Args:
        nets: the detectors, by panel title.
        classes: the names of labels 1..K.

    Raises:
        UserError: a picture cannot be written.
    """
    chosen = evenly_spaced(len(split), min(n, len(split))).tolist()
    device = next(next(iter(nets.values())).parameters()).device
    batches = load(BoxedImages(split), [[(0, 0, i)] for i in chosen], 0, device)
    for i, [(image, target)] in zip(chosen, batches, strict=True):
        panels = {"ground truth": target}
        for title, net in nets.items():
            found = net.eval()([image])[0]
            # Boxes come in descending order of score; the highest is drawn last, on top.
            panels[title] = {key: value[found["scores"] >= MIN_SCORE].flip(0) for key, value in found.items()}
        parts = [_panel(image, boxes, title, classes) for title, boxes in panels.items()]
        path = folder / f"{i}-{Path(os.fsdecode(split.files[i])).stem[:50]}.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(torch.cat(parts, 2).permute(1, 2, 0).numpy()).save(path)
        except OSError as error:
            raise UserError(f"cannot write {path} ({error}): choose another --out") from error


def _panel(image: Tensor, found: dict[str, Tensor], title: str, classes: list[str]) -> Tensor:
    """The image with boxes and a title above, its longer side at least SIDE: uint8 [3, H, W] on the CPU."""
    scale = max(1.0, SIDE / max(image.shape[1:]))
    canvas = torch.nn.functional.interpolate(image[None].cpu(), scale_factor=scale, mode="bilinear")[0]
    labels = found["labels"].tolist()
    scores = [f" {score:.2f}" for score in found["scores"].tolist()] if "scores" in found else [""] * len(labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about images without boxes
        canvas = draw_bounding_boxes(
            (255 * canvas).to(torch.uint8),
            found["boxes"].cpu() * scale,
            [classes[label - 1] + score for label, score in zip(labels, scores, strict=True)],
            [COLORS[label % len(COLORS)] for label in labels],
            width=2,
            fill_labels=True,
        )
    header = Image.new("RGB", (canvas.shape[2], 20), "white")
    ImageDraw.Draw(header).text((6, 4), title, "black")
    return torch.cat([torch.from_numpy(np.array(header)).permute(2, 0, 1), canvas], 1)

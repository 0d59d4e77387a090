"""Average precision as defined by COCO, computed by pycocotools."""

import contextlib
import io
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN

from ..run.distributed import all_gather, broadcast, rank
from ..run.errors import UserError
from .images import Sample

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # in the order of pycocotools' summary


def require_pycocotools() -> None:
    """Raise a UserError if pycocotools is missing. Called before training, not at the first test."""
    try:
        import pycocotools.cocoeval  # noqa: F401
    except Exception as error:  # a build for another NumPy raises other errors
        raise UserError(f"detection needs pycocotools ({error}): pip install -r requirements-extra.txt") from error


def evaluate(
    net: FasterRCNN, batches: Iterable[list[Sample]], indices: list[int], truth: dict[str, list[dict[str, Any]]]
) -> dict[str, float | None]:
    """METRICS in percent, on every rank; None if no object has that size. Leaves the net in evaluation mode.

    Args:
        batches: this rank's. With one image per batch, results do not depend on the sizes of other images.
        indices: the index of each of their images in `truth`.
        truth: the whole test split (CocoData.truth).
    """
    device = next(net.parameters()).device
    found = torch.cat(all_gather(detect(net, batches, indices)))
    return broadcast(average_precision(found, truth) if rank() == 0 else None, device)


@torch.no_grad()
def detect(net: FasterRCNN, batches: Iterable[list[Sample]], indices: Iterable[int]) -> Tensor:
    """The net's detections: float64 [n, 7] on the CPU, rows of image index, x, y, width, height, score, label."""
    net.eval()
    rows, indices = [torch.zeros(0, 7, dtype=torch.float64)], iter(indices)
    for batch in batches:
        for found in net([image for image, _ in batch]):
            boxes = found["boxes"].cpu().double()
            columns = [torch.full((len(boxes), 1), next(indices)), boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]
            columns += [found[key].cpu().double()[:, None] for key in ("scores", "labels")]
            rows.append(torch.cat(columns, 1))
    return torch.cat(rows)


def average_precision(found: Tensor, truth: dict[str, list[dict[str, Any]]]) -> dict[str, float | None]:
    """METRICS in percent for detections from `detect`, over all images of `truth`."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    results = truth | {"annotations": [_annotation(i, row) for i, row in enumerate(found.tolist(), 1)]}
    indexed = []
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints every step
        for dataset in (truth, results):  # not with loadRes, which fails if there are no detections
            indexed.append(COCO())
            indexed[-1].dataset = dataset
            indexed[-1].createIndex()
        evaluation = COCOeval(*indexed, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics = dict(zip(METRICS, evaluation.stats.tolist(), strict=False))  # average recalls follow
    return {name: 100 * value if value >= 0 else None for name, value in metrics.items()}  # -1: no objects of that size


def _annotation(i: int, row: list[float]) -> dict[str, Any]:
    image, *box, score, label = row
    found = {"id": i, "image_id": int(image), "category_id": int(label), "bbox": box, "score": score}
    return found | {"area": box[2] * box[3], "iscrowd": 0}

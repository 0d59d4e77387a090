"""Drawing detections; test_detection.py covers the pictures that detection.py draws."""

import numpy as np
import torch
from PIL import Image
from tiny_detectors import write_coco
from torch import nn

from common.detection.boxes import COLORS, draw_detections
from common.detection.coco import load_coco


class Detector(nn.Module):
    """Returns three detections: the first hides the second, and the third's score is too low."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        boxes = torch.tensor([[20.0, 10, 80, 50], [20, 10, 80, 50], [100, 60, 140, 90]])
        return [{"boxes": boxes, "labels": torch.tensor([1, 2, 3]), "scores": torch.tensor([0.9, 0.6, 0.49])}]


def test_highest_score_is_on_top_and_low_scores_are_omitted(tmp_path):
    for split in ("train", "val"):
        write_coco(
            tmp_path, [(1, 99 * "a" + ".png", 160, 100)], [(1, 1, [3, 3, 9, 9]), (1, 2, [3, 3, 9, 9])], split=split
        )
    draw_detections(tmp_path / "boxes", {"net": Detector()}, load_coco(tmp_path).test, ["cat", "dog", "cow"], 1)
    [path] = (tmp_path / "boxes").iterdir()
    assert path.name == f"0-{50 * 'a'}.png"
    panel = np.asarray(Image.open(path))[20:, 320:]  # twice as large as the image
    seen = [(panel == [int(color[k : k + 2], 16) for k in (1, 3, 5)]).all(2) for color in COLORS]
    first, second, third = seen[1:4]
    assert first[60, 38:43].any()
    assert first[22:32, 44:60].sum() > 40
    assert (panel[22:32, 44:60] < 50).all(2).any()  # black letters
    assert not second[60].any()
    assert not third.any()

"""Average precision against its definition and on examples with known results."""

import builtins
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from tiny_detectors import shrink, write_coco

from common.detection.coco import load_coco
from common.detection.detectors import build_detector
from common.detection.evaluation import METRICS, average_precision, detect, require_pycocotools
from common.detection.images import BoxedImages, load
from common.run.errors import UserError

needs_pycocotools = pytest.mark.skipif(not find_spec("pycocotools"), reason="needs requirements-extra.txt")
THRESHOLDS = [0.5 + 0.05 * i for i in range(10)]


def ground_truth(boxes, images, classes=2):
    """COCO-format ground truth; `boxes` are tuples (image, label, x, y, w, h) or (..., iscrowd)."""
    keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    rows = [(i, row[0], row[1], list(row[2:6]), row[4] * row[5], int(len(row) > 6)) for i, row in enumerate(boxes, 1)]
    return {
        "images": [{"id": i} for i in range(images)],
        "categories": [{"id": i, "name": str(i)} for i in range(1, classes + 1)],
        "annotations": [dict(zip(keys, row, strict=True)) for row in rows],
    }


def detections_tensor(rows):
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 7)


def iou(a, b):
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(w, 0) * max(h, 0)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def naive_ap(truth, detections, threshold):
    """AP without crowds: by descending score, each detection takes the best unmatched box; 101 recall points."""
    aps = []
    for label in {row["category_id"] for row in truth["annotations"]}:
        boxes = [row for row in truth["annotations"] if row["category_id"] == label]
        matched, hits = set(), []
        candidates = [row for row in detections.tolist() if row[6] == label]
        for image, *box, _, _ in sorted(candidates, key=lambda row: -row[5]):
            unmatched = [(iou(box, row["bbox"]), row["id"]) for row in boxes if row["image_id"] == image]
            unmatched = [pair for pair in unmatched if pair[1] not in matched and pair[0] >= threshold]
            hits.append(bool(unmatched))
            matched |= {max(unmatched)[1]} if unmatched else set()
        precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        recall = np.cumsum(hits) / len(boxes)
        points = [max((p for p, r in zip(precision, recall, strict=True) if r >= at), default=0) for at in RECALLS]
        aps.append(np.mean(points))
    return 100 * np.mean(aps)


RECALLS = np.linspace(0, 1, 101)


@needs_pycocotools
def test_average_precision_matches_its_definition():
    rng = np.random.default_rng(0)
    boxes, rows = [], []
    for image in range(12):
        for _ in range(rng.integers(0, 6)):
            label, box = rng.integers(1, 3).item(), [*rng.uniform(0, 60, 2), *rng.uniform(15, 60, 2)]
            boxes.append((image, label, *box))
            for _ in range(rng.integers(0, 3)):
                rows.append([image, *(np.array(box) + rng.normal(0, 5, 4)), rng.random(), label])
        rows.append([image, *rng.uniform(0, 60, 2), *rng.uniform(15, 60, 2), rng.random(), rng.integers(1, 3)])
    truth, detections = ground_truth(boxes, 12), detections_tensor(rows)
    ours = average_precision(detections, truth)
    by_threshold = [naive_ap(truth, detections, threshold) for threshold in THRESHOLDS]
    assert ours["AP"] == pytest.approx(np.mean(by_threshold), abs=1e-6)
    assert ours["AP50"] == pytest.approx(by_threshold[0], abs=1e-6)
    assert ours["AP75"] == pytest.approx(by_threshold[5], abs=1e-6)
    assert 5 < ours["AP"] < ours["AP50"] < 95
    assert average_precision(detections[torch.randperm(len(detections))], truth) == pytest.approx(ours)


@needs_pycocotools
def test_ap_by_size_and_with_crowds():
    """A missed small box, a detected medium box, and a detection inside a crowd."""
    truth = ground_truth([(0, 1, 0, 0, 20, 20), (1, 1, 0, 0, 50, 50), (1, 1, 100, 100, 80, 80, 1)], 3)
    detections = detections_tensor([[1, 0, 0, 50, 50, 0.8, 1], [1, 110, 110, 20, 20, 0.9, 1]])
    ours = average_precision(detections, truth)
    half = 100 * 51 / 101  # recall 0.5 at 101 points
    expected = {"AP": half, "AP50": half, "AP75": half, "APs": 0, "APm": 100, "APl": None}
    assert ours == pytest.approx(expected)
    assert list(ours) == list(METRICS)
    without_crowd = ground_truth([(0, 1, 0, 0, 20, 20), (1, 1, 0, 0, 50, 50)], 3)
    assert average_precision(detections, without_crowd)["AP"] < half  # now a false positive


@needs_pycocotools
def test_a_false_positive_only_counts_at_its_own_size():
    truth = ground_truth([(0, 1, 0, 0, 20, 20), (1, 1, 0, 0, 50, 50)], 2)
    detections = detections_tensor([[0, 100, 0, 50, 50, 0.9, 1], [0, 0, 0, 20, 20, 0.8, 1], [1, 0, 0, 50, 50, 0.7, 1]])
    ours = average_precision(detections, truth)
    assert (ours["APs"], ours["APm"]) == pytest.approx((100, 50))


@needs_pycocotools
def test_ap_without_detections_is_zero():
    assert average_precision(detections_tensor([]), ground_truth([(0, 2, 0, 0, 20, 20)], 1))["AP"] == 0


@needs_pycocotools
def test_classes_without_boxes_do_not_count():
    truth = ground_truth([(0, 1, 0, 0, 20, 20)], 1)
    detections = detections_tensor([[0, 0, 0, 20, 20, 0.9, 1], [0, 0, 0, 20, 20, 0.9, 2]])
    assert average_precision(detections, truth)["AP"] == pytest.approx(100)


def test_detections_are_in_pixels_of_the_original_image(tmp_path, monkeypatch):
    shrink(monkeypatch)
    torch.manual_seed(0)
    images = [(1, "a.png", 60, 40), (2, "b.png", 200, 150)]
    for split in ("train", "val"):
        write_coco(tmp_path, images, [(1, 1, [2, 3, 15, 14]), (2, 2, [0, 0, 60, 20])], split=split)
    data = load_coco(tmp_path)
    net = build_detector("mobilenet_v2", 2, [96], scratch=True)
    torch.nn.init.normal_(net.roi_heads.box_predictor.cls_score.weight, 0, 1)
    batches = [[(0, 0, 1)], [(0, 0, 0)]]
    detections = detect(net, load(BoxedImages(data.test), batches, 0, torch.device("cpu")), [1, 0])
    assert not net.training
    assert detections.dtype == torch.float64
    for i, (_, _, width, height) in enumerate(images):
        rows = detections[detections[:, 0] == i]
        assert len(rows) > 0
        _, x, y, w, h, score, label = rows.T
        assert x.min() >= 0
        assert y.min() >= 0
        assert (x + w).max() <= width + 1e-3
        assert (y + h).max() <= height + 1e-3
        assert (x + w).max() > 0.6 * width
        assert ((score > 0.05) & (score <= 1)).all()
        assert set(label.tolist()) <= {1, 2}
        pixels = torch.from_numpy(BoxedImages(data.test)[0, 0, i][0]).permute(2, 0, 1).float() / 255
        with torch.no_grad():
            theirs = net([pixels])[0]
        torch.testing.assert_close(rows[:, 1:3].float(), theirs["boxes"][:, :2])


def test_missing_pycocotools_is_reported(monkeypatch):
    original = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("pycocotools"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"^detection needs pycocotools \(.*\): pip install -r requirements-extra"):
        require_pycocotools()

"""The synthetic detection dataset."""

import json

import numpy as np
import pytest
from PIL import Image

from common.detection import synthetic
from common.detection.coco import load_coco


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco") / "data"
    assert synthetic.main([str(folder), "--train", "80", "--val", "5"]) == 0
    return folder


def test_dataset_is_in_coco_format(folder):
    data = load_coco(folder)
    assert list(data.categories.values()) == list(synthetic.CLASSES)
    assert len(data.test) == 5
    assert data.notes == []
    for path, size in zip(data.train.files, data.train.sizes.tolist(), strict=True):
        assert list(Image.open(path.decode()).size) == size
        assert 96 <= min(size) <= max(size) <= 256


def test_dataset_has_crowds_empty_images_and_overlapping_objects(folder):
    content = json.loads((folder / "annotations" / "instances_train.json").read_text())
    by_image = {image["id"]: [] for image in content["images"]}
    for row in content["annotations"]:
        by_image[row["image_id"]].append(row)
    assert 1 <= sum(not rows for rows in by_image.values()) <= 15
    crowds = [row for row in content["annotations"] if row["iscrowd"]]
    assert 1 <= len(crowds) <= 15
    assert {row["category_id"] for row in content["annotations"]} == {1, 2, 3, 4}
    areas = [row["area"] for row in content["annotations"]]
    assert min(areas) < 32**2 < 0.5 * max(areas)

    def overlap(a, b):
        return all(a[i] < b[i] + b[i + 2] and b[i] < a[i] + a[i + 2] for i in (0, 1))

    pairs = [(a, b) for rows in by_image.values() for a in rows for b in rows if a["id"] < b["id"]]
    assert sum(overlap(a["bbox"], b["bbox"]) for a, b in pairs) > 20


def test_boxes_match_the_pixels_of_their_objects(monkeypatch):
    """Checks the last object of each image, which nothing occludes."""
    last = {}

    def paste(image, *args):
        last["before"] = image[0].copy()
        inside = original(image, *args)
        last["after"] = image[0].copy()
        return inside

    original = synthetic.paste
    monkeypatch.setattr(synthetic, "paste", paste)
    checked = 0
    for number in range(20):
        _, annotations = synthetic.draw("train", number)
        if not annotations or annotations[-1]["iscrowd"]:
            continue
        rows, columns = np.nonzero(np.abs(last["after"] - last["before"]).max(2) > 0.02)
        changed = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        x, y, w, h = annotations[-1]["bbox"]
        assert np.abs(changed - [x, y, x + w, y + h]).max() <= 4  # edges are soft
        assert annotations[-1]["area"] <= w * h
        checked += 1
    assert checked >= 10


def test_smaller_datasets_are_prefixes_of_larger_ones(folder, tmp_path):
    synthetic.main([str(tmp_path / "small"), "--train", "4", "--val", "2"])
    for split in ("train", "val"):
        small, large = (
            json.loads((path / "annotations" / f"instances_{split}.json").read_text())
            for path in (tmp_path / "small", folder)
        )
        n = len(small["images"])
        assert small["images"] == large["images"][:n]
        assert small["annotations"] == large["annotations"][: len(small["annotations"])]
        for image in small["images"]:
            a, b = (path / split / image["file_name"] for path in (tmp_path / "small", folder))
            assert a.read_bytes() == b.read_bytes()
    train, val = ((tmp_path / "small" / split / f"{0:012}.jpg").read_bytes() for split in ("train", "val"))
    assert train != val


def test_existing_folder_is_not_changed(folder, capsys):
    before = sorted(folder.rglob("*"))
    assert synthetic.main([str(folder)]) == 2
    assert capsys.readouterr().err == f"error: {folder} already exists: choose a new folder, or remove it\n"
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "expected"), [([], "DIR"), (["data", "--val", "0"], "must be between 1"), (["data", "-x"], "-x")]
)
def test_invalid_input_exits_with_one_line_error(tmp_path, capsys, monkeypatch, options, expected):
    monkeypatch.chdir(tmp_path)
    assert synthetic.main(options) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert expected in message
    assert message.count("\n") == 1
    assert not list(tmp_path.iterdir())

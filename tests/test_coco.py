"""Reading COCO-format datasets and reporting their faults."""

import json

import numpy as np
import pytest
from tiny_detectors import write_coco

from common.detection.coco import load_coco
from common.run.errors import UserError

VAL = {"images": [(1, "v.jpg", 40, 30)], "annotations": [(1, 3, [1, 2, 10, 10]), (1, 7, [5, 5, 8, 9])]}
CATEGORIES = ((7, "dog"), (3, "cat"))  # labels 2 and 1


def write(folder, images, annotations, **more):
    write_coco(folder, images, annotations, CATEGORIES, pixels=False, **more)
    write_coco(folder, VAL["images"], VAL["annotations"], CATEGORIES, "val", pixels=False)
    return folder


@pytest.fixture
def folder(tmp_path):
    images = [(11, "a.jpg", 50, 40), (12, "b.jpg", 50, 40), (13, "c.jpg", 30, 60), (14, "d.jpg", 50, 40)]
    annotations = [
        (13, 7, [0, 0, 30, 60]),
        (11, 3, [10, 5, 20.5, 10]),
        (14, 3, [4, 4, 20, 20], 1),  # this image has only a crowd
        (11, 7, [0.5, 1, 3, 4]),
        (11, 3, [0, 0, 50, 40], 1),
    ]
    return write(tmp_path / "data", images, annotations)


def names(split):
    return [path.decode().rpartition("/")[2] for path in split.files]


def boxes(split, i):
    rows = slice(split.first[i], split.first[i + 1])
    return split.labels[rows].tolist(), split.boxes[rows].tolist()


def test_training_split(folder):
    data = load_coco(folder)
    assert data.categories == {3: "cat", 7: "dog"}
    assert names(data.train) == ["a.jpg", "c.jpg", "d.jpg"]  # b.jpg is empty
    assert data.train.sizes.tolist() == [[50, 40], [30, 60], [50, 40]]
    assert boxes(data.train, 0) == ([1, 2], [[10, 5, 30.5, 15], [0.5, 1, 3.5, 5]])
    assert boxes(data.train, 1) == ([2], [[0, 0, 30, 60]])
    assert boxes(data.train, 2) == ([], [])  # crowds are not trained on, but their images are kept
    assert data.train.boxes.dtype == np.float32
    assert data.notes == []


def test_ground_truth_keeps_crowds_and_empty_images(tmp_path):
    write_coco(tmp_path, [(1, "a.jpg", 9, 9)], [(1, 3, [0, 0, 9, 9]), (1, 7, [0, 0, 9, 9])], CATEGORIES, pixels=False)
    images = [(8, "x.jpg", 50, 40), (5, "y.jpg", 50, 40)]
    file = write_coco(
        tmp_path, images, [(5, 7, [1, 2, 3, 4], 1), (5, 3, [45, 2, 10, 4])], CATEGORIES, "val", pixels=False
    )
    content = json.loads(file.read_text())
    content["annotations"][0]["area"] = 5.5
    content["annotations"][1]["area"] = 1e11  # more than pycocotools' largest range
    file.write_text(json.dumps(content))
    data = load_coco(tmp_path)
    assert names(data.test) == ["x.jpg", "y.jpg"]
    assert data.truth["images"] == [{"id": 0}, {"id": 1}]
    assert data.truth["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    crowd, box = data.truth["annotations"]
    assert crowd == {"id": 1, "image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4], "area": 5.5, "iscrowd": 1}
    assert (box["bbox"], box["area"], box["iscrowd"], box["id"]) == ([45, 2, 10, 4], 40, 0, 2)  # not clipped


def test_unusable_boxes_are_dropped_or_clipped_and_counted(tmp_path):
    images = [(1, "a.jpg", 50, 40), (2, "b.jpg", 50, 40), (3, "c.jpg", 50, 40), (4, "e.jpg", 50, 40)]
    annotations = [
        (1, 3, [40, 30, 20, 20]),  # extends beyond the image
        (1, 7, [-5, -5, 10, 10]),
        (1, 7, [5, 5, 0, 10]),  # no area
        (1, 7, [5, 5, 10, -3]),
        (1, 7, [60, 5, 10, 10]),  # outside
        (1, 7, [20, 20, 30.2, 20]),  # extends beyond the image by a rounding error
        (2, 3, [3, 3, 1, 20]),  # every box in this image is at most a pixel wide or high
        (2, 3, [3, 3, 20, 0.5]),
        (3, 3, [3, 3, 1, 20]),
        (3, 3, [3, 3, 2, 20]),
        (1, 7, [20, 20, 0.009, 20]),
        (1, 3, [-5, 20, 5.005, 20]),  # only a sliver is inside
        (4, 3, [3, 50, 20, 20]),  # its image is kept, like an image with only a crowd
    ]
    data = load_coco(write(tmp_path, images, annotations))
    assert names(data.train) == ["a.jpg", "c.jpg", "e.jpg"]
    assert boxes(data.train, 0) == ([1, 2, 2], [[40, 30, 50, 40], [0, 0, 5, 5], [20, 20, 50, 40]])
    assert boxes(data.train, 1) == ([1, 1], [[3, 3, 4, 23], [3, 3, 5, 23]])
    assert boxes(data.train, 2) == ([], [])
    assert data.notes == [
        "instances_train.json: boxes dropped (no area, or outside their image): 6",
        "instances_train.json: boxes clipped to their image: 2",
    ]


def test_coco_2017_is_preferred_and_ambiguous_names_are_rejected(tmp_path):
    row = [(1, "a.jpg", 9, 9)], [(1, 3, [0, 0, 9, 9]), (1, 7, [0, 0, 9, 9])]
    for split in ("train2014", "train2017", "val2014", "val2017"):
        write_coco(tmp_path, *row, CATEGORIES, split, pixels=False)
    assert load_coco(tmp_path).train.files[0].decode().endswith("/train2017/a.jpg")
    write_coco(tmp_path / "other", *row, CATEGORIES, "train_a", pixels=False)
    write_coco(tmp_path / "other", *row, CATEGORIES, "train_b", pixels=False)
    with pytest.raises(UserError, match=r"instances_train_a.json and .*instances_train_b.json: keep only one"):
        load_coco(tmp_path / "other")


def test_images_may_be_in_subfolders(tmp_path):
    write(tmp_path, [(1, "a.jpg", 9, 9)], [(1, 3, [0, 0, 9, 9]), (1, 7, [0, 0, 9, 9])])
    (tmp_path / "train" / "nested").mkdir()
    (tmp_path / "train" / "a.jpg").rename(tmp_path / "train" / "nested" / "a.jpg")
    file = tmp_path / "annotations" / "instances_train.json"
    file.write_text(file.read_text().replace("a.jpg", "nested/a.jpg"))
    assert load_coco(tmp_path).train.files[0].decode().endswith("/train/nested/a.jpg")


def test_subset_is_evenly_spaced(tmp_path):
    images = [(i, f"{i}.jpg", 40, 40) for i in range(10)]
    annotations = [(i, 3 + 4 * (i % 2), [i, 0, 20, 20]) for i in range(10)]
    data = load_coco(write(tmp_path, images, annotations), subset=4, test_subset=1)
    assert names(data.train) == ["0.jpg", "3.jpg", "6.jpg", "9.jpg"]
    assert [boxes(data.train, i) for i in range(4)] == [([1 + k % 2], [[k, 0, k + 20, 20]]) for k in (0, 3, 6, 9)]
    assert data.fingerprint != load_coco(tmp_path).fingerprint
    for option, count in (("subset", 0), ("subset", 11), ("test_subset", 2)):
        with pytest.raises(UserError, match=f"--{option.replace('_', '-')} {count}: must be between 1 and"):
            load_coco(tmp_path, **{option: count})


def test_fingerprint_depends_on_the_training_data(folder):
    before = load_coco(folder).fingerprint
    assert load_coco(folder).fingerprint == before
    file = folder / "annotations" / "instances_train.json"
    text = file.read_text()
    for old, new in (
        ("20.5", "21.5"),
        ('"dog"', '"wolf"'),
        ('"category_id": 7, "bbox": [0.5', '"category_id": 3, "bbox": [0.5'),
    ):
        assert old in text
        file.write_text(text.replace(old, new))
        if "dog" in old:
            other = folder / "annotations" / "instances_val.json"
            other.write_text(other.read_text().replace(old, new))
        assert load_coco(folder).fingerprint != before, old
        if "dog" in old:
            other.write_text(other.read_text().replace(new, old))
    file.write_text(text)
    (folder.parent / "moved").parent.mkdir(exist_ok=True)
    folder.rename(folder.parent / "moved")
    assert load_coco(folder.parent / "moved").fingerprint == before


FAULTS = {
    "not JSON": (lambda content: "{", "is not JSON, or is truncated"),
    "a list": (lambda content: [], "'categories' is missing, or not a list of objects"),
    "no images": (lambda content: content | {"images": []}, "'images' is empty"),
    "no annotations": (
        lambda content: {key: content[key] for key in ("images", "categories")},
        "'annotations' is missing",
    ),
    "numbers as annotations": (
        lambda content: content | {"annotations": [1]},
        "'annotations' is missing, or not a list of objects",
    ),
    "no categories": (lambda content: content | {"categories": []}, "'categories' is empty"),
    "a repeated id": (
        lambda content: content | {"images": 2 * content["images"]},
        r"'images' \[4\] lacks a unique id",
    ),
    "a repeated name": (  # classes are matched by name
        lambda content: content | {"categories": [row | {"name": "cat"} for row in content["categories"]]},
        r"'categories' \[1\] lacks a unique id or a unique name",
    ),
    "no width": (
        lambda content: content | {"images": [{"id": 1, "file_name": "a.jpg", "height": 4}]},
        r"'images' \[0\]",
    ),
    "no size": (
        lambda content: content | {"images": [{"id": 1, "file_name": "a.jpg", "width": 0, "height": 4}]},
        r"'images' \[0\]",
    ),
    "a repeated category": (lambda content: content | {"categories": 2 * content["categories"]}, r"'categories' \[2\]"),
    "a nameless category": (lambda content: content | {"categories": [{"id": 1}]}, r"'categories' \[0\]"),
    "an unknown image": (
        lambda content: edit_annotation(content, image_id=99),
        r"'annotations' \[0\] lacks a known image_id",
    ),
    "an unknown category": (lambda content: edit_annotation(content, category_id=99), r"'annotations' \[0\]"),
    "three numbers": (lambda content: edit_annotation(content, bbox=[1, 2, 3]), r"'annotations' \[0\]"),
    "a word in a box": (lambda content: edit_annotation(content, bbox=[1, 2, 3, "x"]), r"'annotations' \[0\]"),
    "NaN": (lambda content: edit_annotation(content, bbox=[1, 2, 3, float("nan")]), r"'annotations' \[0\]"),
    "text as a box": (lambda content: edit_annotation(content, bbox="1234"), r"'annotations' \[0\]"),
    "a number as text": (lambda content: edit_annotation(content, bbox=[1, 2, 3, "4"]), r"'annotations' \[0\]"),
    "booleans in a box": (lambda content: edit_annotation(content, bbox=[True] * 4), r"'annotations' \[0\]"),
    "text as iscrowd": (
        lambda content: edit_annotation(content, iscrowd="1"),
        r"'annotations' \[0\] lacks .* an iscrowd",
    ),
    "a fractional width": (
        lambda content: content | {"images": [{"id": 1, "file_name": "a.jpg", "width": 1.5, "height": 4}]},
        r"'images' \[0\]",
    ),
    "no box": (lambda content: edit_annotation(content, bbox=None), r"'annotations' \[0\]"),
    "a list as an id": (lambda content: edit_annotation(content, image_id=[1]), r"'annotations' \[0\]"),
    "a missing image": (
        lambda content: (
            content | {"images": content["images"] + [{"id": 1, "file_name": "e.jpg", "width": 9, "height": 9}]}
        ),
        "the image .*/train/e.jpg of .*instances_train.json is missing",
    ),
    "a category without boxes": (
        lambda content: content | {"annotations": [row for row in content["annotations"] if row["category_id"] == 3]},
        "the category 'dog' has no box to train on",
    ),
    "a category with only crowds": (
        lambda content: (
            content | {"annotations": [row | {"iscrowd": row["category_id"] == 7} for row in content["annotations"]]}
        ),
        "the category 'dog' has no box to train on",
    ),
    "other categories": (
        lambda content: content | {"categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "fox"}]},
        "must have the same categories",
    ),
    "an extreme aspect ratio": (
        lambda content: content | {"images": [content["images"][0] | {"width": 26661}, *content["images"][1:]]},
        r"the aspect ratio of image a\.jpg is too extreme",
    ),
    "boxes without area": (
        lambda content: content | {"annotations": [row | {"bbox": [1, 1, 1, 9]} for row in content["annotations"]]},
        "every box is at most a pixel wide or high",
    ),
}


def edit_annotation(content, **values):
    return content | {"annotations": [content["annotations"][0] | values, *content["annotations"][1:]]}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_reported_in_one_line(folder, fault):
    change, expected = FAULTS[fault]
    file = folder / "annotations" / "instances_train.json"
    content = change(json.loads(file.read_text()))
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=expected) as error:
        load_coco(folder)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_and_folders_are_reported(folder):
    with pytest.raises(UserError, match=r"there is no missing/annotations/instances_train\*.json: --data-dir needs"):
        load_coco("missing")
    (folder / "train").rename(folder / "pictures")
    with pytest.raises(UserError, match=f"cannot read the image folder {folder}/train"):
        load_coco(folder)
    (folder / "pictures").rename(folder / "train")
    (folder / "annotations" / "instances_val.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"instances_val.json is not JSON"):
        load_coco(folder)
    (folder / "annotations" / "instances_val.json").unlink()
    with pytest.raises(UserError, match=r"there is no .*instances_val\*.json"):
        load_coco(folder)


def test_rejects_a_test_split_without_boxes(tmp_path):
    write(tmp_path, [(1, "a.jpg", 9, 9)], [(1, 3, [0, 0, 9, 9]), (1, 7, [0, 0, 9, 9])])
    file = tmp_path / "annotations" / "instances_val.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"annotations": []}))
    with pytest.raises(UserError, match="none of the test images has a usable box"):
        load_coco(tmp_path)

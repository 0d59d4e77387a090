"""Initial weights of detectors: backbones, checkpoints, torchvision's COCO_V1, and inheriting from the teacher."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN, FasterRCNN_ResNet50_FPN_Weights

from ..run.checkpoint import load, load_weights, read_weights, weights_of
from ..run.downloads import torchvision_weights
from ..run.errors import NetworkMismatchError, UserError

EPSILON = 1e-5  # of FrozenBatchNorm
LAST_LAYERS = ("cls_score.weight", "cls_score.bias", "bbox_pred.weight", "bbox_pred.bias")
PREDICTOR = [f"roi_heads.box_predictor.{name}" for name in LAST_LAYERS]
COCO_V1 = FasterRCNN_ResNet50_FPN_Weights.COCO_V1
HEADS = ("backbone.fpn.", "rpn.", "roi_heads.")  # what a student can inherit


def load_backbone(net: FasterRCNN, name: str, file: str | Path | None) -> None:
    """Load the weights of classification network `name`, without its classifier; None: torchvision's IMAGENET1K_V1.

    Raises:
        UserError: the file is invalid, or the download failed.
    """
    path = file or torchvision_weights(name, "IMAGENET1K_V1", option="--backbone-ckpt")
    weights = {key.removeprefix("features."): value for key, value in read_weights(path).items()}
    if any(key.startswith("backbone.") for key in weights):
        raise UserError(f"{path} is a detector: --backbone-ckpt takes a classification network")
    # Layers after the last level: the classifier and, in MobileNetV2, the last convolution.
    weights = {key: value for key, value in weights.items() if not key.startswith(("fc.", "classifier.", "18."))}
    load_weights(net.backbone.body, weights, path, name)


def load_detector(net: FasterRCNN, file: str | Path, name: str, categories: dict[int, str]) -> None:
    """Strictly load a detector saved by this project or torchvision, with frozen or ordinary BatchNorm.

    If the file has class names, those in `categories` (id -> name, in the order of their labels) are selected by name.
    Otherwise its classes must be those of the data, or indexed by category id as in torchvision's training, and are
    selected by id.

    Raises:
        UserError: the file is invalid.
        NetworkMismatchError: it holds another detector, or one for other classes.
    """
    content = load(file)
    weights = weights_of(content, file)
    if Path(file).name == COCO_V1.url.rpartition("/")[2]:
        weights = _convert_epsilon(weights)
    if missing := [key for key in PREDICTOR if not weights.get(key, torch.tensor(0)).ndim]:
        raise NetworkMismatchError(f"{file} is not a {name} detector: it lacks {missing[0]}")
    rows = len(weights[PREDICTOR[0]])  # one per class, the background first
    if rows and not any(len(weights[key]) % rows for key in PREDICTOR):  # else load_weights reports the mismatch
        names = content.get("classes")
        weights = _select_classes(weights, _labels(names if isinstance(names, list) else [], rows, file, categories))
    load_weights(net, weights, file, name)


def _labels(names: list[str], rows: int, file: str | Path, categories: dict[int, str]) -> list[int]:
    """Labels of the data's classes in a file whose last layers have `rows` rows; `names`, its classes, may be empty."""
    if len(names) == rows - 1 == len(set(map(str, names))):
        if unknown := [name for name in categories.values() if name not in names]:
            raise NetworkMismatchError(f"{file} is a detector for other classes: it lacks {unknown[0]!r}")
        return [1 + names.index(name) for name in categories.values()]
    if rows - 1 == len(categories):
        return list(range(1, rows))
    if rows - 1 == max(categories) and min(categories) > 0:
        return list(categories)
    raise NetworkMismatchError(
        f"{file} is a detector for {rows - 1} classes, but the data has {len(categories)}: they must match"
    )


def _select_classes(weights: dict[str, Tensor], labels: Iterable[int]) -> dict[str, Tensor]:
    """The weights restricted to the background and the classes `labels`, in this order."""
    rows = torch.tensor([0, *labels])
    count = len(weights[PREDICTOR[0]])  # the last layers have one row per class, or four
    return weights | {key: weights[key].unflatten(0, (count, -1))[rows].flatten(0, 1) for key in PREDICTOR}


def _convert_epsilon(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert COCO_V1, which torchvision runs with a BatchNorm epsilon of 0, to equivalent weights for EPSILON."""
    variances = {key.removesuffix("running_var"): v for key, v in weights.items() if key.endswith("running_var")}
    return weights | {f"{k}weight": weights[f"{k}weight"] * ((v + EPSILON) / v).sqrt() for k, v in variances.items()}


def trained_size(file: str | Path) -> list[int] | None:
    """The `min_sizes` (see build_detector) that the detector in `file` was trained with; None if the file has none.

    Raises:
        UserError: as `load`.
    """
    content = load(file)
    sizes = content.get("min_size") if isinstance(content, dict) else None
    return sizes if isinstance(sizes, list) and sizes and all(type(size) is int for size in sizes) else None


def load_coco_v1(net: FasterRCNN, categories: dict[int, str]) -> Path:
    """Load torchvision's COCO_V1 into a resnet50 detector for these categories (id -> name); returns the file.

    Raises:
        UserError: the file cannot be downloaded, or is damaged.
        NetworkMismatchError: the categories are not COCO's.
    """
    names = COCO_V1.meta["categories"]  # by id
    if unknown := [name for i, name in categories.items() if not 0 < i < len(names) or names[i] != name]:
        raise NetworkMismatchError(f"torchvision's weights are for COCO's categories and lack {unknown[0]!r}")
    path = torchvision_weights("fasterrcnn_resnet50_fpn", COCO_V1.name)
    load_weights(net, _select_classes(_convert_epsilon(read_weights(path)), categories), path, "resnet50")
    return path


def inherit(student: FasterRCNN, teacher: FasterRCNN) -> None:
    """Initialize the student's FPN, RPN and ROI head with the teacher's weights (App. E).

    Raises:
        UserError: a shape differs; the message names the first.
    """
    theirs = {key: value for key, value in teacher.state_dict().items() if key.startswith(HEADS)}
    own = student.state_dict()
    for key, value in theirs.items():
        if own[key].shape != value.shape:
            raise UserError(
                f"--inherit: {key} is {list(value.shape)} in the teacher and {list(own[key].shape)} in the student: "
                "omit it, or choose networks with matching FPNs, such as resnet101 and resnet50"
            )
    student.load_state_dict(theirs, strict=False)

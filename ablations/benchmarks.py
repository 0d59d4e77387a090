"""The datasets of the tables, and the scripts that train on each of them."""

from abc import ABC, abstractmethod
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image

import cifar100
import detection
import imagenet
import online_kd
from ablations import baseline_cifar100, baseline_detection, baseline_imagenet
from common.data.batches import eval_batches
from common.data.image_files import FileData, list_files, list_test_files
from common.data.sources import load_data, load_test
from common.data.synthetic import CLASSES, synthetic_images
from common.detection import synthetic
from common.detection.coco import load_coco, load_coco_test
from common.detection.detectors import build_detector
from common.detection.evaluation import require_pycocotools
from common.detection.weights import inherit, load_detector
from common.models import build, build_imagenet
from common.run.checkpoint import load_network
from common.run.device import open_device
from common.run.downloads import torchvision_weights
from common.run.errors import user_errors
from common.run.evaluation import evaluate


@dataclass(eq=False)
class Benchmark(ABC):
    """A dataset and its training scripts.

    Attributes:
        name: in published.yaml.
        script: trains networks alone, and FCFD's students.
        others: the other scripts, by the prefix of their rows' names.
        any_run: options of a run of `script` that accepts all its other options.
        unit: of the length of a run.
        metrics: the accuracies in tables and their titles; the first one decides which epoch is the best.
        smoke_pair, smoke: the pair and the options of --smoke.
    """

    name: str
    script: ModuleType
    others: dict[str, ModuleType]
    any_run: list[str]
    unit: str
    metrics: dict[str, str]
    smoke_pair: str
    smoke: list[str]

    def column(self, which: str, metric: str) -> str:
        """The name of a column of cells.csv: "last", "best", "teacher"; "last_top5" for all but the first metric."""
        return which if metric == next(iter(self.metrics)) else f"{which}_{metric}"

    @abstractmethod
    def load(self, settings: dict[str, Any]) -> Any:
        """The data of a run with these settings. Raises a UserError if it is missing or invalid."""

    @abstractmethod
    def check(self, script: ModuleType, args: Namespace) -> None:
        """Raise a UserError if the networks or the options of a run of `script` do not match."""

    def downloads(self, settings: dict[str, Any]) -> tuple[str, ...]:
        """The networks whose trained weights the scripts download. Raises as `load`."""
        return ()

    @abstractmethod
    def load_teacher(self, network: str, file: str | None, settings: dict[str, Any], device: str) -> float | None:
        """Load a teacher, and test it if that takes seconds; its students' runs test it in any case.

        Args:
            file: None: downloaded.

        Returns:
            Its accuracy in percent, or None if it was not tested.

        Raises:
            UserError: as `load`; the file is invalid or cannot be downloaded.
        """

    def write_smoke_data(self, folder: Path) -> None:  # noqa: B027
        """Write the dataset of --smoke, if it needs files."""


class Cifar(Benchmark):
    def load(self, settings):
        return load_data(*(settings.get(key) for key in ("dataset", "data_dir", "subset", "test_subset")))

    def check(self, script, args):
        with user_errors():
            script.build_networks(args, num_classes=10)

    def load_teacher(self, network, file, settings, device):
        data, classes = load_test(*(settings.get(key) for key in ("dataset", "data_dir", "test_subset")))
        net = build(network, len(classes))
        load_network(net, file, network)
        device = open_device(device)
        return evaluate(net.to(device, memory_format=torch.channels_last), eval_batches(data.to(device)))["top1"]


class ImageNet(Benchmark):
    def load(self, settings):
        return list_files(*(settings.get(key) for key in ("data_dir", "subset", "test_subset")))

    def check(self, script, args):
        images = [("", label) for label in range(10)]
        device = "cpu" if args.method == "crd" else "meta"  # CRD reads the labels
        with user_errors(), torch.device(device):
            script.Step(args, FileData(images, [], [str(label) for label in range(10)], ""))

    def downloads(self, settings):
        _, classes = list_test_files(settings["data_dir"])
        return ("resnet18", "resnet34", "resnet50") if len(classes) == 1000 else ()

    def load_teacher(self, network, file, settings, device):
        _, classes = list_test_files(settings["data_dir"])
        load_network(
            build_imagenet(network, len(classes)), file or torchvision_weights(network, "IMAGENET1K_V1"), network
        )

    def write_smoke_data(self, folder):
        for split, per_class in (("train", 2), ("val", 1)):
            images, labels = synthetic_images(per_class * len(CLASSES), split.replace("val", "test"))
            for i, (pixels, label) in enumerate(zip(images, labels, strict=True)):
                file = folder / split / CLASSES[label] / f"{i}.JPEG"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(file)


class Detection(Benchmark):
    def load(self, settings):
        require_pycocotools()
        return load_coco(*(settings.get(key) for key in ("data_dir", "subset", "test_subset")))

    def check(self, script, args):
        if args.inherit:
            with torch.device("meta"):
                student, teacher = (build_detector(name, 1, args.min_size) for name in (args.student, args.teacher))
            inherit(student, teacher)

    def load_teacher(self, network, file, settings, device):
        categories = load_coco_test(settings["data_dir"]).categories
        net = build_detector(network, len(categories), detection.SETTINGS["min_size"])
        load_detector(net, file, network, categories)

    def write_smoke_data(self, folder):
        synthetic.write(folder, {"train": 4, "val": 2})


CIFAR = Cifar(
    name="cifar100",
    script=cifar100,
    others={"online": online_kd, "baseline": baseline_cifar100},
    any_run=["--teacher=resnet14", "--student=resnet8", "--kd-loss=dkd"],
    unit="epoch",
    metrics={"top1": "top-1"},
    smoke_pair="resnet14-resnet8",
    smoke=["--dataset=synthetic", "--subset=40", "--test-subset=40", "--batch-size=20", "--epochs=1"],
)
IMAGENET = ImageNet(
    name="imagenet",
    script=imagenet,
    others={"baseline": baseline_imagenet},
    any_run=["--teacher=resnet34", "--student=resnet18"],
    unit="epoch",
    metrics={"top1": "top-1", "top5": "top-5"},
    smoke_pair="resnet34-resnet18",
    smoke=["--image-size=32", "--batch-size=20", "--epochs=1", "--workers=0"],
)
DETECTION = Detection(
    name="detection",
    script=detection,
    others={"baseline": baseline_detection},
    any_run=["--teacher=resnet101", "--student=resnet18"],
    unit="iteration",
    metrics={name: name for name in ("AP", "AP50", "AP75")},
    smoke_pair="resnet18-resnet18",
    smoke=["--scratch", "--min-size=96", "--batch-size=2", "--rois=16", "--iterations=2", "--workers=0"],
)
BENCHMARKS = {script: each for each in (CIFAR, IMAGENET, DETECTION) for script in (each.script, *each.others.values())}

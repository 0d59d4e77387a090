"""The detectors, and loading weights from torchvision, from this project, and from a teacher."""

import pytest
import torch
from tiny_detectors import shrink
from torch import nn
from torchvision import models
from torchvision.models.detection import FasterRCNN, FasterRCNN_ResNet50_FPN_Weights, fasterrcnn_resnet50_fpn
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from common.detection.detectors import DETECTORS, LEVELS, build_detector
from common.detection.weights import inherit, load_backbone, load_coco_v1, load_detector, trained_size
from common.run.errors import NetworkMismatchError, UserError

COCO = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
CATEGORIES = {i: name for i, name in enumerate(COCO) if i and name != "N/A"}  # COCO's 80, with their ids


@pytest.fixture(autouse=True)
def small(monkeypatch, request):
    if "torchvision" not in request.node.name:  # these compare with torchvision's full-size detectors
        shrink(monkeypatch)


def relative_difference(a, b):
    """Relative difference of whole tensors, since random weights amplify rounding errors."""
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", DETECTORS)
def test_five_levels_with_strides_4_to_64(name):
    levels = build_detector(name, 3, [128], scratch=True).eval().backbone(torch.zeros(1, 3, 128, 192))
    assert tuple(levels) == LEVELS
    sides = [tuple(level.shape) for level in levels.values()]
    assert sides == [(1, 256, 128 // stride, 192 // stride) for stride in (4, 8, 16, 32, 64)]


@pytest.mark.parametrize(
    ("name", "frozen"), [("resnet18", ("conv1", "layer1")), ("resnet50", ("conv1", "layer1")), ("mobilenet_v2", ())]
)
def test_frozen_layers(name, frozen):
    body = build_detector(name, 3, [128]).backbone.body
    assert {key.split(".")[0] for key, p in body.named_parameters() if not p.requires_grad} == set(frozen)
    assert not [layer for layer in body.modules() if isinstance(layer, nn.BatchNorm2d)]
    scratch = build_detector(name, 3, [128], scratch=True)
    assert all(p.requires_grad for p in scratch.parameters())
    assert not [layer for layer in scratch.modules() if isinstance(layer, FrozenBatchNorm2d)]


def test_mobilenet_v2_levels_have_24_32_96_and_320_channels():
    net = build_detector("mobilenet_v2", 3, [128])
    assert [conv[0].in_channels for conv in net.backbone.fpn.inner_blocks] == [24, 32, 96, 320]
    published = models.mobilenet_v2().features
    assert len(net.backbone.body) == 18  # without the last convolution
    for ours, theirs in zip(net.backbone.body.values(), published, strict=False):
        shapes = [{key: p.shape for key, p in block.named_parameters()} for block in (ours, theirs)]
        assert shapes[0].items() <= shapes[1].items()
    ends = (published[3], published[6], published[13], published[17])
    assert [end.conv[-1].num_features for end in ends] == [24, 32, 96, 320]


def test_detectors_match_torchvision():
    """State dicts load strictly both ways, and the settings match the paper."""
    net = build_detector("resnet50", 3, [640, 800])
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4)
    theirs.load_state_dict(net.state_dict())
    net.load_state_dict(theirs.state_dict())
    assert (net.transform.min_size, net.transform.max_size) == ([640, 800], 1333)
    net.train()
    assert (net.rpn.pre_nms_top_n(), net.rpn.post_nms_top_n()) == (2000, 1000)
    assert net.roi_heads.fg_bg_sampler.batch_size_per_image == 512
    small = build_detector("mobilenet_v2", 3, [96], rois=17, scratch=True)
    assert small.roi_heads.fg_bg_sampler.batch_size_per_image == 17
    assert net.transform.resize(torch.zeros(3, 800, 1000))[0].shape[1] in (640, 800)
    net.eval()
    assert net.transform.resize(torch.zeros(3, 400, 500))[0].shape == (3, 800, 1000)
    assert net.transform.resize(torch.zeros(3, 100, 1000))[0].shape == (3, 133, 1333)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_backbone_loads_classification_weights(tmp_path, name):
    published = models.get_model(name, num_classes=7).eval()
    for layer in published.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.uniform_(layer.weight, 0.5, 2)
    torch.save({"model": published.state_dict()}, tmp_path / "net.pth")
    net = build_detector(name, 3, [128]).eval()
    load_backbone(net, name, tmp_path / "net.pth")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        if name == "resnet18":
            x = published.maxpool(published.relu(published.bn1(published.conv1(images))))
            expected = [published.layer1(x)]
            for layer in (published.layer2, published.layer3, published.layer4):
                expected.append(layer(expected[-1]))
        else:
            expected = [published.features[:end](images) for end in (4, 7, 14, 18)]
        for ours, theirs in zip(net.backbone.body(images).values(), expected, strict=True):
            assert relative_difference(ours, theirs) < 1e-4


def test_mismatched_backbone_is_rejected(tmp_path):
    torch.save(models.resnet18().state_dict(), tmp_path / "net.pth")
    with pytest.raises(NetworkMismatchError, match=r"net.pth does not match mobilenet_v2"):
        load_backbone(build_detector("mobilenet_v2", 3, [128]), "mobilenet_v2", tmp_path / "net.pth")


def test_torchvision_weights_are_downloaded_by_default(tmp_path, monkeypatch):
    urls = []

    def download(url, path, digest):
        urls.append(url)
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(UserError, match=r"torchvision's resnet50 .*--backbone-ckpt"):
        load_backbone(build_detector("resnet50", 3, [128]), "resnet50", None)
    with pytest.raises(UserError, match=r"torchvision's fasterrcnn_resnet50_fpn .*--teacher-ckpt"):
        load_coco_v1(build_detector("resnet50", 80, [128]), CATEGORIES)
    assert urls == [models.ResNet50_Weights.IMAGENET1K_V1.url, FasterRCNN_ResNet50_FPN_Weights.COCO_V1.url]


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A detector like torchvision's COCO_V1 (91 outputs, epsilon 0), and its file in the download cache."""
    torch.manual_seed(0)
    net = FasterRCNN(resnet_fpn_backbone(backbone_name="resnet50", weights=None), 91).eval()
    overwrite_eps(net, 0.0)
    for layer in net.modules():
        if isinstance(layer, FrozenBatchNorm2d):
            nn.init.uniform_(layer.running_var, 1e-6, 1e-4)  # small enough for epsilon to matter
            layer.weight *= 0.005
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = tmp_path / "checkpoints" / FasterRCNN_ResNet50_FPN_Weights.COCO_V1.url.rpartition("/")[2]
    file.parent.mkdir()
    torch.save(net.state_dict(), file)
    return net, file


def box_outputs(net, images):
    """Class logits [.., K + 1] and offsets [.., K + 1, 4] of a fixed proposal."""
    with torch.no_grad():
        levels = net.backbone(images)
        heads = net.roi_heads
        pooled = heads.box_roi_pool(levels, [torch.tensor([[4.0, 6.0, 50.0, 40.0]])], [(64, 64)])
        logits, offsets = heads.box_predictor(heads.box_head(pooled))
    return logits, offsets.unflatten(1, (-1, 4))


def test_coco_weights_have_torchvisions_outputs(published):
    net = build_detector("resnet50", 80, [128]).eval()
    assert load_coco_v1(net, CATEGORIES) == published[1]
    from_file = build_detector("resnet50", 80, [128])
    load_detector(from_file, published[1], "resnet50", CATEGORIES)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in from_file.state_dict().items())
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for level in LEVELS:
            assert relative_difference(*(each.backbone(images)[level] for each in (net, published[0]))) < 1e-2
    ids = [0, *CATEGORIES]
    for ours, theirs in zip(box_outputs(net, images), box_outputs(published[0], images), strict=True):
        assert relative_difference(ours, theirs[:, ids]) < 1e-2
        assert relative_difference(ours, theirs[:, :81]) > 0.1  # labels 1..80 instead of category ids
    # A dataset may have a subset of COCO's categories, with their ids.
    subset = build_detector("resnet50", 2, [128]).eval()
    load_coco_v1(subset, {17: "cat", 18: "dog"})
    torch.testing.assert_close(box_outputs(subset, images)[0], box_outputs(net, images)[0][:, [0, 16, 17]])
    with pytest.raises(UserError, match="lack 'horse'"):
        load_coco_v1(build_detector("resnet50", 2, [128]), {17: "cat", 18: "horse"})


@pytest.mark.parametrize(("outputs", "accepted"), [(4, True), (10, True), (5, False), (91, False)])
def test_detector_for_other_classes_loads_only_if_outputs_are_category_ids(tmp_path, outputs, accepted):
    """The data has three categories with ids 2, 5 and 9."""
    torch.manual_seed(0)
    theirs, ours = build_detector("resnet18", outputs - 1, [128]).eval(), build_detector("resnet18", 3, [128]).eval()
    file = tmp_path / "teacher.pth"
    torch.save({"model": theirs.state_dict()}, file)
    if not accepted:
        with pytest.raises(
            NetworkMismatchError, match=f"teacher.pth is a detector for {outputs - 1} classes, but the data has 3"
        ):
            load_detector(ours, file, "resnet18", {2: "a", 5: "b", 9: "c"})
        return
    load_detector(ours, file, "resnet18", {2: "a", 5: "b", 9: "c"})
    rows = [0, 1, 2, 3] if outputs == 4 else [0, 2, 5, 9]
    images = torch.rand(1, 3, 64, 64)
    for a, b in zip(box_outputs(ours, images), box_outputs(theirs, images), strict=True):
        torch.testing.assert_close(a, b[:, rows])


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [({1: "a", 2: "b", 3: "c"}, [0, 1, 2, 3]), ({5: "c", 6: "a"}, [0, 3, 1]), ({1: "c", 2: "b", 3: "a"}, [0, 3, 2, 1])],
)
def test_classes_are_matched_by_the_names_in_the_file(tmp_path, wanted, rows):
    torch.manual_seed(0)
    theirs = build_detector("resnet18", 3, [128]).eval()
    torch.save({"model": theirs.state_dict(), "classes": ["a", "b", "c"]}, tmp_path / "net.pth")
    ours = build_detector("resnet18", len(wanted), [128]).eval()
    load_detector(ours, tmp_path / "net.pth", "resnet18", wanted)
    images = torch.rand(1, 3, 64, 64)
    for a, b in zip(box_outputs(ours, images), box_outputs(theirs, images), strict=True):
        torch.testing.assert_close(a, b[:, rows])
    with pytest.raises(NetworkMismatchError, match=r"net.pth is a detector for other classes: it lacks 'd'"):
        load_detector(build_detector("resnet18", 3, [128]), tmp_path / "net.pth", "resnet18", {1: "a", 2: "b", 3: "d"})


@pytest.mark.parametrize(
    ("saved", "size"), [({"min_size": [96, 128]}, [96, 128]), ({}, None), ({"min_size": "x"}, None), ([1], None)]
)
def test_trained_size_is_read_from_the_checkpoint(tmp_path, saved, size):
    torch.save(saved, tmp_path / "net.pth")
    assert trained_size(tmp_path / "net.pth") == size


def test_weights_of_other_networks_are_rejected(tmp_path):
    net = build_detector("resnet18", 3, [128])
    torch.save(models.resnet18().state_dict(), tmp_path / "classifier.pth")
    with pytest.raises(NetworkMismatchError, match=r"classifier.pth is not a resnet18 detector: it lacks roi_heads"):
        load_detector(net, tmp_path / "classifier.pth", "resnet18", {1: "a", 2: "b", 3: "c"})
    torch.save(build_detector("mobilenet_v2", 3, [128]).state_dict(), tmp_path / "other.pth")
    with pytest.raises(NetworkMismatchError, match=r"other.pth does not match resnet18"):
        load_detector(net, tmp_path / "other.pth", "resnet18", {1: "a", 2: "b", 3: "c"})
    weights = build_detector("resnet18", 9, [128]).state_dict()
    weights["roi_heads.box_predictor.bbox_pred.bias"] = torch.zeros(7)
    torch.save(weights, tmp_path / "odd.pth")
    with pytest.raises(NetworkMismatchError, match=r"odd.pth"):
        load_detector(net, tmp_path / "odd.pth", "resnet18", {2: "a", 5: "b", 9: "c"})
    weights["roi_heads.box_predictor.cls_score.weight"] = torch.zeros(0, 16)
    torch.save(weights, tmp_path / "odd.pth")
    with pytest.raises(NetworkMismatchError, match=r"odd.pth"):
        load_detector(net, tmp_path / "odd.pth", "resnet18", {2: "a", 5: "b", 9: "c"})
    with pytest.raises(UserError, match=r"odd.pth is a detector: --backbone-ckpt takes a classification network"):
        load_backbone(net, "resnet18", tmp_path / "odd.pth")


def test_detector_trained_from_scratch_loads_into_a_frozen_one(tmp_path):
    scratch, frozen = build_detector("resnet18", 3, [128], scratch=True).eval(), build_detector("resnet18", 3, [128])
    nn.init.normal_(scratch.backbone.body.bn1.running_mean)
    torch.save(scratch.state_dict(), tmp_path / "net.pth")
    load_detector(frozen.eval(), tmp_path / "net.pth", "resnet18", {1: "a", 2: "b", 3: "c"})
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(box_outputs(frozen, images)[0], box_outputs(scratch, images)[0])


def test_inherit_copies_all_but_the_backbone_body():
    torch.manual_seed(0)
    teacher, student = build_detector("resnet50", 3, [128], scratch=True), build_detector("resnet50", 3, [128])
    body = {key: value.clone() for key, value in student.backbone.body.state_dict().items()}
    inherit(student, teacher)
    theirs = teacher.state_dict()
    for key, value in student.state_dict().items():
        if key.startswith("backbone.body."):
            assert torch.equal(value, body[key.removeprefix("backbone.body.")])
        else:
            assert torch.equal(value, theirs[key])
    assert not [
        key for key, value in body.items() if value.ndim > 1 and torch.equal(value, theirs[f"backbone.body.{key}"])
    ]


def test_inherit_rejects_mismatched_shapes():
    with pytest.raises(UserError, match=r"backbone.fpn.inner_blocks.0.0.weight is \[256, 256, 1, 1\] in the teacher"):
        inherit(build_detector("resnet18", 3, [128]), build_detector("resnet50", 3, [128]))


def test_backbone_depths():
    assert set(DETECTORS) == {"resnet18", "resnet50", "resnet101", "mobilenet_v2"}
    blocks = {"resnet18": [2, 2, 2, 2], "resnet50": [3, 4, 6, 3], "resnet101": [3, 4, 23, 3]}
    for name, expected in blocks.items():
        body = build_detector(name, 3, [128]).backbone.body
        assert [len(getattr(body, f"layer{k}")) for k in (1, 2, 3, 4)] == expected

"""Batches, and reading datasets that the tests write in their original formats."""

import hashlib
import pickle
import shutil
import urllib.error
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets, transforms
from torchvision.transforms import functional

from common.data import sources
from common.data.batches import MEAN, PAD, STD, ImageSet, eval_batches, normalize, train_batches
from common.data.sources import load_data, load_test
from common.data.synthetic import CLASSES, synthetic_images
from common.run.errors import UserError


def denormalize(images):
    """Undo `normalize`: float [B, 3, 32, 32] -> uint8 [B, 3, 32, 32]."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return ((images * std + mean) * 255).round().to(torch.uint8)


def position_images(n):
    """n copies of an image with 1-based rows in red and columns in green; 0 means padding."""
    at = torch.arange(1, 33, dtype=torch.uint8)
    image = torch.stack([at[:, None].expand(32, 32), at[None, :].expand(32, 32), torch.full((32, 32), 7)], -1)
    return image.expand(n, -1, -1, -1)


def crop_parameters(image):
    """(top, left, flipped) of a crop, uint8 [3, 32, 32], of a position image."""
    red, green = image[0].int(), image[1].int()
    y, x = red.argmax() // 32, green.argmax() % 32  # positions of the largest row and column
    flipped = bool(green.max(0).values.diff().clamp(-1, 1).sum() < 0) if green.any() else False
    left = green.max() - 1 - (31 - x if flipped else x) + PAD
    return int(red.max() - 1 - y + PAD), int(left), flipped


def test_crops_and_flips_match_torchvision():
    """Each image is an exact crop, flipped or not; all 81 * 2 are as frequent as with torchvision's transforms."""
    n = 16_200
    images = position_images(n)
    ours = torch.cat(
        [denormalize(x) for x, _ in train_batches(ImageSet(images, torch.zeros(n, dtype=torch.long)), 512, 1, 0)]
    )
    transform = transforms.Compose([transforms.RandomCrop(32, padding=PAD), transforms.RandomHorizontalFlip()])
    torch.manual_seed(0)
    one = images[0].permute(2, 0, 1)
    theirs = [transform(one) for _ in range(n)]
    counts = [Counter(map(crop_parameters, batch)) for batch in (ours, theirs)]
    all_crops = {(top, left, flip) for top in range(9) for left in range(9) for flip in (False, True)}
    for count in counts:
        assert set(count) == all_crops
        chi_square = sum((m - 100) ** 2 / 100 for m in count.values())
        assert 100 < chi_square < 240  # 161 degrees of freedom: mean 161, standard deviation 18
    padded = functional.pad(one, [PAD])
    for image in ours[:200]:
        top, left, flipped = crop_parameters(image)
        expected = functional.crop(padded, top, left, 32, 32)
        assert torch.equal(image, functional.hflip(expected) if flipped else expected)


def numbered(n):
    """A dataset whose image i has label i and pixel value i."""
    labels = torch.arange(n)
    return ImageSet(labels.to(torch.uint8)[:, None, None, None].expand(n, 32, 32, 3).contiguous(), labels)


def test_epoch_yields_each_image_once_with_its_label():
    batches = list(train_batches(numbered(50), 16, seed=0, epoch=0))
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 2]
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == list(range(50))
    for images, labels in batches:
        assert torch.equal(denormalize(images)[:, 0, 16, 16].long(), labels)


def test_order_and_augmentation_depend_only_on_seed_and_epoch():
    def epoch(seed, number):
        return torch.cat([x for x, _ in train_batches(numbered(50), 16, seed, number)])

    assert torch.equal(epoch(1, 2), epoch(1, 2))
    assert not torch.equal(epoch(1, 2), epoch(1, 3))
    assert not torch.equal(epoch(1, 2), epoch(2, 2))


def test_batches_are_in_channels_last_format():
    for images, _ in (*train_batches(numbered(20), 8, 0, 0), *eval_batches(numbered(20), 8)):
        assert images.is_contiguous(memory_format=torch.channels_last)


def test_normalize_matches_torchvision():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    expected = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])(Image.fromarray(image))
    torch.testing.assert_close(normalize(torch.from_numpy(image)[None])[0], expected)


# ------------------------------------------------------------------------------------------------- synthetic


def test_synthetic_is_deterministic_and_smaller_datasets_are_prefixes():
    images, labels = synthetic_images(250, "train")
    assert images.shape == (250, 32, 32, 3)
    assert labels.tolist() == [i % 20 for i in range(250)]
    again, _ = synthetic_images(130, "train")
    assert np.array_equal(images[:130], again)
    assert not np.array_equal(synthetic_images(130, "test")[0], again)
    assert len({image.tobytes() for image in images}) == 250


def test_synthetic_subsets_match_the_whole_dataset(monkeypatch):
    monkeypatch.setattr(sources, "SYNTHETIC_SIZES", {"train": 200, "test": 100})
    full, part = load_data("synthetic", ""), load_data("synthetic", "", subset=50, test_subset=30)
    assert full.classes == CLASSES
    assert (len(full.train), len(full.test), len(part.train), len(part.test)) == (200, 100, 50, 30)
    assert torch.equal(part.train.images, full.train.images[:50])
    counts = part.train.labels.bincount()
    assert counts.max() - counts.min() <= 1
    assert full.fingerprint != part.fingerprint
    assert full.fingerprint == load_data("synthetic", "").fingerprint


@pytest.mark.parametrize("subset", [19, 201, 0, -5])
def test_subsets_out_of_range_are_rejected(monkeypatch, subset):
    monkeypatch.setattr(sources, "SYNTHETIC_SIZES", {"train": 200, "test": 100})
    with pytest.raises(UserError, match=r"between 20 .* and 200"):
        load_data("synthetic", "", subset=subset)


def assert_test_split(result, data):
    """Check that `result`, from load_test, is the test split of `data`."""
    test, classes = result
    assert classes == data.classes
    assert torch.equal(test.images, data.test.images)
    assert torch.equal(test.labels, data.test.labels)


@pytest.mark.parametrize("count", [None, 30])
def test_load_test_reads_only_the_synthetic_test_split(monkeypatch, count):
    monkeypatch.setattr(sources, "SYNTHETIC_SIZES", {"train": 200, "test": 100})
    data = load_data("synthetic", "", test_subset=count)

    def test_only(n, split):
        assert split == "test"
        return synthetic_images(n, split)

    monkeypatch.setattr("common.data.synthetic.synthetic_images", test_only)
    assert_test_split(load_test("synthetic", "", count), data)


# ---------------------------------------------------------------------------------------------------- folder


def write_folder(root, splits=("train", "test"), classes=("cat", "dog"), per_class=3, size=(32, 32)):
    rng = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")


@pytest.mark.parametrize("test_split", ["test", "val"])
def test_folder_reads_either_test_split(tmp_path, test_split):
    write_folder(tmp_path, ("train", test_split))
    data = load_data("folder", tmp_path)
    assert data.classes == ["cat", "dog"]
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    stored = np.asarray(Image.open(tmp_path / "train" / "dog" / "1.png"))
    assert np.array_equal(data.train.images[4].numpy(), stored)


def test_folder_converts_and_resizes(tmp_path):
    write_folder(tmp_path, size=(50, 40))
    for mode, i in (("L", 0), ("P", 1), ("RGBA", 2)):
        Image.new(mode, (48, 48), 200 if mode == "L" else None).save(tmp_path / "train" / "cat" / f"{i}.png")
    data = load_data("folder", tmp_path)
    assert data.train.images.shape == (6, 32, 32, 3)
    assert (data.train.images[0] == 200).all()


def test_folder_scales_16_bit_gray_and_rejects_unknown_ranges(tmp_path):
    write_folder(tmp_path)
    ramp = np.linspace(0, 65535, 1024).astype(np.uint16).reshape(32, 32)
    Image.fromarray(ramp).save(tmp_path / "train" / "cat" / "0.png")
    assert np.array_equal(load_data("folder", tmp_path).train.images[0, :, :, 0].numpy(), ramp // 257)
    Image.fromarray(np.zeros((32, 32), np.float32)).save(tmp_path / "train" / "cat" / "1.tif")
    with pytest.raises(UserError, match=r"1\.tif"):
        load_data("folder", tmp_path)


def test_folder_ignores_hidden_files_and_folders(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "cat" / "._0.png").write_bytes(b"not an image")
    data = load_data("folder", tmp_path)
    assert (data.classes, len(data.train)) == (["cat", "dog"], 6)


def test_folder_subset_is_balanced_over_unequal_classes(tmp_path):
    write_folder(tmp_path, per_class=2)
    for i in range(5):
        Image.new("RGB", (32, 32)).save(tmp_path / "train" / "cat" / f"more{i}.png")
    assert load_data("folder", tmp_path, subset=4).train.labels.tolist() == [0, 0, 1, 1]
    assert load_data("folder", tmp_path, subset=6).train.labels.tolist() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("test_split", ["test", "val"])
@pytest.mark.parametrize("count", [None, 4])
def test_folder_test_split_loads_without_train(tmp_path, test_split, count):
    write_folder(tmp_path, ("train", test_split), size=(40, 36))
    data = load_data("folder", tmp_path, test_subset=count)
    shutil.rmtree(tmp_path / "train")
    assert_test_split(load_test("folder", tmp_path, count), data)
    with pytest.raises(UserError, match=r"train is not an image folder .* train/ and test/ or val/"):
        load_data("folder", tmp_path)
    with pytest.raises(UserError, match=r"--test-subset 7: it must be between 2 .* and 6"):
        load_test("folder", tmp_path, 7)
    (tmp_path / test_split).rename(tmp_path / "other")
    with pytest.raises(UserError, match=r"test is not an image folder .*must contain test/ or val/$"):
        load_test("folder", tmp_path)


def test_folder_errors_name_the_problem(tmp_path):
    with pytest.raises(UserError, match="train"):
        load_data("folder", tmp_path / "missing")
    write_folder(tmp_path)
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"cat/1\.png"):
        load_data("folder", tmp_path)
    (tmp_path / "train" / "cat").rename(tmp_path / "train" / "cow")
    with pytest.raises(UserError, match="'cat'"):
        load_data("folder", tmp_path)
    for image in (tmp_path / "test" / "dog").iterdir():
        image.unlink()
    with pytest.raises(UserError, match=r"test .*dog"):
        load_data("folder", tmp_path)


# ----------------------------------------------------------------------------------------------------- CIFAR


def write_cifar100(root, monkeypatch):
    """A small dataset in CIFAR-100's format: one pickled dictionary per split, and one with the class names."""
    folder = root / datasets.CIFAR100.base_folder
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (300, 3072), np.uint8)
    labels = [i % 100 for i in range(200)]
    contents = {
        "train": {"data": pixels[:200], "fine_labels": labels},
        "test": {"data": pixels[200:], "fine_labels": labels[:100]},
        "meta": {"fine_label_names": [f"class{i:02}" for i in range(100)]},
    }
    digests = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        digests[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", digests["train"]]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", digests["test"]]])
    monkeypatch.setattr(datasets.CIFAR100, "meta", {**datasets.CIFAR100.meta, "md5": digests["meta"]})
    return pixels, folder


def test_cifar100_reads_the_pickled_files(tmp_path, monkeypatch):
    pixels, _ = write_cifar100(tmp_path, monkeypatch)
    data = load_data("cifar100", tmp_path)
    assert len(data.classes) == 100
    assert data.classes[7] == "class07"
    assert (len(data.train), len(data.test)) == (200, 100)
    assert np.array_equal(data.train.images[5].permute(2, 0, 1).flatten().numpy(), pixels[5])
    assert data.test.labels.tolist() == list(range(100))
    assert_test_split(load_test("cifar100", tmp_path), data)


def test_damaged_or_missing_cifar_is_reported_offline(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise urllib.error.URLError("no route")

    _, folder = write_cifar100(tmp_path, monkeypatch)
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    (folder / "train").write_bytes(b"damaged")
    for directory in (tmp_path, tmp_path / "empty"):
        with pytest.raises(UserError, match=r"could not be downloaded.*cifar-100-python\.tar\.gz"):
            load_data("cifar100", directory)

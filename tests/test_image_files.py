"""Reading images from files, independent of the number of workers and split over ranks."""

import io
import random
import shutil
import signal
import struct

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from running import write_images
from torchvision import transforms
from torchvision.io import ImageReadMode
from torchvision.transforms import functional

from common.data import pixels
from common.data.batches import normalize
from common.data.folders import open_rgb
from common.data.image_files import (
    MEAN,
    STD,
    ImageFiles,
    Shard,
    eval_loader,
    list_files,
    list_test_files,
    train_loader,
)
from common.data.pixels import augment, draw_crop, jpeg_shape, read_jpeg, read_pixels
from common.run.errors import UserError

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("files"), {"train": 7, "val": 5})


def epochs(folder, workers, which=(0, 1)):
    """Batches of several epochs from one loader, as in training."""
    shard = Shard(21, 8, seed=3)
    loader = train_loader(ImageFiles(list_files(folder).train, 32, seed=3), shard, workers, CPU)
    batches = []
    for shard.epoch in which:
        batches.append(list(loader))
    return batches


def test_batches_do_not_depend_on_workers_or_earlier_epochs(folder):
    reference = epochs(folder, workers=0)
    for workers in (1, 2):
        for ours, theirs in zip(epochs(folder, workers), reference, strict=True):
            for (images, labels), (images_0, labels_0) in zip(ours, theirs, strict=True):
                assert torch.equal(images, images_0)
                assert torch.equal(labels, labels_0)
    resumed = epochs(folder, workers=2, which=[1])[0]  # as when resuming
    assert all(torch.equal(a[0], b[0]) for a, b in zip(resumed, reference[1], strict=True))


def test_augmentation_is_seeded_and_leaves_the_global_generator_unchanged(folder):
    samples = [list_files(folder).train[0]] * 2
    state = torch.get_rng_state()
    views = [
        ImageFiles(samples, 32, seed)[key][0] for seed, key in ((1, (0, 0)), (1, (0, 1)), (1, (1, 0)), (2, (0, 0)))
    ]
    assert torch.equal(torch.get_rng_state(), state)
    for i in range(4):
        for j in range(i):
            assert not torch.equal(views[i], views[j])


@pytest.mark.parametrize(
    ("name", "shape"), [("0.JPEG", (90, 120)), ("0.png", (90, 120)), ("0.png", (9, 200)), ("0.png", (200, 9))]
)
def test_pixels_of_augmented_images_match_torchvision(tmp_path, name, shape):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    image = Image.open(tmp_path / name).convert("RGB")
    for epoch in range(40):
        ours, label = ImageFiles([(str(tmp_path / name), 1)], 32, seed=1)[epoch, 0]
        assert label == 1
        assert ours.dtype == torch.uint8
        rng = random.Random(f"1 {epoch} 0")
        theirs = functional.resized_crop(image, *draw_crop(*shape, rng), [32, 32])
        theirs = functional.hflip(theirs) if rng.random() < 0.5 else theirs
        assert np.abs(ours.numpy().astype(int) - np.array(theirs)).max() <= 1


@pytest.mark.parametrize("shape", [(90, 120), (9, 30), (30, 9)])
def test_crops_are_distributed_as_in_torchvision(shape):
    """By the Kolmogorov-Smirnov distance, which exceeds 0.028 with a probability below 1e-6."""
    n, rng = 20_000, random.Random(0)
    ours = np.array([draw_crop(*shape, rng) for _ in range(n)])
    image = torch.empty(3, *shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
        theirs = np.array([transforms.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(n)])
    samples = [[*crops.T, crops[:, 2] * crops[:, 3], crops[:, 2] / crops[:, 3]] for crops in (ours, theirs)]
    for pair in zip(*samples, strict=True):  # top, left, height, width, area, aspect ratio
        values = np.unique(np.concatenate(pair))
        ecdfs = [np.searchsorted(np.sort(sample), values, side="right") / n for sample in pair]
        assert np.abs(ecdfs[0] - ecdfs[1]).max() < 0.028


def test_half_of_the_images_are_flipped():
    image = torch.arange(8 * 8 * 3, dtype=torch.uint8).reshape(8, 8, 3)
    views = [augment(image, 8, random.Random(i)) for i in range(1000)]
    assert 450 < sum(int(view[0, 0, 0] > view[0, -1, 0]) for view in views) < 550


def read(path):
    return read_pixels(str(path), read_jpeg(str(path)))


def jpeg(mode="RGB", **options):
    """The bytes of a JPEG of smooth colors."""
    file, colors = io.BytesIO(), np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(colors).resize((61, 47)).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def png(mode):
    file = io.BytesIO()
    Image.open(io.BytesIO(jpeg())).convert(mode).save(file, "PNG")
    return file.getvalue()


rotated = Image.Exif()
rotated[ExifTags.Base.Orientation] = 6
JPEGS = {
    "photograph": jpeg(),
    "full chroma": jpeg(subsampling=0, quality=95),
    "progressive": jpeg(progressive=True),
    "gray": jpeg("L"),
    "RGB stored": jpeg(keep_rgb=True),
    "rotated": jpeg(exif=rotated),
    "followed by other bytes": jpeg() + b"more",
}
OTHERS = {"CMYK": jpeg("CMYK"), "PNG": png("RGB"), "palette": png("P"), "alpha": png("RGBA"), "16 bits": png("I;16")}


@pytest.mark.parametrize("name", [*JPEGS, *OTHERS])
def test_torchvision_decodes_only_plain_jpegs_and_agrees_with_pil(tmp_path, monkeypatch, name):
    calls, path = [], tmp_path / "image.JPEG"
    path.write_bytes((JPEGS | OTHERS)[name])
    expected = np.asarray(open_rgb(str(path)))
    decode = pixels.decode_jpeg
    monkeypatch.setattr(pixels, "decode_jpeg", lambda *args: calls.append(1) or decode(*args))
    image = read(path)
    assert len(calls) == (name in JPEGS)
    assert image.shape == (47, 61, 3)
    assert np.abs(image.numpy().astype(int) - expected).max() <= 1  # their versions of libjpeg may differ
    monkeypatch.setattr(pixels, "decode_jpeg", None)  # as in a torchvision without it
    assert np.array_equal(read(path).numpy(), expected)


@pytest.mark.parametrize("name", JPEGS)
def test_jpeg_shape(name):
    assert jpeg_shape(JPEGS[name]) == (47, 61, 1 if name == "gray" else 3)


def test_unusual_headers_are_left_to_pil():
    jpeg = JPEGS["photograph"]
    start = jpeg.index(b"\xff\xc0")
    cut = [b"", jpeg[:2], jpeg[:start], jpeg[: start + 9]]
    for header in [*cut, jpeg[:2] + bytes(20) + jpeg[2:], b"\x89P" + jpeg[2:]]:
        with pytest.raises((ValueError, IndexError, struct.error)):
            jpeg_shape(header)
    # If a marker without a length were taken for a segment, it could hide the size that libjpeg reads.
    for marker in (b"\xff\x01", b"\xff\xd0", b"\xff\xff"):
        with pytest.raises(ValueError, match="JPEG"):
            jpeg_shape(jpeg[:2] + marker + b"\x00\x04\x00\x00" + jpeg[start:])
    frames = {"lossless": b"\xc3\x00\x11\x08", "arithmetic": b"\xc9\x00\x11\x08", "12 bits": b"\xc1\x00\x11\x0c"}
    for frame in frames.values():
        with pytest.raises(ValueError, match="JPEG"):
            jpeg_shape(jpeg[:2] + b"\xff" + frame + jpeg[start + 5 :])


def test_pil_decides_whether_a_damaged_jpeg_is_read(tmp_path):
    path, whole = tmp_path / "image.JPEG", JPEGS["photograph"]
    for end in (2, 300, len(whole) // 2, len(whole) - 2):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError) as expected:
            open_rgb(str(path))
        with pytest.raises(UserError) as error:
            read(path)
        assert str(error.value) == str(expected.value)
    path.write_bytes(whole[:-200] + bytes(5000))  # without an end marker, but with enough data for every pixel
    with pytest.raises(RuntimeError):
        pixels.decode_jpeg(read_jpeg(str(path)), ImageReadMode.RGB.value)
    assert np.array_equal(read(path).numpy(), np.asarray(open_rgb(str(path))))


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "image.JPEG"
    path.write_bytes(JPEGS["photograph"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="decompression bomb"):
        read(path)


def test_evaluation_images_match_torchvision(folder):
    path, label = list_files(folder).test[0]
    crop = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])(Image.open(path).convert("RGB"))
    image, _ = ImageFiles([(path, label)], 224)[0, 0]
    assert np.array_equal(image.numpy(), np.asarray(crop))
    batch, _ = next(iter(eval_loader(ImageFiles([(path, label)], 224), 0, CPU)))
    expected = transforms.Normalize(MEAN, STD)(transforms.ToTensor()(crop))
    torch.testing.assert_close(batch[0], expected, rtol=1e-5, atol=1e-5)
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_normalize_caches_each_mean_and_std_separately():
    images = torch.randint(0, 256, (1, 4, 4, 3), dtype=torch.uint8)
    assert not torch.equal(normalize(images), normalize(images, mean=MEAN, std=STD))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shards_partition_the_batches_of_an_epoch(world):
    shards = [list(Shard(26, 8, 5, rank, world, epoch=2)) for rank in range(world)]
    whole = [[i for _, i in batch] for batch in Shard(26, 8, 5, epoch=2)]
    assert sorted(i for batch in whole for i in batch) == list(range(26))
    # The last batch has two images, enough for only one rank.
    assert Shard(26, 8, 5, 0, world).sizes == [8, 8, 8, 2][: 4 if world == 1 else 3]
    for b, size in enumerate(Shard(26, 8, 5, 0, world).sizes):
        parts = [[i for _, i in shard[b]] for shard in shards]
        assert sorted(i for part in parts for i in part) == sorted(whole[b])
        assert len(whole[b]) == size
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert {epoch for shard in shards for batch in shard for epoch, _ in batch} == {2}
    assert list(Shard(26, 8, 5, epoch=3)) != list(Shard(26, 8, 5, epoch=2))
    assert len(Shard(9, 8, 5)) == 1  # a single image is dropped


def test_each_test_image_is_on_exactly_one_rank(folder):
    files = ImageFiles([(path, i) for i, (path, _) in enumerate(list_files(folder).test)], 32)
    for world in (1, 2, 4, 20):
        labels = [eval_loader(files, 0, CPU, rank, world) for rank in range(world)]
        numbers = [i for loader in labels for _, batch in loader for i in batch.tolist()]
        assert sorted(numbers) == list(range(15))


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_image_is_reported_in_one_line(tmp_path, workers):
    write_images(tmp_path, {"train": 4, "val": 1})
    bad = tmp_path / "train" / "n2" / "1.JPEG"
    bad.write_bytes(bad.read_bytes()[:300])
    files = ImageFiles(list_files(tmp_path).train, 32, seed=0)
    with pytest.raises(UserError) as error:
        list(train_loader(files, Shard(12, 4, 0), workers, CPU))
    assert str(error.value).startswith(f"cannot read the image {bad} (")
    assert "\n" not in str(error.value)


def test_decoder_errors_name_the_image(tmp_path, monkeypatch):
    path = write_images(tmp_path, {"train": 1, "val": 1}, ["a\nb"]) / "train" / "a\nb" / "0.JPEG"

    def convert(self, mode):
        raise RuntimeError("Failed to decode frame 0")

    monkeypatch.setattr(Image.Image, "convert", convert)
    with pytest.raises(UserError) as error:
        list(eval_loader(ImageFiles([(str(path), 0)], 32), 0, CPU))
    assert str(error.value).startswith(f"cannot read the image {tmp_path}/train/a\\nb/0.JPEG (Failed")


def test_fingerprint_depends_on_classes_and_training_files(tmp_path):
    one, two = (write_images(tmp_path / name, {"train": 3, "val": 2}) for name in ("one", "two"))
    assert list_files(one).fingerprint == list_files(two).fingerprint
    assert list_files(one, subset=6).fingerprint != list_files(one).fingerprint
    (two / "train" / "n1" / "0.JPEG").rename(two / "train" / "n1" / "zero.JPEG")
    assert list_files(one).fingerprint != list_files(two).fingerprint


def test_subsets_and_both_names_of_the_test_split(tmp_path):
    write_images(tmp_path, {"train": 4, "test": 3})
    data = list_files(tmp_path, subset=5, test_subset=3)
    assert [label for _, label in data.train] == [0, 0, 1, 1, 2]
    assert [label for _, label in data.test] == [0, 1, 2]
    with pytest.raises(UserError, match="--test-subset 10"):
        list_files(tmp_path, test_subset=10)
    (tmp_path / "test").rename(tmp_path / "other")
    with pytest.raises(UserError, match="val is not an image folder"):
        list_files(tmp_path)


def test_list_test_files_does_not_need_train(tmp_path):
    write_images(tmp_path, {"train": 4, "val": 3})
    for count in (None, 4):
        data = list_files(tmp_path, test_subset=count)
        assert list_test_files(tmp_path, count) == (data.test, data.classes)
    shutil.rmtree(tmp_path / "train")
    assert list_test_files(tmp_path, 4) == (data.test, data.classes)
    with pytest.raises(UserError, match="train is not an image folder"):
        list_files(tmp_path)
    with pytest.raises(UserError, match="--test-subset 10"):
        list_test_files(tmp_path, 10)


def test_workers_ignore_ctrl_c():
    class Signals(ImageFiles):
        def __getitems__(self, keys):
            ignored = [signal.getsignal(number) is signal.SIG_IGN for number in (signal.SIGINT, signal.SIGHUP)]
            return [(torch.zeros(1, 1, 3, dtype=torch.uint8), int(all(ignored))) for _ in keys]

    [(_, labels)] = eval_loader(Signals([("", 0)], 32), 1, CPU)
    assert labels.tolist() == [1]

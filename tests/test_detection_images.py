"""Order, flips, and loading of images with boxes."""

import signal
from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_detectors import write_coco

from common.detection.coco import Split, load_coco
from common.detection.images import Batch, BoxedImages, batches, load
from common.run.errors import UserError

CPU = torch.device("cpu")


def make_split(landscape, portrait):
    """The given numbers of landscape and portrait images in random order, without files."""
    sizes = [(20, 10)] * landscape + [(10, 20)] * portrait
    order = np.random.default_rng(0).permutation(len(sizes))
    n = len(sizes)
    return Split(np.array([b""] * n), np.array(sizes)[order], np.zeros(n + 1, int), np.zeros((0, 4)), np.zeros(0, int))


def indices(batches):
    return [[i for _, _, i in batch] for batch in batches]


def test_each_image_is_used_once_per_epoch_in_batches_of_one_orientation():
    split = make_split(13, 6)
    stream = indices(batches(split, 4, seed=3, first=0, last=190))  # 40 epochs
    portrait = split.sizes[:, 1] > split.sizes[:, 0]
    assert all(len(batch) == 4 and len(set(portrait[batch].tolist())) == 1 for batch in stream)
    # Images wait until their batch is full, so each orientation is checked separately.
    for kind, n in ((False, 13), (True, 6)):
        same_kind = [i for i in chain(*stream) if portrait[i] == kind]
        epochs = [same_kind[i : i + n] for i in range(0, len(same_kind) - n + 1, n)]
        assert len(epochs) >= 38
        assert all(len(set(epoch)) == n for epoch in epochs)
        assert all(a != b for a, b in pairwise(epochs))  # each epoch has its own order
    counts = Counter(chain(*stream)).values()
    assert max(counts) - min(counts) <= 1
    assert indices(batches(split, 4, seed=4, first=0, last=9)) != stream[:9]


def test_square_images_are_batched_with_landscape_ones():
    split = make_split(2, 2)
    split.sizes[:] = [(10, 10), (10, 20), (20, 10), (10, 11)]
    assert {frozenset(batch) for batch in indices(batches(split, 2, 1, 0, 6))} == {frozenset({0, 2}), frozenset({1, 3})}


@pytest.mark.parametrize("first", [1, 5, 7])
def test_resuming_mid_epoch_repeats_and_skips_nothing(first):
    split = make_split(13, 6)
    whole = list(batches(split, 4, seed=3, first=0, last=30))
    assert list(batches(split, 4, seed=3, first=first, last=30)) == whole[first:]
    assert [batch[0][0] for batch in whole] == list(range(30))


def test_ranks_partition_each_batch():
    split = make_split(13, 6)
    whole = list(batches(split, 6, 3, 0, 20))
    parts = [list(batches(split, 6, 3, 0, 20, rank, 3)) for rank in range(3)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert all(len(share) == 2 for share in shares)
        assert sorted(chain(*shares)) == sorted(batch)
        assert [place for _, place, _ in batch] == list(range(6))


@pytest.fixture
def data(tmp_path):
    images = [(1, "a.png", 20, 12), (2, "b.png", 12, 20)]
    write_coco(tmp_path, images, [(1, 1, [2, 3, 5, 4]), (1, 2, [10, 0, 10, 12]), (2, 1, [0, 0, 6, 20])])
    write_coco(tmp_path, images[:1], [(1, 1, [2, 3, 5, 4])], split="val")
    return load_coco(tmp_path)


def test_flips_mirror_the_boxes(data):
    plain, flipping = BoxedImages(data.train), BoxedImages(data.train, seed=1)
    image, target = plain[0, 0, 0]
    assert (image.shape, image.dtype) == ((12, 20, 3), np.uint8)
    assert np.array_equal(image, Image.open(data.train.files[0].decode()))
    assert target["boxes"].tolist() == [[2, 3, 7, 7], [10, 0, 20, 12]]
    assert target["labels"].tolist() == [1, 2]
    flips = 0
    for place in range(40):
        seen, seen_target = flipping[5, place, 0]
        if np.array_equal(seen, image[:, ::-1]):
            flips += 1
            assert seen_target["boxes"].tolist() == [[13, 3, 18, 7], [0, 0, 10, 12]]
            for a, b in zip(seen_target["boxes"].astype(int), target["boxes"].astype(int), strict=True):
                inside = seen[a[1] : a[3], a[0] : a[2]]
                assert np.array_equal(inside, image[b[1] : b[3], b[0] : b[2]][:, ::-1])
        else:
            assert np.array_equal(seen, image)
            assert seen_target["boxes"].tolist() == target["boxes"].tolist()
        assert seen_target["labels"].tolist() == [1, 2]
    assert 8 < flips < 32


def test_flips_depend_on_iteration_and_seed(data):
    def flips(seed, iteration):
        images = [BoxedImages(data.train, seed)[iteration, place, 0][0] for place in range(30)]
        return [np.array_equal(image, images[0]) for image in images]

    assert flips(1, 5) == flips(1, 5)
    assert flips(1, 5) != flips(1, 6)
    assert flips(1, 5) != flips(2, 5)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_floats_and_do_not_depend_on_workers(data, workers):
    order = list(batches(data.train, 1, 1, 0, 5))
    loaded = list(load(BoxedImages(data.train, 1), order, workers, CPU))
    assert len(loaded) == 5
    for [key], [(image, target)] in zip(order, loaded, strict=True):
        pixels, expected = BoxedImages(data.train, 1)[key]
        assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
        assert target["boxes"].dtype == torch.float32
        assert target["labels"].dtype == torch.int64
        assert target["boxes"].tolist() == expected["boxes"].tolist()


def test_all_arrays_are_pinned(data, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.clone()) or pinned[-1])
    arrays = [BoxedImages(data.train)[0, place, i] for place, i in enumerate((1, 0))]
    batch = Batch(arrays).pin_memory()
    tensors = [tensor for image, target in batch.samples for tensor in (image, target["boxes"], target["labels"])]
    assert [id(tensor) for tensor in tensors] == [id(tensor) for tensor in pinned]
    for (image, target), (pixels, expected) in zip(batch.samples, arrays, strict=True):
        assert np.array_equal(image, pixels)
        assert target.keys() == expected.keys()
        assert all(np.array_equal(target[key], expected[key]) for key in expected)


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_on_the_gpu_are_those_on_the_cpu(data, workers):
    order = list(batches(data.train, 1, 1, 0, 5))
    on_gpu, on_cpu = (
        list(load(BoxedImages(data.train, 1), order, workers, device)) for device in (torch.device("cuda"), CPU)
    )
    for [(image, target)], [(pixels, expected)] in zip(on_gpu, on_cpu, strict=True):
        assert image.is_cuda
        torch.testing.assert_close((image.cpu(), {k: v.cpu() for k, v in target.items()}), (pixels, expected))


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_name_damaged_and_mismatched_images(data, workers):
    path = data.train.files[0].decode()
    Image.new("RGB", (12, 20)).save(path)  # rotated, as some tools do
    with pytest.raises(UserError) as error:
        list(load(BoxedImages(data.train), [[(0, 0, 0)]], workers, CPU))
    assert str(error.value) == (
        f"the image {path} has 12x20 pixels, but its annotation says 20x12: correct one of them"
    )
    with open(path, "wb") as file:
        file.write(b"\x89PNG")
    with pytest.raises(UserError, match=f"^cannot read the image {path}"):
        list(load(BoxedImages(data.train), [[(0, 0, 0)]], workers, CPU))


def test_workers_ignore_ctrl_c():
    class Signals(BoxedImages):
        def __getitem__(self, key):
            ignored = [signal.getsignal(number) is signal.SIG_IGN for number in (signal.SIGINT, signal.SIGHUP)]
            return np.full((1, 1, 3), 255 * all(ignored), np.uint8), {}

    [[(image, _)]] = load(Signals(None), [[(0, 0, 0)]], 1, CPU)
    assert image.all()

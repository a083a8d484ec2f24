"""Loaders on small files made here: right pixels, right order, and clear errors for wrong files."""

import builtins
import gzip
import os
import pickle
import random
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from training.config import ConfigError, DataConfig
from training.data import load_data, safe_pickle
from training.data.folder import Augmentation, View, center_box, random_resized_box, random_square
from training.data.loader import derive_seed, eval_batches, train_batches
from training.data.mnist import read_idx
from training.data.sources import DataError
from training.data.splits import ImageTensors, balanced_subset, shift_and_flip

GENERATOR = np.random.default_rng(0)


def idx_bytes(array):
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    arrays = {}
    for prefix, n in (("train", 20), ("t10k", 10)):
        images = GENERATOR.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
            arrays[name] = array
    return tmp_path, arrays


def cifar_batch(n, labels=b"labels", classes=10):
    return {
        b"batch_label": b"a batch",
        labels: [i % classes for i in range(n)],
        b"data": GENERATOR.integers(0, 256, (n, 3072), dtype=np.uint8),
        b"filenames": [b"a.png"] * n,
    }


@pytest.fixture
def cifar(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps(cifar_batch(10), protocol=2))
    return folder


def test_digits_split_is_fixed_and_balanced():
    data = load_data(DataConfig("digits"))
    assert data.train.images.shape == (1437, 1, 8, 8)
    assert data.test.images.shape == (360, 1, 8, 8)
    assert data.test.labels.bincount().tolist() == [36] * 10
    again = load_data(DataConfig("digits"))
    assert torch.equal(data.test.images, again.test.images)
    inputs, _ = data.train.eval_batch(torch.arange(1437))
    assert abs(inputs.mean().item()) < 0.05 and abs(inputs.std().item() - 1) < 0.05


def test_mnist(mnist):
    root, arrays = mnist
    data = load_data(DataConfig("mnist", root=str(root)))
    assert torch.equal(data.train.images[:, 0], torch.from_numpy(arrays["train-images-idx3-ubyte"]))
    assert data.test.labels.tolist() == arrays["t10k-labels-idx1-ubyte"].tolist()


def test_mnist_from_the_environment(mnist, monkeypatch):
    monkeypatch.setenv("QK_DATA_DIR", str(mnist[0]))
    assert len(load_data(DataConfig("mnist")).train.labels) == 20


def test_missing_file_says_which_and_where_from(mnist):
    (mnist[0] / "MNIST/raw/t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte\.gz is missing; get it from https://"):
        load_data(DataConfig("mnist", root=str(mnist[0])))


def test_no_data_folder(monkeypatch):
    monkeypatch.delenv("QK_DATA_DIR", raising=False)
    with pytest.raises(DataError, match=r"set data\.root in the recipe, or the variable QK_DATA_DIR"):
        load_data(DataConfig("mnist"))
    with pytest.raises(DataError, match=r"/no/such/folder \(data\.root\) does not exist"):
        load_data(DataConfig("cifar10", root="/no/such/folder"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: b[: len(b) // 2], "is damaged"),  # truncated gz
        (lambda b: b"", "not an IDX file"),
        (lambda b: b"not gzip at all", "is damaged"),
        (lambda b: b[:60] + bytes([b[60] ^ 255]) + b[61:], "is damaged"),  # gz checksum or stream
        (lambda b: gzip.compress(gzip.decompress(b)[:-1]), "is damaged"),  # a byte too few
        (lambda b: gzip.compress(b"\0\0\x0d" + gzip.decompress(b)[3:]), "not an IDX file"),  # floats
        (lambda b: gzip.compress(b"\0\0\x08\xff"), "not an IDX file"),
    ],
)
def test_damaged_idx(mnist, spoil, message):
    path = mnist[0] / "MNIST/raw/train-images-idx3-ubyte.gz"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        read_idx(path)


def test_cifar(cifar):
    data = load_data(DataConfig("cifar10", root=str(cifar.parent)))
    assert data.train.images.shape == (50, 3, 32, 32)
    batch = pickle.loads((cifar / "data_batch_2").read_bytes())
    assert np.array_equal(data.train.images[10:20].numpy().reshape(10, 3072), batch[b"data"])


def test_cifar100(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test"):
        (folder / name).write_bytes(pickle.dumps(cifar_batch(200, b"fine_labels", 100)))
    data = load_data(DataConfig("cifar100", root=str(tmp_path), subset=100))
    assert data.num_classes == 100 and data.train.labels.bincount().tolist() == [1] * 100


class Evil:
    def __init__(self, function, *args):
        self.reduced = (function, args)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    ("function", "argument", "name"),
    [
        (os.system, "true", r"(posix|nt)\.system"),
        (builtins.eval, "1", r"builtins\.eval"),
        (builtins.getattr, "1", r"builtins\.getattr"),
        (np.load, "x", r"numpy.*\.load"),
        (np.dtype, "O", "array type 'O' is not allowed"),
        (bytes.fromhex, "00", r"builtins\.getattr"),
    ],
)
def test_malicious_pickle_is_refused(cifar, function, argument, name):
    batch = cifar_batch(10) | {b"extra": Evil(function, argument)}
    (cifar / "data_batch_1").write_bytes(pickle.dumps(batch))
    with pytest.raises(DataError, match=rf"data_batch_1 cannot be read as a CIFAR batch: .*{name}"):
        load_data(DataConfig("cifar10", root=str(cifar.parent)))


@pytest.mark.parametrize("cut", [0, 1, 100, 5000, -1])
def test_truncated_pickle(cifar, cut):
    path = cifar / "test_batch"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match="test_batch cannot be read"):
        load_data(DataConfig("cifar10", root=str(cifar.parent)))


@pytest.mark.parametrize(
    "change",
    [
        {b"labels": [10] * 10},
        {b"labels": [-1] * 10},
        {b"labels": [1] * 9},
        {b"labels": ["cat"] * 10},
        {b"data": np.zeros((10, 3072))},
        {b"data": np.zeros((10, 30), np.uint8)},
        {b"data": np.zeros((0, 3072), np.uint8), b"labels": []},
    ],
)
def test_wrong_cifar_content(cifar, change):
    (cifar / "data_batch_3").write_bytes(pickle.dumps(cifar_batch(10) | change))
    with pytest.raises(DataError, match="data_batch_3"):
        load_data(DataConfig("cifar10", root=str(cifar.parent)))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["u1", "<i8", ">i4", "<f4", "?"])
def test_arrays_of_every_protocol(protocol, dtype):
    value = {"a": GENERATOR.integers(0, 2, (3, 4)).astype(dtype), "n": 3, "f": 0.5, "l": [b"x", (1, None)]}
    if protocol < 3:  # there bytes are written as an encoded text
        value["s"] = b"\x80\xff"
    value["t"] = np.asfortranarray(value["a"])
    read = safe_pickle.loads(pickle.dumps(value, protocol=protocol))
    assert np.array_equal(read.pop("a"), value.pop("a"))
    assert np.array_equal(read.pop("t"), value.pop("t"))
    assert read == value


def test_array_state_must_agree_with_its_bytes():
    good = pickle.dumps(np.zeros((2, 3), np.uint8), protocol=2)
    assert b"K\x02K\x03" in good
    with pytest.raises(pickle.UnpicklingError, match=r"shape \(2, 9\) does not have"):
        safe_pickle.loads(good.replace(b"K\x02K\x03", b"K\x02K\x09"))


@pytest.fixture
def image_folder(tmp_path):
    for split, n in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = GENERATOR.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def test_image_folder(image_folder):
    config = DataConfig("folder", root=str(image_folder), image_size=16, workers=1)
    data = load_data(config)
    assert data.num_classes == 2 and data.test.labels.tolist() == [0, 0, 1, 1]
    batch, labels = data.train.train_batch(torch.arange(12), 7, slice(0, 12))
    assert batch.shape == (12, 3, 16, 16) and labels.tolist() == [0] * 6 + [1] * 6
    other = load_data(DataConfig("folder", root=str(image_folder), image_size=16, workers=3))
    assert torch.equal(other.train.train_batch(torch.arange(12), 7, slice(4, 9))[0], batch[4:9])
    assert not torch.equal(other.train.train_batch(torch.arange(12), 8, slice(0, 12))[0], batch)
    assert data.test.eval_batch(torch.arange(4))[0].shape == (4, 3, 16, 16)


def test_image_folder_mistakes(image_folder):
    (image_folder / "val" / "bird").mkdir()
    with pytest.raises(DataError, match=r"val/bird is a class that .*train does not have"):
        load_data(DataConfig("folder", root=str(image_folder)))
    (image_folder / "val" / "bird").rmdir()
    (image_folder / "val" / "cat" / "0.png").write_bytes(b"\x89PNG nothing")
    data = load_data(DataConfig("folder", root=str(image_folder)))
    with pytest.raises(DataError, match=r"0\.png cannot be read as an image"):
        data.test.eval_batch(torch.arange(4))


@pytest.mark.parametrize("size", [(500, 300), (1, 1), (3, 2000)])
def test_boxes_lie_inside(size):
    for seed in range(200):
        left, top, right, bottom = random_resized_box(*size, random.Random(seed))
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        left, top, right, bottom = random_square(*size, random.Random(seed))
        assert right - left == bottom - top == max(1, round(min(size) * 7 / 8))
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    left, top, right, bottom = center_box(*size)
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


def test_colors_of_a_view():
    pixels = GENERATOR.integers(60, 120, (8, 8, 3), dtype=np.uint8)
    image, box = Image.fromarray(pixels), (0, 0, 8, 8)
    assert np.array_equal(View(box).of(image, 8).permute(1, 2, 0).numpy(), pixels)
    mirrored = View(box, mirror=True, colors=(("brightness", 0.5),)).of(image, 8).permute(1, 2, 0).numpy()
    assert np.abs(mirrored[:, ::-1].astype(int) - pixels // 2).max() <= 1
    grey = View(box, colors=(("color", 0.0),)).of(image, 8)
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[1], grey[2])
    views = [Augmentation("side", 0.4).draw(80, 80, random.Random(seed)) for seed in range(200)]
    factors = [factor for view in views for _, factor in view.colors]
    assert len(factors) == 600 and 0.6 <= min(factors) < 0.65 and 1.35 < max(factors) <= 1.4
    assert len({tuple(name for name, _ in view.colors) for view in views}) == 6
    assert 60 < sum(view.mirror for view in views) < 140


def test_shift_and_flip_against_a_loop():
    images = torch.randint(0, 256, (5, 3, 7, 6), dtype=torch.uint8)
    top, left = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([4, 3, 0, 1, 2])
    mirror = torch.tensor([True, False, True, False, True])
    result = shift_and_flip(images, 2, top, left, mirror)
    for i in range(5):
        padded = torch.zeros(3, 11, 10, dtype=torch.uint8)
        padded[:, 2:9, 2:8] = images[i]
        expected = padded[:, top[i] : top[i] + 7, left[i] : left[i] + 6]
        assert torch.equal(result[i], expected.flip(2) if mirror[i] else expected)


def split_of(n):
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 4, 4).contiguous()
    return ImageTensors(images, torch.arange(n) % 3, mean=[0.0], std=[1.0], full_scale=1.0, pad=1, flip=True)


def test_batches_do_not_depend_on_where_and_who():
    split = split_of(23)
    whole = list(train_batches(split, 6, seed=5, epoch=2))
    assert len(whole) == 3
    resumed = list(train_batches(split, 6, seed=5, epoch=2, first_step=1))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[1:], resumed, strict=True))
    parts = [list(train_batches(split, 6, seed=5, epoch=2, rank=rank, ranks=3)) for rank in range(3)]
    for step, (images, labels) in enumerate(whole):
        assert torch.equal(torch.cat([part[step][0] for part in parts]), images)
        assert torch.equal(torch.cat([part[step][1] for part in parts]), labels)
    other = next(iter(train_batches(split, 6, seed=5, epoch=3)))
    assert not torch.equal(other[0], whole[0][0])


@pytest.mark.parametrize("ranks", [1, 2, 5, 30])
def test_evaluation_sees_each_image_once(ranks):
    split = split_of(23)
    seen = [x for rank in range(ranks) for x, _ in eval_batches(split, 4, rank, ranks)]
    assert torch.cat(seen)[:, 0, 0, 0].tolist() == list(range(23))


def test_reading_errors_reach_the_caller():
    split = split_of(8)
    split.images = None
    with pytest.raises(TypeError):
        list(train_batches(split, 4, seed=0, epoch=0))


def test_balanced_subset():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 3)
    chosen = balanced_subset(labels, 8)
    assert labels[chosen].bincount().tolist() == [3, 3, 2]
    assert torch.equal(chosen, balanced_subset(labels, 8))
    assert not torch.equal(chosen, balanced_subset(labels, 8, seed=1))
    with pytest.raises(ConfigError, match="asks for 4 images of class 2, which has 3"):
        balanced_subset(labels, 12)


def test_derived_seeds_differ():
    seeds = {derive_seed(seed, "step", step) for seed in range(30) for step in range(30)}
    assert len(seeds) == 900 and max(seeds) < 2**63


@pytest.mark.skipif(not os.environ.get("QK_DATA_DIR"), reason="QK_DATA_DIR is not set")
@pytest.mark.parametrize(("name", "train", "test"), [("mnist", 60_000, 10_000), ("cifar10", 50_000, 10_000)])
def test_real_data(name, train, test):
    try:
        data = load_data(DataConfig(name))
    except DataError as error:
        if "is missing" in str(error):
            pytest.skip(f"QK_DATA_DIR has no {name}")
        raise
    assert (len(data.train.labels), len(data.test.labels)) == (train, test)
    inputs, _ = data.train.eval_batch(torch.arange(2000))
    assert abs(inputs.mean().item()) < 0.1 and abs(inputs.std().item() - 1) < 0.1

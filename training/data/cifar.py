"""CIFAR-10 and CIFAR-100 from the official python batches."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import torch

from training.config import DataConfig
from training.data import safe_pickle
from training.data.sources import DataError, data_root, find
from training.data.splits import Data, ImageTensors

ORIGIN = "https://www.cs.toronto.edu/~kriz/cifar.html (the python version, unpacked into the data folder)"


def read_batch(path: Path, label_key: bytes, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(uint8 [n, 3, 32, 32], int64 [n]) of one official batch file. Raises DataError for a damaged one."""
    try:
        batch = safe_pickle.loads(path.read_bytes())
        images, labels = np.asarray(batch[b"data"]), np.asarray(batch[label_key], dtype=np.int64)
    except (OSError, pickle.UnpicklingError, KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"{path} cannot be read as a CIFAR batch: {error}; get it from {ORIGIN}") from error
    fits = images.dtype == np.uint8 and images.shape == (len(labels), 3072) and len(labels) > 0
    if not fits or labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(
            f"{path} is damaged: images {images.dtype} {list(images.shape)}, {labels.size} labels; "
            f"expected uint8 [n, 3072] and n labels from 0 to {num_classes - 1}; get it from {ORIGIN}"
        )
    return torch.from_numpy(images.reshape(-1, 3, 32, 32).copy()), torch.from_numpy(labels)


def _load(config: DataConfig, folder: str, train: list[str], test: str, key: bytes, num_classes: int) -> Data:
    root = data_root(config.root)
    mean, std = ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])
    if num_classes == 100:
        mean, std = ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762])

    def split(names: list[str], augment: bool) -> ImageTensors:
        paths = [find(root, [folder, "."], [name], ORIGIN) for name in names]
        parts = [read_batch(path, key, num_classes) for path in paths]
        images, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        return ImageTensors(images, labels, mean, std, pad=4 if augment else 0, flip=augment)

    return Data(split(train, config.augment), split([test], False), num_classes, channels=3)


def load_cifar10(config: DataConfig) -> Data:
    """50,000 training and 10,000 test images of 32x32; augmentation: pad by 4, random crop, mirror."""
    train = [f"data_batch_{i}" for i in range(1, 6)]
    return _load(config, "cifar-10-batches-py", train, "test_batch", b"labels", 10)


def load_cifar100(config: DataConfig) -> Data:
    """As `load_cifar10`, with the 100 fine labels."""
    return _load(config, "cifar-100-python", ["train"], "test", b"fine_labels", 100)

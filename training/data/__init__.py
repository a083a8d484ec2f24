"""Data sets by name, each as a training and a test split that give batches of normalised tensors."""

from __future__ import annotations

from collections.abc import Callable

from training.config import DataConfig, choose
from training.data.cifar import load_cifar10, load_cifar100
from training.data.digits import load_digits
from training.data.folder import load_folder
from training.data.mnist import load_mnist
from training.data.splits import Data, balanced_subset
from training.data.synthetic_video import load_synthetic_cifar_clips, load_synthetic_digit_clips
from training.data.video import load_video

DATASETS: dict[str, Callable[[DataConfig], Data]] = {
    "digits": load_digits,
    "mnist": load_mnist,
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "folder": load_folder,
    "video": load_video,
    "synthetic_digit_clips": load_synthetic_digit_clips,
    "synthetic_cifar_clips": load_synthetic_cifar_clips,
}


def load_data(config: DataConfig) -> Data:
    """The data set of a recipe's ``[data]`` table, its training split cut to `subset` where that is given.

    Raises `training.config.ConfigError` for what the table asks, `training.data.sources.DataError` for files
    that are missing or damaged.
    """
    data = DATASETS[choose(config.name, DATASETS, "data.name")](config)
    if config.subset:
        data.train.keep(balanced_subset(data.train.labels, config.subset))
    return data

"""scikit-learn's digits: 1797 images of 8x8, the data that need no download."""

from __future__ import annotations

import torch

from training.config import DataConfig
from training.data.splits import Data, ImageTensors, balanced_subset

TEST_IMAGES = 360


def load_digits(config: DataConfig) -> Data:
    """1437 training and 360 test images (a fixed choice, the classes balanced), never augmented."""
    from sklearn.datasets import load_digits as load

    source = load()
    images = torch.from_numpy(source.images).to(torch.uint8)[:, None]  # the values are 0..16
    labels = torch.from_numpy(source.target).long()
    test = balanced_subset(labels, TEST_IMAGES)
    is_train = torch.ones(len(labels), dtype=torch.bool)
    is_train[test] = False

    def split(chosen: torch.Tensor) -> ImageTensors:
        return ImageTensors(images[chosen], labels[chosen], mean=[0.305], std=[0.376], full_scale=16.0)

    return Data(split(is_train), split(test), num_classes=10, channels=1)

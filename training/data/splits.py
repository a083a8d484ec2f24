"""Splits of a data set: images in memory, normalised and augmented a batch at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from training.config import ConfigError

Batch = tuple[torch.Tensor, torch.Tensor]


class Split(Protocol):
    """Images with labels, read in batches."""

    labels: torch.Tensor  # int64 [N]

    def keep(self, indices: torch.Tensor) -> None:
        """Drop all images but these (int64 [n])."""

    def train_batch(self, indices: torch.Tensor, seed: int, part: slice) -> Batch:
        """(float32 [n, C, H, W], int64 [n]) of indices[part], augmented.

        The random choices are those of the whole batch `indices` under `seed`, whichever part is asked for:
        the processes that share a batch see what one process would.
        """

    def eval_batch(self, indices: torch.Tensor) -> Batch:
        """(float32 [n, C, H, W], int64 [n]) of `indices`, not augmented."""


@dataclass
class Data:
    """A data set."""

    train: Split
    test: Split
    num_classes: int
    channels: int


@dataclass
class ImageTensors:
    """A split in memory."""

    images: torch.Tensor  # uint8 [N, C, H, W]
    labels: torch.Tensor  # int64 [N]
    mean: list[float]  # of each channel, of values in [0, 1]
    std: list[float]
    full_scale: float = 255.0  # the stored value that means 1
    pad: int = 0  # augmentation: crop at a random place after that many zero pixels on each side
    flip: bool = False  # augmentation: mirror every second image

    def keep(self, indices: torch.Tensor) -> None:
        """Drop all images but these (int64 [n])."""
        self.images, self.labels = self.images[indices], self.labels[indices]

    def train_batch(self, indices: torch.Tensor, seed: int, part: slice) -> Batch:
        """See `Split.train_batch`."""
        images = self.images[indices[part]]
        if self.pad or self.flip:
            generator = torch.Generator().manual_seed(seed)
            n = len(indices)
            shift = torch.randint(0, 2 * self.pad + 1, (2, n), generator=generator)[:, part]
            mirror = torch.randint(0, 2, (n,), generator=generator)[part].bool() & self.flip
            images = shift_and_flip(images, self.pad, shift[0], shift[1], mirror)
        return self._normalise(images), self.labels[indices[part]]

    def eval_batch(self, indices: torch.Tensor) -> Batch:
        """See `Split.eval_batch`."""
        return self._normalise(self.images[indices]), self.labels[indices]

    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        mean = torch.tensor(self.mean).view(-1, 1, 1)
        std = torch.tensor(self.std).view(-1, 1, 1)
        return (images.float() / self.full_scale - mean) / std


def shift_and_flip(
    images: torch.Tensor, pad: int, top: torch.Tensor, left: torch.Tensor, mirror: torch.Tensor
) -> torch.Tensor:
    """Pad by `pad` zeros, crop each image at (top, left), mirror it left to right where `mirror`.

    images [N, C, H, W] of any dtype; top, left int64 [N] in 0..2 pad; mirror bool [N]. One gather in all.
    """
    n, channels, height, width = images.shape
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    column = torch.arange(width).expand(n, width)
    column = torch.where(mirror[:, None], width - 1 - column, column) + left[:, None]
    row = torch.arange(height) + top[:, None]
    image = torch.arange(n).view(n, 1, 1, 1)
    channel = torch.arange(channels).view(1, channels, 1, 1)
    return padded[image, channel, row[:, None, :, None], column[:, None, None, :]]


def balanced_subset(labels: torch.Tensor, n: int, seed: int = 0) -> torch.Tensor:
    """Indices int64 [n], rising: a random choice, the classes as equal in number as `n` allows.

    labels int64 [N]. The choice depends on `seed` alone. Raises ConfigError where a class has too few.
    """
    generator = torch.Generator().manual_seed(seed)
    classes = labels.unique().tolist()
    chosen = []
    for i, label in enumerate(classes):
        members = (labels == label).nonzero().flatten()
        share = n // len(classes) + (i < n % len(classes))
        if share > len(members):
            raise ConfigError(f"data.subset = {n} asks for {share} images of class {label}, which has {len(members)}")
        chosen.append(members[torch.randperm(len(members), generator=generator)[:share]])
    return torch.cat(chosen).sort().values

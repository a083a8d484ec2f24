"""Folders of images, one folder a class, below train/ and val/ (the usual layout of ImageNet)."""

from __future__ import annotations

import math
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from training.config import DataConfig
from training.data.sources import DataError, data_root, find
from training.data.splits import Batch, Data

ORIGIN = "https://www.image-net.org/download.php, or lay out your own as train/CLASS/*.jpg, val/CLASS/*.jpg"
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"}
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def random_resized_box(width: int, height: int, chance: random.Random) -> tuple[int, int, int, int]:
    """A box (left, top, right, bottom) of 8 % to 100 % of the area, aspect ratio 3/4 to 4/3."""
    for _ in range(10):
        area = width * height * chance.uniform(0.08, 1.0)
        ratio = math.exp(chance.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = chance.randint(0, width - w), chance.randint(0, height - h)
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def center_box(width: int, height: int) -> tuple[int, int, int, int]:
    """The central square whose side is 224/256 of the shorter side: resize to 256, then crop 224."""
    side = max(1, round(min(width, height) * 224 / 256))
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def open_image(path: Path) -> Image.Image:
    """The image as RGB. Raises DataError where it cannot be read."""
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}; replace it, or take it out") from error


def cut_out(image: Image.Image, size: int, box: tuple[int, int, int, int], mirror: bool) -> torch.Tensor:
    """uint8 [3, size, size]: the part of the image in `box`, mirrored left to right if asked for."""
    part = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    pixels = torch.from_numpy(np.array(part)).permute(2, 0, 1)
    return pixels.flip(2) if mirror else pixels


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 3, H, W] -> float32, by ImageNet's mean and deviation."""
    return (pixels.float() / 255 - MEAN) / STD


class ImageFolder:
    """A split on disk, decoded by `workers` threads; what a batch holds does not depend on their number."""

    def __init__(self, paths: list[Path], labels: torch.Tensor, size: int, augment: bool, workers: int) -> None:
        self.paths = paths
        self.labels = labels
        self.size = size
        self.augment = augment
        self.workers = workers

    def keep(self, indices: torch.Tensor) -> None:
        """Drop all images but these (int64 [n])."""
        self.paths, self.labels = [self.paths[i] for i in indices.tolist()], self.labels[indices]

    def train_batch(self, indices: torch.Tensor, seed: int, part: slice) -> Batch:
        """See `training.data.splits.Split.train_batch`."""
        seeds: list[str | None] = [None] * len(indices)
        if self.augment:
            seeds = [f"{seed}-{position}" for position in range(len(indices))]
        return self._batch(indices[part], seeds[part])

    def eval_batch(self, indices: torch.Tensor) -> Batch:
        """See `training.data.splits.Split.eval_batch`."""
        return self._batch(indices, [None] * len(indices))

    def _batch(self, indices: torch.Tensor, seeds: list[str | None]) -> Batch:
        paths = [self.paths[i] for i in indices.tolist()]
        with ThreadPoolExecutor(self.workers) as pool:
            images = torch.stack(list(pool.map(self._read, paths, seeds)))
        return normalise(images), self.labels[indices]

    def _read(self, path: Path, seed: str | None) -> torch.Tensor:
        image = open_image(path)
        if seed is None:
            return cut_out(image, self.size, center_box(*image.size), mirror=False)
        chance = random.Random(seed)
        box = random_resized_box(*image.size, chance)
        return cut_out(image, self.size, box, mirror=chance.random() < 0.5)


def load_folder(config: DataConfig) -> Data:
    """train/ and val/ below the root; images come out as squares of data.image_size."""
    root = data_root(config.root)
    train, val = (find(root, [".", "imagenet"], [name], ORIGIN) for name in ("train", "val"))
    classes = sorted(folder.name for folder in train.iterdir() if folder.is_dir())
    if not classes:
        raise DataError(f"{train} has no folders, one is expected for each class")

    def split(folder: Path, augment: bool) -> ImageFolder:
        other = sorted({entry.name for entry in folder.iterdir() if entry.is_dir()} - set(classes))
        if other:
            raise DataError(f"{folder / other[0]} is a class that {train} does not have")
        paths, labels = [], []
        for label, name in enumerate(classes):
            found = sorted(p for p in (folder / name).glob("*") if p.suffix.lower() in SUFFIXES)
            paths += found
            labels += [label] * len(found)
        if not paths:
            raise DataError(f"{folder} has no images ({', '.join(sorted(SUFFIXES))}) in class folders")
        return ImageFolder(paths, torch.tensor(labels), config.image_size, augment, config.workers)

    return Data(split(train, config.augment), split(val, False), len(classes), channels=3)

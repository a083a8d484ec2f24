"""Folders of images, one folder a class, below train/ and val/ (the usual layout of ImageNet)."""

from __future__ import annotations

import math
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance

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


def square_side(width: int, height: int) -> int:
    """224/256 of the shorter side: what resizing that to 256 and cropping 224 leaves."""
    return max(1, round(min(width, height) * 224 / 256))


def random_square(width: int, height: int, chance: random.Random) -> tuple[int, int, int, int]:
    """A square of `square_side` anywhere in the image."""
    side = square_side(width, height)
    left, top = chance.randint(0, width - side), chance.randint(0, height - side)
    return left, top, left + side, top + side


def center_box(width: int, height: int) -> tuple[int, int, int, int]:
    """The central square of `square_side`."""
    side = square_side(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def open_image(path: Path) -> Image.Image:
    """The image as RGB. Raises DataError where it cannot be read."""
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}; replace it, or take it out") from error


@dataclass(frozen=True)
class View:
    """What a network is shown of an image, or of all frames of a clip."""

    box: tuple[int, int, int, int]  # left, top, right, bottom
    mirror: bool = False
    colors: tuple[tuple[str, float], ...] = ()  # names in `COLORS` and factors, in the order of their use

    def of(self, image: Image.Image, size: int) -> torch.Tensor:
        """uint8 [3, size, size]."""
        part = image.resize((size, size), Image.Resampling.BILINEAR, box=self.box)
        for name, factor in self.colors:
            part = COLORS[name](part).enhance(factor)
        pixels = torch.from_numpy(np.array(part)).permute(2, 0, 1)
        return pixels.flip(2) if self.mirror else pixels


COLORS = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "color": ImageEnhance.Color}


@dataclass(frozen=True)
class Augmentation:
    """How views are drawn in training: a crop, a mirror, and with `color` c > 0 factors in [1 - c, 1 + c].

    crop "area": 8 to 100 % of the area at an aspect ratio of 3/4 to 4/3 (Szegedy et al., 2015); "side": a square of
    224/256 of the shorter side, anywhere. The colours are brightness, contrast and saturation, in random order
    (Howard, 2013).
    """

    crop: str = "area"
    color: float = 0.0

    def draw(self, width: int, height: int, chance: random.Random) -> View:
        """A view of an image of this size."""
        box = (random_resized_box if self.crop == "area" else random_square)(width, height, chance)
        mirror = chance.random() < 0.5
        if not self.color:
            return View(box, mirror)
        names = chance.sample(list(COLORS), len(COLORS))
        return View(box, mirror, tuple((name, 1 + chance.uniform(-self.color, self.color)) for name in names))


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 3, H, W] -> float32, by ImageNet's mean and deviation."""
    return (pixels.float() / 255 - MEAN) / STD


class ImageFolder:
    """A split on disk, decoded by `workers` threads; what a batch holds does not depend on their number."""

    def __init__(
        self, paths: list[Path], labels: torch.Tensor, size: int, augment: Augmentation | None, workers: int
    ) -> None:
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
        if seed is None or self.augment is None:
            return View(center_box(*image.size)).of(image, self.size)
        return self.augment.draw(*image.size, random.Random(seed)).of(image, self.size)


def augmentation(config: DataConfig) -> Augmentation | None:
    """What a recipe asks for."""
    return Augmentation(config.crop, config.color) if config.augment else None


def load_folder(config: DataConfig) -> Data:
    """train/ and val/ below the root; images come out as squares of data.image_size."""
    root = data_root(config.root)
    train, val = (find(root, [".", "imagenet"], [name], ORIGIN) for name in ("train", "val"))
    classes = sorted(folder.name for folder in train.iterdir() if folder.is_dir())
    if not classes:
        raise DataError(f"{train} has no folders, one is expected for each class")

    def split(folder: Path, augment: Augmentation | None) -> ImageFolder:
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

    return Data(split(train, augmentation(config)), split(val, None), len(classes), channels=3)

"""SYNTHETIC videos: real images (scikit-learn's digits, or CIFAR-10) that move over noise. For tests and small recipes.

A clip shows one image, whose class is its label, on a straight path that bounces off the edges, over noise that changes
from frame to frame. Nobody recorded these videos: accuracies on them say that a training works, and no more.

    python -m training.data.synthetic_video FOLDER     # digits as folders of frames, with annotation lists
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from PIL import Image

from training.config import ConfigError, DataConfig
from training.data.cifar import load_cifar10
from training.data.clips import pick_frames
from training.data.digits import load_digits
from training.data.loader import derive_seed
from training.data.splits import Batch, Data, ImageTensors

FRAMES = 12  # of a clip
NOISE = 64  # the background's values are below this, the image's go up to 255
SPEED = 2.0  # pixels a frame, at most, in each direction


def bounce(position: float, room: int) -> int:
    """A place on a line folded back into [0, room], as by mirrors at both ends."""
    return round(room - abs(abs(position) % (2 * room) - room))


class SyntheticClips:
    """A split whose frames are drawn when they are asked for: each a function of (seed, clip, frame)."""

    def __init__(self, source: ImageTensors, side: int, segments: int, seed: int) -> None:
        self.images = (source.images.float() * (255 / source.full_scale)).to(torch.uint8)  # [N, C, h, w]
        self.labels = source.labels  # int64 [N]
        self.names = torch.arange(len(self.labels))  # what a clip's path and noise come from, also after `keep`
        self.side, self.segments, self.seed = side, segments, seed

    def keep(self, indices: torch.Tensor) -> None:
        """Drop all clips but these (int64 [n])."""
        self.images, self.labels, self.names = self.images[indices], self.labels[indices], self.names[indices]

    def frames(self, clip: int, picked: list[int]) -> torch.Tensor:
        """uint8 [T, C, side, side]: the frames `picked` of a clip."""
        image, name = self.images[clip], self.names[clip].item()
        path = random.Random(f"{self.seed}-{name}")
        room = [self.side - size for size in image.shape[1:]]
        start = [path.uniform(0, limit) for limit in room]
        velocity = [path.uniform(-SPEED, SPEED) for _ in room]
        drawn = []
        for frame in picked:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, name, frame))
            shape = (len(image), self.side, self.side)
            pixels = torch.randint(NOISE, shape, generator=generator, dtype=torch.uint8)
            places = zip(start, velocity, room, strict=True)
            top, left = (bounce(at + frame * step, limit) for at, step, limit in places)
            area = pixels[:, top : top + image.shape[1], left : left + image.shape[2]]
            area.copy_(torch.maximum(area, image))
            drawn.append(pixels)
        return torch.stack(drawn)

    def train_batch(self, indices: torch.Tensor, seed: int, part: slice) -> Batch:
        """(float32 [n, T, C, H, W], int64 [n]), a random frame of each segment."""
        chance = random.Random(seed)
        picked = [pick_frames(FRAMES, self.segments, chance) for _ in range(len(indices))]
        return self._batch(indices[part], picked[part])

    def eval_batch(self, indices: torch.Tensor) -> Batch:
        """(float32 [n, T, C, H, W], int64 [n]), the centre of each segment."""
        return self._batch(indices, [pick_frames(FRAMES, self.segments, None)] * len(indices))

    def _batch(self, indices: torch.Tensor, picked: list[list[int]]) -> Batch:
        clips = torch.stack([self.frames(*clip) for clip in zip(indices.tolist(), picked, strict=True)])
        return (clips.float() / 255 - 0.2) / 0.25, self.labels[indices]


def _load(config: DataConfig, source: Data, side: int) -> Data:
    if config.segments > FRAMES:
        raise ConfigError(
            f"data.segments must be at most {FRAMES}, the frames of a synthetic clip, got {config.segments}"
        )
    assert isinstance(source.train, ImageTensors) and isinstance(source.test, ImageTensors)
    train = SyntheticClips(source.train, side, config.segments, seed=0)
    test = SyntheticClips(source.test, side, config.segments, seed=1)
    return Data(train, test, source.num_classes, source.channels)


def load_synthetic_digit_clips(config: DataConfig) -> Data:
    """SYNTHETIC: 1437 training and 360 test clips of 12 frames of 16x16 with a digit of 8x8; the same each time."""
    return _load(config, load_digits(config), side=16)


def load_synthetic_cifar_clips(config: DataConfig) -> Data:
    """SYNTHETIC: 50,000 training and 10,000 test clips of 12 frames of 48x48 with an image of CIFAR-10."""
    return _load(config, load_cifar10(config), side=48)


def write_frames(data: Data, folder: Path, train: int, test: int) -> None:
    """The first clips as folders of PNG frames, with the lists train.txt and val.txt (see `training.data.video`)."""
    for name, split, n in (("train", data.train, train), ("val", data.test, test)):
        assert isinstance(split, SyntheticClips)
        lines = []
        for i, label in enumerate(split.labels[:n].tolist()):
            where = folder / "clips" / f"{name}-{i:05}"
            where.mkdir(parents=True)
            for frame, pixels in enumerate(split.frames(i, list(range(FRAMES))).expand(-1, 3, -1, -1)):
                Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(where / f"{frame:05}.png")
            lines.append(f"{where.relative_to(folder).as_posix()} {FRAMES} {label}\n")
        (folder / f"{name}.txt").write_text("".join(lines))


def main(arguments: list[str] | None = None) -> None:
    """Write digit clips below a folder."""
    parser = argparse.ArgumentParser(prog="python -m training.data.synthetic_video", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=500, help="number of training clips")
    parser.add_argument("--test", type=int, default=100, help="number of test clips")
    options = parser.parse_args(arguments)
    write_frames(
        load_synthetic_digit_clips(DataConfig("digits", segments=1)), options.folder, options.train, options.test
    )


if __name__ == "__main__":
    main()

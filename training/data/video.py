"""Videos as folders of frames, with annotation lists as ActivityNet and Mini-Kinetics are usually laid out.

    ROOT/train.txt, ROOT/val.txt          the lists: a line a clip (data.train_list, data.test_list name others)
    ROOT/<path of a clip>/*.jpg           its frames, in the order of their names

A line is the clip's folder, its number of frames, its label: "clips/abseiling/xyz 250 0" (Mini-Kinetics), or with
commas and maybe further labels, of which the first one counts: "v_QOlSCBRmfWY,117,23" (ActivityNet).
"""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from training.config import DataConfig
from training.data.clips import pick_frames
from training.data.folder import SUFFIXES, Augmentation, View, augmentation, center_box, normalise, open_image
from training.data.sources import DataError, data_root
from training.data.splits import Batch, Data

LAYOUT = 'one line a clip: its folder, number of frames and label, such as "clips/jump/0001 120 3"'


@dataclass(frozen=True)
class Clip:
    """A line of an annotation list."""

    folder: Path
    frames: int
    label: int


def read_annotations(path: Path, root: Path) -> list[Clip]:
    """The clips of a list. Raises DataError for a missing or empty list, or a line that cannot be read."""
    if not path.is_file():
        raise DataError(f"the annotation list {path} is missing; write it, {LAYOUT}, or name it in the recipe's [data]")
    clips = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        fields = line.strip().split(",") if "," in line else line.strip().rsplit(maxsplit=2)
        try:
            name, frames, label = fields[0], int(fields[1]), int(fields[2])
        except (IndexError, ValueError):
            frames = label = -1
        if frames < 0 or label < 0:
            raise DataError(f"{path}, line {number}: {line.strip()!r} cannot be read; expected is {LAYOUT}")
        clips.append(Clip(root / name, frames, label))
    if not clips:
        raise DataError(f"the annotation list {path} is empty; expected is {LAYOUT}")
    return clips


def frame_names(folder: Path) -> list[str]:
    """The names of a clip's frames, in order."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if os.path.splitext(entry.name)[1].lower() in SUFFIXES)


def check_clip(clip: Clip, segments: int, source: Path) -> None:
    """Raise DataError where a clip has too few frames for `segments`, or fewer than its line in `source` says."""
    if clip.frames < segments:
        raise DataError(
            f"{clip.folder} has {clip.frames} frames, data.segments = {segments} needs as many: "
            f"lower data.segments, or take the clip out of {source}"
        )
    try:
        found = len(frame_names(clip.folder))
    except OSError as error:
        raise DataError(
            f"{clip.folder}, a clip of {source}, cannot be read: {error.strerror}; "
            f"extract its frames, or take it out of the list"
        ) from error
    if found < clip.frames:
        raise DataError(
            f"{clip.folder} has {found} images ({', '.join(sorted(SUFFIXES))}), {source} says {clip.frames} frames: "
            f"extract its frames again, or correct the list"
        )


class VideoFolder:
    """A split on disk: clips of `segments` frames, decoded by `workers` threads whose number changes no pixel."""

    def __init__(self, clips: list[Clip], segments: int, size: int, augment: Augmentation | None, workers: int) -> None:
        self.clips = clips
        self.labels = torch.tensor([clip.label for clip in clips])
        self.segments, self.size, self.augment, self.workers = segments, size, augment, workers

    def keep(self, indices: torch.Tensor) -> None:
        """Drop all clips but these (int64 [n])."""
        self.clips, self.labels = [self.clips[i] for i in indices.tolist()], self.labels[indices]

    def train_batch(self, indices: torch.Tensor, seed: int, part: slice) -> Batch:
        """(float32 [n, T, 3, H, W], int64 [n]): random frames; with `augment` a view of the clip."""
        chances = [random.Random(f"{seed}-{position}") for position in range(len(indices))]
        return self._batch(indices[part], list(chances[part]))

    def eval_batch(self, indices: torch.Tensor) -> Batch:
        """(float32 [n, T, 3, H, W], int64 [n]): the centre of each segment, and of each frame."""
        return self._batch(indices, [None] * len(indices))

    def _batch(self, indices: torch.Tensor, chances: list[random.Random] | list[None]) -> Batch:
        clips = [self.clips[i] for i in indices.tolist()]
        with ThreadPoolExecutor(self.workers) as pool:
            frames = torch.stack(list(pool.map(self._read, clips, chances)))
        return normalise(frames), self.labels[indices]

    def _read(self, clip: Clip, chance: random.Random | None) -> torch.Tensor:
        names = frame_names(clip.folder)
        picked = pick_frames(clip.frames, self.segments, chance)
        images = [open_image(clip.folder / names[i]) for i in picked]
        if chance is None or self.augment is None:
            view = View(center_box(*images[0].size))
        else:
            view = self.augment.draw(*images[0].size, chance)
        return torch.stack([view.of(image, self.size) for image in images])


def load_video(config: DataConfig) -> Data:
    """Clips of data.segments frames of data.image_size; every clip's folder is looked at before anything trains.

    Raises DataError, naming the clip and what to do.
    """
    root = data_root(config.root)
    lists = {name: root / name for name in (config.train_list, config.test_list)}
    found = {name: read_annotations(path, root) for name, path in lists.items()}
    num_classes = 1 + max(clip.label for clip in found[config.train_list])
    for name, clips in found.items():
        with ThreadPoolExecutor(config.workers) as pool:
            list(pool.map(lambda clip, source=lists[name]: check_clip(clip, config.segments, source), clips))
    unknown = next((clip for clip in found[config.test_list] if clip.label >= num_classes), None)
    if unknown is not None:
        raise DataError(
            f"{unknown.folder} has label {unknown.label} in {lists[config.test_list]}, but the labels of "
            f"{lists[config.train_list]} end at {num_classes - 1}"
        )

    def split(name: str, augment: Augmentation | None) -> VideoFolder:
        return VideoFolder(found[name], config.segments, config.image_size, augment, config.workers)

    train, test = split(config.train_list, augmentation(config)), split(config.test_list, None)
    return Data(train, test, num_classes, channels=3)

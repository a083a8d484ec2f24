"""Clips: which frames of a video a network sees."""

from __future__ import annotations

import random


def pick_frames(frames: int, segments: int, chance: random.Random | None) -> list[int]:
    """`segments` rising indices below `frames`: one of each of that many segments, equal in length but for rounding.

    At a random place in its segment, or at the centre where `chance` is None (Wang et al., "Temporal Segment
    Networks", 2016). `frames` must be at least `segments`.
    """
    picked = []
    for segment in range(segments):
        start, end = segment * frames // segments, (segment + 1) * frames // segments
        picked.append((start + end) // 2 if chance is None else chance.randrange(start, end))
    return picked

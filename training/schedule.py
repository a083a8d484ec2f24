"""Learning rate as a function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import bisect
import math

from training.config import ScheduleConfig


def lr_factor(schedule: ScheduleConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """What the learning rates are multiplied by at `step`, counted from 0 over the whole training."""
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.name == "multistep":
        return schedule.gamma ** bisect.bisect_right(schedule.milestones, step // steps_per_epoch)
    progress = (step - warmup) / max(1, steps_per_epoch * epochs - warmup)
    if schedule.name == "cosine":
        return schedule.final_factor + (1 - schedule.final_factor) * (1 + math.cos(math.pi * progress)) / 2
    if schedule.name == "linear":
        return schedule.final_factor + (1 - schedule.final_factor) * (1 - progress)
    return 1.0

"""What a figure should be, and whether it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.compare import OURS


@dataclass(frozen=True)
class Faster:
    """At least ``factor`` times as fast as ``rival``."""

    rival: str
    factor: float

    @property
    def text(self) -> str:
        """The goal in words."""
        return f"≥ {self.factor:g} x {self.rival}"

    def judge(self, entry: Mapping[str, Any], limits: Mapping[str, float]) -> tuple[float, bool] | None:
        """The figure and whether it meets the goal; None if the rival was not measured."""
        seconds = entry["seconds"]
        if self.rival not in seconds:
            return None
        value = seconds[self.rival] / seconds[OURS]
        return value, value >= self.factor


@dataclass(frozen=True)
class Within:
    """At most ``factor`` times the time of ``rival``."""

    rival: str
    factor: float

    @property
    def text(self) -> str:
        """The goal in words."""
        return f"≤ {self.factor:g} x time of {self.rival}"

    def judge(self, entry: Mapping[str, Any], limits: Mapping[str, float]) -> tuple[float, bool] | None:
        """The figure and whether it meets the goal; None if the rival was not measured."""
        seconds = entry["seconds"]
        if self.rival not in seconds:
            return None
        value = seconds[OURS] / seconds[self.rival]
        return value, value <= self.factor


@dataclass(frozen=True)
class OfPeak:
    """At least ``factor`` of the peak of the unit that the workload's operations are counted in."""

    factor: float

    @property
    def text(self) -> str:
        """The goal in words."""
        return f"≥ {100 * self.factor:g} % of peak"

    def judge(self, entry: Mapping[str, Any], limits: Mapping[str, float]) -> tuple[float, bool] | None:
        """The figure and whether it meets the goal; None if the peak was not measured."""
        if "limit_seconds" not in entry:
            return None
        percent = 100 * entry["limit_seconds"] / entry["seconds"][OURS]
        return percent, percent >= 100 * self.factor


@dataclass(frozen=True)
class PerCore:
    """At least ``tera`` * 10^12 operations (two a multiply-add of codes) a second and core."""

    tera: float

    @property
    def text(self) -> str:
        """The goal in words."""
        return f"≥ {self.tera:g} TOPS a core"

    def judge(self, entry: Mapping[str, Any], limits: Mapping[str, float]) -> tuple[float, bool]:
        """The figure and whether it meets the goal."""
        value = entry["operations"] / entry["seconds"][OURS] / limits["threads"] / 1e12
        return value, value >= self.tera


@dataclass(frozen=True)
class AtMost:
    """At most ``seconds``."""

    seconds: float

    @property
    def text(self) -> str:
        """The goal in words."""
        return f"≤ {1e6 * self.seconds:g} us"

    def judge(self, entry: Mapping[str, Any], limits: Mapping[str, float]) -> tuple[float, bool]:
        """The figure, in microseconds, and whether it meets the goal."""
        seconds = entry["seconds"][OURS]
        return 1e6 * seconds, seconds <= self.seconds


Goal = Faster | Within | OfPeak | PerCore | AtMost


def judged(goals: Sequence[Goal], entry: Mapping[str, Any], limits: Mapping[str, float]) -> list[dict[str, Any]]:
    """What is kept of the goals of an entry: words, figure, and whether it is met; those whose rival was not measured
    are left out."""
    results = [(goal, goal.judge(entry, limits)) for goal in goals]
    return [{"goal": goal.text, "value": figure(r[0]), "met": r[1]} for goal, r in results if r is not None]


def figure(value: float) -> float:
    """Four digits: more would be noise. Counts stay as they are."""
    return value if isinstance(value, int) else float(f"{value:.4g}")

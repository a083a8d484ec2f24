"""What a figure should be, and whether it is."""

from __future__ import annotations

from collections.abc import Mapping
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

    def judge(self, entry: Mapping[str, Any], limits: Mapping[str, float]) -> tuple[float, bool]:
        """The figure and whether it meets the goal."""
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


Goal = Faster | Within | OfPeak | PerCore

"""What the benchmarks of a GPU share: the clock, and a run with its time and its file.

Device time by events, the caches flushed before each call, inputs rotating among several sets of random values;
medians. A call is queued behind other work, so the time of launching it is not in it; ``host_seconds`` is that time.
"""

from __future__ import annotations

import argparse
import json
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from time import monotonic, perf_counter
from typing import Any

import torch

from benchmarks.goals import figure

SETS = 3  # of inputs, in turn
QUEUED_CYCLES = 400_000  # that the device waits while a small call is queued: some 0.2 ms
ROUNDS = 21

Run = Callable[[], Any]


class Clock:
    """Times calls on a device."""

    def __init__(self, device: str, quick: bool) -> None:
        self.device, self.rounds = device, 3 if quick else ROUNDS
        cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
        self.flushed = torch.empty(max(1 << 16, 4 * cache), dtype=torch.uint8, device=device)

    def seconds(self, runs: Sequence[Run]) -> tuple[float, float]:
        """Median seconds of a call on the device, and on the host until it returns; one run after the other."""
        for run in runs:
            run()
        return self._on_gpu(runs) if self.device == "cuda" else self._on_cpu(runs)

    def _on_cpu(self, runs: Sequence[Run]) -> tuple[float, float]:
        times = []
        for i in range(self.rounds):
            begin = perf_counter()
            runs[i % len(runs)]()
            times.append(perf_counter() - begin)
        return median(times), median(times)

    def _on_gpu(self, runs: Sequence[Run]) -> tuple[float, float]:
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(self.rounds)
        ]
        host = []
        torch.cuda.synchronize()
        for i, (begin, end) in enumerate(events):
            self.flushed.random_(0, 255)
            torch.cuda._sleep(QUEUED_CYCLES)
            begin.record()
            start = perf_counter()
            runs[i % len(runs)]()
            host.append(perf_counter() - start)
            end.record()
            if i % 4 == 3:
                torch.cuda.synchronize()  # or the queue would fill, and the host would wait inside a call
        torch.cuda.synchronize()
        return median(begin.elapsed_time(end) for begin, end in events) / 1e3, median(host)


def kernels(run: Run, device: str) -> list[tuple[str, float]] | None:
    """The kernels that a call launches, each with its microseconds."""
    if device != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [(e.name, e.time_range.elapsed_us()) for e in events]


def draw(seed: int, device: str) -> torch.Generator:
    """Where a set's random values come from."""
    return torch.Generator(device).manual_seed(seed)


class Record(ABC):
    """One run: its results so far, the limits they are judged by, and the time that is left."""

    def __init__(self, out: Path, seconds: float, quick: bool) -> None:
        self.out, self.quick, self.end = out, quick, monotonic() + seconds
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.clock = Clock(self.device, quick)
        self.limits: dict[str, float] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self.left_out: list[str] = []

    @abstractmethod
    def go(self) -> None:
        """Measure everything, what is worth most first."""

    @abstractmethod
    def lines(self) -> Iterator[str]:
        """What was found, as a table."""

    def facts(self) -> Mapping[str, Any]:
        """What else the file holds."""
        return {}

    def goals(self) -> list[dict[str, Any]]:
        """All that were judged, and what of."""
        return [{"of": name, **goal} for name, entry in self.results.items() for goal in entry.get("goals", [])]

    def goal_lines(self) -> Iterator[str]:
        """A line each."""
        for goal in self.goals():
            verdict = "met" if goal["met"] else "NOT MET"
            yield f"goal: {goal['of']}: {goal['goal']}: {goal['value']:.4g}, {verdict}"

    @property
    def passed(self) -> bool:
        """Whether every result that was looked at is right."""
        return not any("wrong" in entry for entry in self.results.values())

    def has_time(self, name: str) -> bool:
        """Whether another measurement may begin; the file says which ones did not."""
        if monotonic() <= self.end:
            return True
        self.left_out.append(f"{name}: no time left")
        return False

    def attempt(self, name: str, work: Callable[[], None]) -> None:
        """Whatever goes wrong is kept in the results, and the rest is measured all the same."""
        if not self.has_time(name):
            return
        try:
            work()
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            self.left_out.append(f"{name}: not enough memory")
        except Exception as error:
            traceback.print_exc()
            self.results.setdefault(name, {})["wrong"] = f"{type(error).__name__}: {error}"[:400]
        finally:
            self.save()

    def measured(self, name: str, runs: Sequence[Run]) -> tuple[float, float] | None:
        """Seconds on the device and on the host; None where no time was left, or memory."""
        if not self.has_time(name):
            return None
        try:
            return self.clock.seconds(runs)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            self.left_out.append(f"{name}: not enough memory")
            return None

    def timed(self, name: str, runs: Sequence[Run]) -> float | None:
        """Seconds on the device; None where no time was left, or memory."""
        found = self.measured(name, runs)
        return None if found is None else found[0]

    def save(self) -> None:
        """Write what there is, whole or not at all: a run that is cut short loses nothing."""
        limits = {name: figure(value) for name, value in self.limits.items()}
        found = {"device": self.device, "limits": limits, "goals": self.goals(), **self.facts()}
        found |= {"results": self.results, "left_out": self.left_out}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.out.with_suffix(".tmp")
        temporary.write_text(json.dumps(found, indent=1) + "\n")
        temporary.replace(self.out)


def main(kind: type[Record], description: str | None) -> None:
    """Measure, write the file, print the table. Exit status 1 where a result was wrong."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=420.0, help="after which nothing is begun (default: 420)")
    parser.add_argument("--quick", action="store_true", help="tiny, without torch.compile; on the CPU if need be")
    options = parser.parse_args()
    run = kind(options.out, options.seconds, options.quick)
    run.go()
    run.save()
    print("\n".join([*run.lines(), *(f"left out: {what}" for what in run.left_out)]))
    raise SystemExit(0 if run.passed else 1)

"""One op and its rivals, measured in turns, so that what disturbs the machine disturbs them alike."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from statistics import median, quantiles
from time import perf_counter
from typing import Any

OURS = "quantkernels"
SLOW = 0.02  # seconds: from here on, caches warmed by untimed calls make no difference
SETTLING = 0.005  # seconds of untimed calls before a shorter one, but no more than
MOST_SETTLING = 4  # calls: what is left of another contestant's data in the last cache is gone by then
MOST_ROUNDS = 200


@dataclass
class Times:
    """Seconds of each call of one contestant."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """The middle one."""
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """The interquartile range, as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = quantiles(self.seconds, n=4)
        return (high - low) / self.median


def compare(benchmark: Any, contestants: Mapping[str, Callable[[], Any]], budget: float) -> dict[str, Times]:
    """Time `OURS` with pytest-benchmark's fixture, and before each of its rounds the others, in rotating order.

    Every timed call of less than 20 ms follows untimed ones of its own (:func:`settling`), so each finds the caches and
    the allocator as it leaves them. Results are dropped inside the timed call: each call allocates its outputs anew, as
    eager code does. budget: seconds for all together, warm-up and compilation apart; a contestant gets its even share,
    but at least three calls.
    """
    costs = {name: warm_up(run) for name, run in contestants.items()}
    share = budget / len(contestants)
    turns = {name: turns_within(share, cost) for name, cost in costs.items()}
    rounds = turns[OURS]
    rivals = [name for name in contestants if name != OURS]
    times = {name: Times([]) for name in contestants}
    done = 0

    def run_rivals() -> None:
        nonlocal done
        for i in range(len(rivals)):
            name = rivals[(i + done) % len(rivals)]
            every = max(1, rounds // turns[name])
            if done % every == 0:
                times[name].seconds.append(timed(contestants[name], costs[name]))
        for _ in range(settling(costs[OURS])):
            contestants[OURS]()
        done += 1

    def ours() -> None:
        contestants[OURS]()

    with no_collection():
        benchmark.pedantic(ours, setup=run_rivals, rounds=rounds)
    if benchmark.stats is not None:  # None under --benchmark-disable
        times[OURS] = Times(list(benchmark.stats.stats.data))
    return times


def warm_up(run: Callable[[], Any]) -> float:
    """Seconds of a call: the least of a few, for one may meet a disturbance. Compiles what it must."""
    run()
    costs = [timed(run, SLOW)]
    while len(costs) < 5 and sum(costs) < 0.2:
        costs.append(timed(run, SLOW))
    return min(costs)


def turns_within(seconds: float, cost: float) -> int:
    """How many turns to take: what fits, but no fewer than give a median."""
    turn = cost * (1 + settling(cost))
    return round(min(MOST_ROUNDS, max(3 if cost > 0.3 else 5, seconds / turn)))


def settling(cost: float) -> int:
    """How many untimed calls come before a timed one."""
    return 0 if cost >= SLOW else min(MOST_SETTLING, ceil(SETTLING / max(cost, 1e-9)))


def timed(run: Callable[[], Any], cost: float) -> float:
    """Seconds of one call, after untimed ones if calls are short."""
    for _ in range(settling(cost)):
        run()
    start = perf_counter()
    run()
    return perf_counter() - start


@contextmanager
def no_collection() -> Iterator[None]:
    """Without the garbage collector: what its pauses hit is chance."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()

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
MOST_SETTLING = 6  # calls: what is left of another contestant's data in the last cache is gone by then
BLOCK = 0.01  # seconds of timed calls in a row, but no more than
MOST_IN_A_ROW = 10
MOST_CALLS = 400


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
    """Time `OURS` with pytest-benchmark's fixture, and between its blocks a block of each other, in rotating order.

    A block is a few calls in a row (:func:`block`), as a training loop makes them, after untimed ones
    (:func:`settling`): each contestant finds the caches and the allocator as it leaves them. Results are dropped inside
    the timed call, so each call allocates its outputs anew, as eager code does. budget: seconds for all together,
    warm-up and compilation apart; a contestant gets its even share, but at least three blocks.
    """
    costs = {name: warm_up(run) for name, run in contestants.items()}
    share = budget / len(contestants)
    turns = {name: turns_within(share, cost) for name, cost in costs.items()}
    rivals = [name for name in contestants if name != OURS]
    times = {name: Times([]) for name in contestants}
    in_a_row, done = block(costs[OURS]), 0

    def setup() -> None:
        nonlocal done
        turn, within = divmod(done, in_a_row)
        done += 1
        if within:
            return
        for i in range(len(rivals)):
            name = rivals[(i + turn) % len(rivals)]
            if turn % max(1, turns[OURS] // turns[name]) == 0:
                times[name].seconds += timed_block(contestants[name], costs[name])
        for _ in range(settling(costs[OURS])):
            contestants[OURS]()

    def ours() -> None:
        contestants[OURS]()

    with no_collection():
        benchmark.pedantic(ours, setup=setup, rounds=turns[OURS] * in_a_row)
    if benchmark.stats is not None:  # None under --benchmark-disable
        times[OURS] = Times(list(benchmark.stats.stats.data))
    return times


def warm_up(run: Callable[[], Any]) -> float:
    """Seconds of a call: the least of a few, for one may meet a disturbance. Compiles what it must."""
    run()
    costs = [timed(run)]
    while len(costs) < 5 and sum(costs) < 0.2:
        costs.append(timed(run))
    return min(costs)


def turns_within(seconds: float, cost: float) -> int:
    """How many blocks to take: what fits, but no fewer than give a median."""
    turn = cost * (block(cost) + settling(cost))
    return round(min(MOST_CALLS / block(cost), max(3 if cost > 0.3 else 5, seconds / turn)))


def settling(cost: float) -> int:
    """How many untimed calls come before a block."""
    return 0 if cost >= SLOW else min(MOST_SETTLING, ceil(SETTLING / max(cost, 1e-9)))


def block(cost: float) -> int:
    """How many timed calls follow one another."""
    return max(1, min(MOST_IN_A_ROW, round(BLOCK / max(cost, 1e-9))))


def timed_block(run: Callable[[], Any], cost: float) -> list[float]:
    """Seconds of each call of a block, after untimed ones if calls are short."""
    for _ in range(settling(cost)):
        run()
    return [timed(run) for _ in range(block(cost))]


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
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

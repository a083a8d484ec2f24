"""What this machine can do at most, measured: multiply-adds, population counts, reading and copying.

``python -m benchmarks.limits`` prints the figures that every run of the benchmarks keeps beside its results.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from quantkernels._lib import _host  # type: ignore[attr-defined]

Run = Callable[[int], tuple[float, float, float]]
"""Thread number -> (begin, end, operations) on one monotonic clock."""

LINE = 64
UNITS = {"fp32": "GFLOPS", "int8": "GOPS", "popcount": "GOPS", "lookup": "GOPS"}
MEMORY_BYTES = 1 << 29  # source and destination together: far beyond the last-level cache of a shared server
SHORTEST = 0.02  # seconds: a run much longer than starting a thread takes


def measure(threads: int = 2, quick: bool = False) -> dict[str, float]:
    """The limits of ``threads`` cores together, by name.

    Keys: ``fp32_gflops``, ``int8_gops`` (two operations a multiply-add), ``popcount_gops`` (AND and count: two a bit),
    ``lookup_gops`` (sums of four codes found in tables: two a code), ``read_l2_gbs``, ``copy_l2_gbs``,
    ``read_memory_gbs``, ``copy_memory_gbs`` (gigabytes a second, of bytes read and written together; copying to memory
    is the better of writing through the caches and around them). Medians of repeats after a warm-up. ``quick``: good
    for trying the code and not for judging by.
    """
    repeats = 2 if quick else 7
    found = {f"{unit}_{label.lower()}": peak(unit, threads, repeats) for unit, label in UNITS.items()}
    l2_bytes = level2_bytes() // 2
    memory_bytes = (1 << 22 if quick else MEMORY_BYTES) // threads
    for level, size in (("l2", l2_bytes), ("memory", memory_bytes)):
        found[f"read_{level}_gbs"], found[f"copy_{level}_gbs"] = bandwidths(size, threads, repeats)
    return found


def peak(unit: str, threads: int, repeats: int = 7) -> float:
    """10^9 operations a second of ``unit`` ("fp32", "int8", "popcount" or "lookup") on ``threads`` cores."""
    rounds = calibrate(lambda count: _host.peak(unit, count))
    return rate(lambda _: _host.peak(unit, rounds), threads, repeats)


def bandwidths(size: int, threads: int, repeats: int = 7) -> tuple[float, float]:
    """10^9 bytes a second of reading and of copying where each thread works on ``size`` bytes of its own."""
    half = size // 2 // LINE * LINE
    sources = [aligned(half) for _ in range(threads)]
    targets = [aligned(half) for _ in range(threads)]
    count = calibrate(lambda n: _host.copy_stream(targets[0], sources[0], n, False))
    reading = rate(lambda t: _host.read_stream(sources[t], count), threads, repeats)
    copying = [
        rate(lambda t, bypass=bypass: _host.copy_stream(targets[t], sources[t], count, bypass), threads, repeats)
        for bypass in (False, True)
    ]
    return reading, max(copying)


def aligned(size: int) -> np.ndarray:
    """``size`` touched bytes that begin at a cache line."""
    buffer = np.ones(size + LINE, np.uint8)
    start = -buffer.ctypes.data % LINE
    return buffer[start : start + size]


def calibrate(run: Callable[[int], tuple[float, float, float]]) -> int:
    """The number of rounds that take a single thread at least `SHORTEST` seconds."""
    count = 1
    while True:
        begin, end, _ = run(count)
        if end - begin >= SHORTEST:
            return count
        count = max(2 * count, int(count * SHORTEST / max(end - begin, 1e-7)))


def rate(run: Run, threads: int, repeats: int) -> float:
    """Median over repeats of 10^9 operations a second, all threads from the first one's begin to the last one's end."""
    once(run, threads)
    rates = []
    for _ in range(repeats):
        results = once(run, threads)
        span = max(end for _, end, _ in results) - min(begin for begin, _, _ in results)
        rates.append(sum(operations for *_, operations in results) / span / 1e9)
    return median(rates)


def once(run: Run, threads: int) -> list[tuple[float, float, float]]:
    """Run it on all threads together, from one barrier, each on a core of its own."""
    results: list[tuple[float, float, float]] = []
    barrier = threading.Barrier(threads)
    cores = sorted(os.sched_getaffinity(0))

    def work(index: int) -> None:
        os.sched_setaffinity(0, {cores[index % len(cores)]})  # 0: this thread alone
        barrier.wait()
        results.append(run(index))

    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return results


def level2_bytes() -> int:
    """Size of one core's level-2 cache; 512 KiB where the system does not tell."""
    path = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
    if path.exists():
        return int(path.read_text().strip().removesuffix("K")) * 1024
    return 512 * 1024


def main() -> None:
    """Print the limits of one core and of all."""
    cores = len(os.sched_getaffinity(0))
    one, all_cores = measure(1), measure(cores)
    print(f"{_host.cpu_isa()}{'1 core':>28}{f'{cores} cores':>12}")
    for name, value in all_cores.items():
        print(f"{name:<22}{one[name]:>12.1f}{value:>12.1f}")


if __name__ == "__main__":
    main()

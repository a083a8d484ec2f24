"""What a GPU's tensor cores do at most through mma.sync, on bytes and on bits: csrc/cuda/peaks.cuh, called by name."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.device import Clock, Run, draw
from quantkernels._library import LIBRARIES

THREADS = 256  # of a block (kPeakThreads)
FRAGMENTS = (2, 4)  # of 16 rows and of 8 columns (kPeakRows, kPeakColumns), which all meet
WORDS = 4 * FRAGMENTS[0] + 2 * FRAGMENTS[1]  # of operands a lane
BLOCKS = 2  # a multiprocessor
SHORTEST = 2e-3  # seconds of a call that is timed: about as long as a large product


@cache
def library(device: str) -> ctypes.CDLL | None:
    """The kernels for a device, or the emulator's for the CPU; None where they were not built."""
    path = LIBRARIES / f"quantkernels_{'cuda' if device == 'cuda' else 'emu'}.so"
    return ctypes.CDLL(str(path)) if path.exists() else None


def operands(device: str, seed: int = 0) -> Tensor:
    """int32 [WORDS, 32 lanes] of random bits."""
    generator = draw(seed, device)
    return torch.randint(-(2**31), 2**31, (WORDS, 32), generator=generator, device=device).to(torch.int32)


def launch(bits: bool, words: Tensor, rounds: int, blocks: int) -> tuple[float, Tensor]:
    """The operations that were put on the stream, and int32 [blocks, THREADS] of their sums.

    Raises RuntimeError where the kernel was not built or could not be launched.
    """
    device = words.device.type
    found = library(device)
    if found is None:
        raise RuntimeError(f"there is no library with the peaks for {device}")
    call = found.qk_mma_peak
    call.restype = ctypes.c_double
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    call.argtypes = [ctypes.c_bool, pointer, number, number, pointer, pointer]
    stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else None
    sums = torch.empty(blocks, THREADS, dtype=torch.int32, device=device)
    operations = call(bits, words.data_ptr(), rounds, blocks, sums.data_ptr(), stream)
    if operations == 0:
        raise RuntimeError("the peak's kernel could not be launched")
    return operations, sums


def expected_sum(bits: bool, words: Tensor) -> int:
    """What the sums of a warp add up to after one round, modulo 2^32.

    All rows meet all columns, so it is the product of the sum of the rows with the sum of the columns. Lane 4 g + t
    holds parts t and t + 4 of its rows and columns (csrc/cuda/ptx/mma.cuh).
    """
    unit, count = (1, 32) if bits else (8, 4)
    shifts = torch.arange(count) * unit
    elements = words.cpu().long()[..., None] >> shifts & (1 << unit) - 1  # [word, lane, element of a word]
    by_part = elements.unflatten(1, (8, 4)).sum(1)  # [word, t, element]
    rows = by_part[: 4 * FRAGMENTS[0]].unflatten(0, (FRAGMENTS[0], 2, 2)).sum((0, 2))  # [low or high part, t, element]
    columns = by_part[4 * FRAGMENTS[0] :].unflatten(0, (FRAGMENTS[1], 2)).sum(0)
    return int((rows * columns).sum()) % 2**32


def peak(bits: bool, clock: Clock, multiprocessors: int) -> float:
    """Operations a second, two a multiply-add. Raises RuntimeError where the sums are wrong."""
    blocks = BLOCKS * multiprocessors
    words = operands(clock.device)
    _, sums = launch(bits, words, 1, blocks)
    warps = sums.cpu().long().reshape(-1, 32).sum(1) % 2**32
    if not bool((warps == expected_sum(bits, words)).all()):
        raise RuntimeError("the sums of the peak's products are wrong")

    def timed(rounds: int) -> tuple[float, float]:
        operations, _ = launch(bits, words, rounds, blocks)
        run: Run = lambda: launch(bits, words, rounds, blocks)  # noqa: E731
        return operations, clock.seconds([run])[0]

    return calibrated(timed)


def calibrated(timed: Callable[[int], tuple[float, float]], shortest: float = SHORTEST) -> float:
    """The rate of a call long enough. timed: rounds -> operations, seconds."""
    rounds = 1
    while True:
        operations, seconds = timed(rounds)
        if seconds >= shortest:
            return operations / seconds
        rounds = max(2 * rounds, int(1.1 * rounds * shortest / max(seconds, 1e-7)))


def measure(clock: Clock, architecture: int, multiprocessors: int) -> dict[str, Any]:
    """``int8_mma_tops`` and, where the bit product is an instruction (up to 9.0), ``bit_mma_tops``."""
    if library(clock.device) is None:
        return {}
    found = {"int8_mma_tops": peak(False, clock, multiprocessors) / 1e12}
    if architecture <= 90:
        found["bit_mma_tops"] = peak(True, clock, multiprocessors) / 1e12
    return found

"""The emulator itself: planted bugs (planted.cu) must be caught, and the same kernels without them must run."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PLANTED = next(iter(sorted(ROOT.glob("build/*/emu_planted"))), None)
SEEDS = range(4)

pytestmark = pytest.mark.skipif(PLANTED is None, reason="the emulator is not built (QK_EMU=1)")


def run(kernel: str, seed: int = 0) -> str:
    environment = {**os.environ, "QK_EMU_SEED": str(seed)}
    done = subprocess.run([PLANTED, kernel], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def result(kernel: str, seed: int = 0) -> str:
    """The last line of the output."""
    return run(kernel, seed).splitlines()[-1]


def scramble(i: np.ndarray) -> np.ndarray:
    """The registers of planted.cu."""
    return ((i.astype(np.uint64) + 1) * 2654435761 % 2**32).astype(np.uint32)


@functools.cache
def mma(bits: bool) -> list[int]:
    """What each thread makes of its four sums, by numpy's product of the matrices that PTX's manual lays out."""
    result = []
    for warp in range(3):
        thread = np.arange(32) + 32 * warp
        a, b = (scramble(10 * thread[:, None] + np.arange(first, last)) for first, last in ((0, 4), (4, 6)))
        parts = np.zeros((16, 8), np.uint32), np.zeros((8, 8), np.uint32)  # [row of A, column of B][part]
        for lane in range(32):
            g, t = divmod(lane, 4)
            for r in range(4):
                parts[0][g + 8 * (r % 2), t + 4 * (r // 2)] = a[lane, r]
            for r in range(2):
                parts[1][g, t + 4 * r] = b[lane, r]
        left, right = (p.view(np.uint8).reshape(len(p), -1) for p in parts)
        if bits:
            left, right = (np.unpackbits(m, axis=1) for m in (left, right))
        product = left.astype(np.int64) @ right.astype(np.int64).T
        for lane in range(32):
            g, t = divmod(lane, 4)
            sums = [product[g + 8 * (r // 2), 2 * t + r % 2] + int(thread[lane]) + r for r in range(4)]
            result.append(int(np.dot(sums, (1, 3, 5, 7))))
    return result


@functools.cache
def byte_instructions() -> list[int]:
    """dp4a and byte_perm, byte by byte."""
    result = []
    for t in range(96):
        a, b, selector = (int(scramble(np.array(t + start))) for start in (0, 1000, 2000))
        pool = (a | b << 32).to_bytes(8, "little")
        dot = 17 + sum(x * y for x, y in zip(pool[:4], pool[4:], strict=True))
        chosen = bytes(pool[selector >> 4 * i & 7] for i in range(4))
        result.append((dot ^ int.from_bytes(chosen, "little")) >> 8)
    return result


# Sum over the 96 threads of (thread + 1) * result, worked out by hand from what the kernel should compute.
LANES = range(96)
RIGHT = {
    "neighbour": lambda t: (t + 1) % 96,
    "static_shared": lambda t: 1,
    "dynamic_shared": lambda t: 1,
    "copy_async": lambda t: t,
    "warp_sum": lambda t: sum(range(t // 32 * 32, t // 32 * 32 + 32)),
    "mma_bytes": lambda t: mma(bits=False)[t],
    "mma_bits": lambda t: mma(bits=True)[t],
    "byte_instructions": lambda t: byte_instructions()[t],
    "copy_or_zero": lambda t: t if t % 3 else 0,
    "votes": lambda t: 32 + max(t % 32 - 1, 0) if t % 32 < 8 else 2,
}


@pytest.mark.parametrize("kernel", RIGHT)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_right_kernel_gives_the_right_result(kernel: str, seed: int) -> None:
    expected = sum((t + 1) * RIGHT[kernel](t) for t in LANES)
    assert result(kernel, seed) == f"result: {expected}"


def test_atomics_count_every_thread_of_every_block() -> None:
    assert run("count") == "result: 192"


CAUGHT = {
    "barrier_in_a_branch": "divergent barrier: thread (64, 0, 0) waits at planted.cu:",
    "barrier_after_exit": "divergent barrier: thread (70, 0, 0) has exited",
    "static_shared_out_of_bounds": "index 96 out of bounds of an array, at planted.cu:",
    "dynamic_shared_out_of_bounds": "a write outside its dynamic shared memory of 384 bytes",
    "wrong_shuffle_mask": "warp collective by a lane that its mask leaves out",
    "ballot_in_a_branch": "warp collective with a mask that names lane",
    "mma_in_a_branch": "warp collective with a mask that names lane 5",
    "shuffle_from_outside_the_mask": "shuffle: lane 8 reads a lane that the mask leaves out",
}


@pytest.mark.parametrize("kernel", CAUGHT)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_planted_bug_is_named(kernel: str, seed: int) -> None:
    output = run(kernel, seed)
    assert output.startswith("error: planted::"), output
    assert "block (" in output
    assert CAUGHT[kernel] in output


def test_a_missing_barrier_changes_the_result_with_the_seed() -> None:
    results = {run("missing_barrier", seed) for seed in range(8)}
    assert run("neighbour") not in results
    assert len(results) == 8


def test_a_missing_wait_reads_poison() -> None:
    """cp.async brings its bytes when they are waited for; before, shared memory is 0xff throughout: -1."""
    assert run("missing_copy_wait") == f"result: {-sum(t + 1 for t in LANES)}"


@pytest.mark.parametrize(("kernel", "ways"), [("stride_1", 1), ("stride_4", 4)])
def test_bank_conflicts_are_counted(kernel: str, ways: int) -> None:
    """Two blocks of three warps: six instructions, each of so many passes over the banks."""
    place, *numbers = run(kernel).splitlines()[0].split()
    assert place.startswith("planted.cu:")
    assert [int(n) for n in numbers] == [6, 6 * ways, 6 * (ways - 1)]


def test_shared_memory_that_nobody_wrote_reads_poison() -> None:
    assert run("uninitialised_shared") == f"result: {-sum(t + 1 for t in LANES if t % 2)}"

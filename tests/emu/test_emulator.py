"""The emulator itself: planted bugs (planted.cu) must be caught, and the same kernels without them must run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLANTED = next(iter(sorted(ROOT.glob("build/*/emu_planted"))), None)
SEEDS = range(4)

pytestmark = pytest.mark.skipif(PLANTED is None, reason="the emulator is not built (QK_EMU=1)")


def run(kernel: str, seed: int = 0) -> str:
    environment = {**os.environ, "QK_EMU_SEED": str(seed)}
    done = subprocess.run([PLANTED, kernel], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


# Sum over the 96 threads of (thread + 1) * result, worked out by hand from what the kernel should compute.
LANES = range(96)
RIGHT = {
    "neighbour": lambda t: (t + 1) % 96,
    "static_shared": lambda t: 1,
    "dynamic_shared": lambda t: 1,
    "copy_async": lambda t: t,
    "warp_sum": lambda t: sum(range(t // 32 * 32, t // 32 * 32 + 32)),
    "votes": lambda t: 32 + max(t % 32 - 1, 0) if t % 32 < 8 else 2,
}


@pytest.mark.parametrize("kernel", RIGHT)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_right_kernel_gives_the_right_result(kernel: str, seed: int) -> None:
    expected = sum((t + 1) * RIGHT[kernel](t) for t in LANES)
    assert run(kernel, seed) == f"result: {expected}"


def test_atomics_count_every_thread_of_every_block() -> None:
    assert run("count") == "result: 192"


CAUGHT = {
    "barrier_in_a_branch": "divergent barrier: thread (64, 0, 0) waits at planted.cu:",
    "barrier_after_exit": "divergent barrier: thread (70, 0, 0) has exited",
    "static_shared_out_of_bounds": "index 96 out of bounds of an array, at planted.cu:",
    "dynamic_shared_out_of_bounds": "a write outside its dynamic shared memory of 384 bytes",
    "wrong_shuffle_mask": "warp collective by a lane that its mask leaves out",
    "ballot_in_a_branch": "warp collective with a mask that names lane",
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


def test_shared_memory_that_nobody_wrote_reads_poison() -> None:
    assert run("uninitialised_shared") == f"result: {-sum(t + 1 for t in LANES if t % 2)}"

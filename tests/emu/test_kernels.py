"""The CUDA kernels on the emulator where their launches differ: how csrc/cuda/tile/walk.h cuts a tensor.

tests/ops holds every op against the reference on every backend; the shapes here are those that a launch treats apart:
runs that start inside a pack, a channel for a whole block, for a warp and for a few lanes, columns of repeated rows,
slices that are combined in a second stage, tensors whose first element is not on a 16-byte boundary.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkernels import reference
from quantkernels.testing import BACKENDS, assert_bit_equal

EMU = next(b for b in BACKENDS if b.name == "emu")
pytestmark = pytest.mark.skipif(EMU.missing is not None, reason=str(EMU.missing))

# shape, axis, and which walk it asks for
WALKS = {
    "one pack in part": ((5,), None),
    "whole tensor, many slices": ((70_001,), None),
    "long channels, slices": ((2, 3, 70, 71), 1),
    "a channel a block": ((3, 9_000), 0),
    "a channel a few lanes": ((300, 3, 3, 3), 0),
    "runs inside packs": ((4, 9, 5, 7), 1),
    "columns": ((64, 33), 1),
    "columns, slices": ((3_000, 5), 1),
    "columns of short runs": ((40, 12, 3), 1),
    "a single channel": ((50, 1, 3), 1),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=WALKS, ids=lambda name: name.replace(" ", "-"))
def walk(request: pytest.FixtureRequest) -> tuple[tuple[int, ...], int | None]:
    return WALKS[request.param]


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int, offset: int = 0) -> Tensor:
    """Normal values at `offset` elements behind an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    return torch.randn(offset + count, generator=generator).to(dtype)[offset:].view(shape)


def grid_of(channels: int, levels: int) -> Tensor:
    offset = -torch.linspace(0.7, 2.1, channels)
    return torch.stack((offset, -2 * offset / levels, torch.full_like(offset, 0.4)), 1)


def assert_sums(actual: Tensor, expected: Tensor, count: float) -> None:
    """Sums of `count` terms of magnitude about 1: far below what one lost or repeated term would change."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6 * count + 1e-6)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
def test_fake_quantize(walk: tuple[tuple[int, ...], int | None], dtype: torch.dtype, offset: int) -> None:
    shape, axis = walk
    channels = 1 if axis is None else shape[axis]
    x, grad = random_tensor(shape, dtype, 1, offset), random_tensor(shape, dtype, 2, offset)
    for kind, levels in ((0, 15), (1, 1), (2, 2)):
        arguments = x, grid_of(channels, levels), kind, levels
        assert_bit_equal(EMU.ops.fake_quantize(*arguments, 0, axis), reference.fake_quantize(*arguments, 0, axis))
        assert_bit_equal(EMU.ops.encode(*arguments, axis), reference.encode(*arguments, axis))
    (q, mask), expected = (run.fake_quantize_masked(x, grid_of(channels, 15), 15, axis) for run in (EMU.ops, reference))
    assert_bit_equal(q, expected[0])
    assert_bit_equal(mask, expected[1])
    assert_bit_equal(EMU.ops.apply_mask(grad, mask), reference.apply_mask(grad, mask))
    for ste in (0, 1, 2):
        arguments = grad, x, grid_of(channels, 15), 0, 15, ste, axis
        actual, expected = EMU.ops.fake_quantize_backward(*arguments), reference.fake_quantize_backward(*arguments)
        assert_bit_equal(actual[0], expected[0])
        assert_sums(actual[1], expected[1], x.numel() / channels)


def test_stats(walk: tuple[tuple[int, ...], int | None], dtype: torch.dtype) -> None:
    shape, axis = walk
    channels = 1 if axis is None else shape[axis]
    x = random_tensor(shape, dtype, 3)
    count = x.numel() / channels
    assert_sums(EMU.ops.channel_stats(x, axis), reference.channel_stats(x, axis), count)
    threshold = torch.linspace(0.1, 5.0, channels)
    assert_sums(EMU.ops.conditional_abs_mean(x, threshold, axis), reference.conditional_abs_mean(x, threshold, axis), 1)
    candidates = torch.linspace(0.5, 2.0, 11).repeat(channels, 1)  # two passes: eight candidates, and three
    assert_sums(EMU.ops.range_errors(x, candidates, 7, axis), reference.range_errors(x, candidates, 7, axis), count)


MIXTURES = {
    "one": ([0], [3], [1]),
    "uniform": ([0, 0, 0], [3, 15, 255], [0, 1, 2]),
    "mixed": ([0, 1, 2, 3], [7, 1, 2, 1], [2, 0, 0, 0]),
    "six": ([0, 3, 2, 1, 0, 0], [7, 1, 2, 1, 15, 31], [2, 0, 0, 0, 1, 0]),
}


@pytest.mark.parametrize("members", MIXTURES.values(), ids=MIXTURES)
def test_attention(walk: tuple[tuple[int, ...], int | None], members: tuple[list[int], ...]) -> None:
    shape, axis = walk
    channels = 1 if axis is None else shape[axis]
    x, grad = random_tensor(shape, torch.float16, 4), random_tensor(shape, torch.float16, 5)
    attention = torch.linspace(1.0, 2.0, len(members[0])).softmax(0)
    grids = torch.stack([grid_of(channels, levels) for levels in members[1]])
    arguments = x, attention, grids, *members, axis
    assert_bit_equal(EMU.ops.attention_quantize(*arguments), reference.attention_quantize(*arguments))
    actual = EMU.ops.attention_quantize_backward(grad, *arguments)
    expected = reference.attention_quantize_backward(grad, *arguments)
    assert_bit_equal(actual[0], expected[0])
    assert_sums(actual[1], expected[1], x.numel())
    assert_sums(actual[2], expected[2], x.numel() / channels)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 31), (2, 1000), (7, 257), (40, 640), (1, 20_000)])
@pytest.mark.parametrize(("kind", "levels"), [(0, 1), (0, 31), (0, 255), (1, 1), (2, 2)])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
def test_bitplanes(rows: int, columns: int, kind: int, levels: int, offset: int) -> None:
    x = random_tensor((rows, columns), DTYPES[(rows + levels) % 3], 6, offset)
    for axis, grid in ((None, grid_of(1, levels)), (0, grid_of(rows, levels))):
        codes = reference.encode(x, grid, kind, levels, axis)
        planes, sums = EMU.ops.quantize_pack(x, grid, kind, levels, axis)
        expected, expected_sums = reference.quantize_pack(x, grid, kind, levels, axis)
        assert_bit_equal(planes, expected)
        assert_bit_equal(sums, expected_sums)
        assert_bit_equal(EMU.ops.pack_bitplanes(codes, kind, levels), expected)
        assert_bit_equal(EMU.ops.unpack_bitplanes(expected, kind, columns), codes)


def test_nan_and_infinity_pass() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0]).repeat(500)
    grid = grid_of(1, 15)
    assert_bit_equal(EMU.ops.fake_quantize(x, grid, 0, 15, 0, None), reference.fake_quantize(x, grid, 0, 15, 0, None))
    assert_bit_equal(EMU.ops.encode(x, grid, 0, 15, None), reference.encode(x, grid, 0, 15, None))
    assert EMU.ops.channel_stats(x, None).isnan()[0, :2].all()


def test_a_sum_does_not_change_between_runs() -> None:
    x = random_tensor((70_001,), torch.float32, 7)
    first = EMU.ops.channel_stats(x, None)
    assert all(torch.equal(first, EMU.ops.channel_stats(x, None)) for _ in range(3))

"""Statistics in one pass: channel_stats, conditional_abs_mean, range_errors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._checks import MAX_QUANTIZERS, check, check_axis, check_float, check_quantizer, parameters
from ._tiles import (
    _LARGEST,
    EXACT,
    UNIFORM,
    clamp_code,
    dense,
    load_float,
    round_to_even,
    tile_of,
    tiles_of,
)
from .fake_quantize import store_sum


@triton.jit
def channel_stats_kernel(
    x,  # [outer, channels, inner]
    partial,  # [element_blocks, channels, 4]: min, max, sum |x|, sum x^2
    channels,
    elements,
    inner,
    ONE_RUN: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    ELEMENT_BLOCK: tl.constexpr,
):
    block, channel, place, inside = tile_of(channels, elements, inner, ONE_RUN, WIDE, CHANNEL_BLOCK, ELEMENT_BLOCK)
    value = load_float(x + place, inside)
    row = partial + (block.to(tl.int64) * channels + channel) * 4
    least = tl.min(tl.where(inside, value, float("inf")), axis=1, keep_dims=True)
    most = tl.max(tl.where(inside, value, float("-inf")), axis=1, keep_dims=True)
    tl.store(row, least, mask=channel < channels)
    tl.store(row + 1, most, mask=channel < channels)
    store_sum(row + 2, tl.abs(value), channel < channels)
    store_sum(row + 3, value * value, channel < channels)


@triton.jit
def conditional_abs_mean_kernel(
    x,  # [outer, channels, inner]
    threshold,  # [channels]
    partial,  # [element_blocks, channels, 2]: sum and number of the |x| above the threshold
    channels,
    elements,
    inner,
    ONE_RUN: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    ELEMENT_BLOCK: tl.constexpr,
):
    block, channel, place, inside = tile_of(channels, elements, inner, ONE_RUN, WIDE, CHANNEL_BLOCK, ELEMENT_BLOCK)
    magnitude = tl.abs(load_float(x + place, inside))
    chosen = inside & (magnitude > tl.load(threshold + channel, mask=channel < channels, other=0.0))
    row = partial + (block.to(tl.int64) * channels + channel) * 2
    store_sum(row, tl.where(chosen, magnitude, 0.0), channel < channels)
    store_sum(row + 1, chosen.to(tl.float32), channel < channels)


@triton.jit
def range_errors_kernel(
    x,  # [outer, channels, inner]
    candidates,  # [channels, COUNT]: a, for levels uniform on [-a, a]
    partial,  # [element_blocks, channels, COUNT]: sum of (q - x)^2
    channels,
    elements,
    inner,
    COUNT: tl.constexpr,
    LEVELS: tl.constexpr,
    ONE_RUN: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    ELEMENT_BLOCK: tl.constexpr,
):
    block, channel, place, inside = tile_of(channels, elements, inner, ONE_RUN, WIDE, CHANNEL_BLOCK, ELEMENT_BLOCK)
    value = load_float(x + place, inside)
    row = partial + (block.to(tl.int64) * channels + channel) * COUNT
    for j in range(COUNT):
        a = tl.load(candidates + channel * COUNT + j, mask=channel < channels, other=1.0)
        step = tl.div_rn(a + a, tl.full(a.shape, LEVELS, tl.float32))
        inverse = tl.div_rn(tl.full(a.shape, 1.0, tl.float32), step)
        inverse = tl.where((step > 0.0) & (inverse <= _LARGEST), inverse, 0.0)
        code = round_to_even(clamp_code((value + a) * inverse, LEVELS))
        error = (step * code - a) - value
        store_sum(row + j, tl.where(inside, error * error, 0.0), channel < channels)


def channel_stats(x: Tensor, axis: int | None) -> Tensor:
    """float32 [C, 4]: min, max, sum |x|, sum x^2. A NaN makes all four of its channel NaN; zeros without elements."""
    op = "channel_stats"
    check_float(op, "x", x)
    channels = check_axis(op, x, axis)
    x = dense(x)
    if x.numel() == 0:
        return x.new_zeros((channels, 4), dtype=torch.float32)
    tiles = tiles_of(x, axis)
    partial = tiles.partial(x, 4)
    channel_stats_kernel[tiles.launch](x, partial, **tiles.arguments, **EXACT)
    sums = partial[:, :, 2:].sum(0, dtype=torch.float64).float()
    extremes = torch.stack((partial[:, :, 0].amin(0), partial[:, :, 1].amax(0)), 1)
    # Minimum and maximum of a tile skip NaN, sum |x| is NaN exactly where there is one.
    extremes = torch.where(sums[:, :1].isnan(), sums[:, :1], extremes)
    return torch.cat((extremes, sums), 1)


def minmax_grids(x: Tensor, levels: Sequence[int], axis: int | None) -> Tensor:
    """float32 [K, C, 3]: (min, (max - min) / levels[k], 0) of each channel."""
    op = "minmax_grids"
    check(1 <= len(levels) <= MAX_QUANTIZERS, op, "levels", "of 1 to 8 widths", len(levels))
    check_float(op, "x", x)
    for n in levels:
        check_quantizer(op, UNIFORM.value, n)
    low, high = channel_stats(x, axis)[:, :2].unbind(1)
    widths = torch.tensor(levels, dtype=torch.float32, device=x.device)
    step = (high - low) / widths[:, None]
    return torch.stack((low.expand_as(step), step, torch.zeros_like(step)), 2)


def conditional_abs_mean(x: Tensor, threshold: Tensor, axis: int | None) -> Tensor:
    """float32 [C]: mean of |x| over |x| > threshold, 0 where there is none."""
    op = "conditional_abs_mean"
    check_float(op, "x", x)
    x = dense(x)
    threshold = parameters(op, "threshold", threshold, x, check_axis(op, x, axis))
    if x.numel() == 0:
        return torch.zeros_like(threshold)
    tiles = tiles_of(x, axis)
    partial = tiles.partial(x, 2)
    conditional_abs_mean_kernel[tiles.launch](x, threshold, partial, **tiles.arguments, **EXACT)
    total, count = partial.sum(0, dtype=torch.float64).unbind(1)
    return (total / count.clamp(min=1)).float()


def range_errors(x: Tensor, candidates: Tensor, levels: int, axis: int | None) -> Tensor:
    """float32 [C, J]: squared error of ``levels`` steps on [-a, a] for each candidate a."""
    op = "range_errors"
    check_float(op, "x", x)
    check(candidates.dim() == 2, op, "candidates", "of shape [channels, J]", list(candidates.shape))
    x = dense(x)
    count = candidates.shape[1]
    candidates = parameters(op, "candidates", candidates, x, check_axis(op, x, axis), count)
    check_quantizer(op, UNIFORM.value, levels)
    if x.numel() == 0 or count == 0:
        return torch.zeros_like(candidates)
    tiles = tiles_of(x, axis)
    partial = tiles.partial(x, count)
    range_errors_kernel[tiles.launch](x, candidates, partial, COUNT=count, LEVELS=levels, **tiles.arguments, **EXACT)
    return partial.sum(0, dtype=torch.float64).float()


OPS = {
    "channel_stats": channel_stats,
    "minmax_grids": minmax_grids,
    "conditional_abs_mean": conditional_abs_mean,
    "range_errors": range_errors,
}

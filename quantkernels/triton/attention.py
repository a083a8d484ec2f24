"""The attention-weighted mixture q = sum_k a_k Q_k(x) (DQA, equation 3): one pass forward, one backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._checks import MAX_QUANTIZERS, check, check_axis, check_float, check_like, check_quantizer, parameters
from ._tiles import (
    CLIP_STE,
    EXACT,
    FULL_STE,
    IDENTITY,
    UNIFORM,
    clamp_code,
    code_of,
    dense,
    in_layout_of,
    load_float,
    load_grid,
    round_to_even,
    store_rounded,
    tile_of,
    tiles_of,
)
from .fake_quantize import store_sum
from .stats import minmax_grids


@triton.jit
def attention_forward_kernel(
    x,  # [outer, channels, inner]
    attention,  # [COUNT]
    grids,  # [COUNT, channels, 3]
    out,  # like x
    channels,
    elements,
    inner,
    COUNT: tl.constexpr,
    KINDS: tl.constexpr,
    LEVELS: tl.constexpr,
    ONE_RUN: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    ELEMENT_BLOCK: tl.constexpr,
):
    """((sum_k a_k offset_k + (a_0 step_0) c_0) + (a_1 step_1) c_1) + ..., in the order of k."""
    _, channel, place, inside = tile_of(channels, elements, inner, ONE_RUN, WIDE, CHANNEL_BLOCK, ELEMENT_BLOCK)
    value = load_float(x + place, inside)
    base = tl.zeros([CHANNEL_BLOCK, 1], tl.float32)
    for k in tl.static_range(COUNT):
        if KINDS[k] != IDENTITY:
            offset = tl.load(grids + (k * channels + channel) * 3, mask=channel < channels, other=0.0)
            base = base + tl.load(attention + k) * offset
    q = tl.broadcast_to(base, [CHANNEL_BLOCK, ELEMENT_BLOCK])
    for k in tl.static_range(COUNT):
        a = tl.load(attention + k)
        if KINDS[k] == IDENTITY:
            q = q + a * value
        else:
            offset, step, inverse, threshold = load_grid(grids + k * channels * 3, channel, channels)
            q = q + (a * step) * code_of(value, offset, inverse, threshold, KINDS[k], LEVELS[k])
    store_rounded(out + place, q, inside)


@triton.jit
def attention_backward_kernel(
    grad,  # like x
    x,  # [outer, channels, inner]
    attention,  # [COUNT]
    grids,  # [COUNT, channels, 3]
    grad_x,  # like x, or None: the parts of grad_attention are all that is wanted
    partial,  # [element_blocks, channels, COUNT, 4]: below, above, inside, and the part of grad_attention
    channels,
    elements,
    inner,
    COUNT: tl.constexpr,
    KINDS: tl.constexpr,
    LEVELS: tl.constexpr,
    STES: tl.constexpr,
    ONE_RUN: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    ELEMENT_BLOCK: tl.constexpr,
):
    """grad_x = g * sum_k a_k mask_k; grad a_k = offset_k sum g + step_k sum g c_k (identity: sum g x)."""
    block, channel, place, inside = tile_of(channels, elements, inner, ONE_RUN, WIDE, CHANNEL_BLOCK, ELEMENT_BLOCK)
    g = load_float(grad + place, inside)
    value = load_float(x + place, inside)
    total = tl.sum(g, axis=1, keep_dims=True)
    slope = tl.zeros_like(g)
    first = partial + (block.to(tl.int64) * channels + channel) * (COUNT * 4)
    rows = channel < channels
    for k in tl.static_range(COUNT):
        a = tl.load(attention + k)
        row = first + k * 4
        if KINDS[k] == IDENTITY:
            slope = slope + a
            part = tl.sum(g * value, axis=1, keep_dims=True)
        else:
            offset, step, inverse, threshold = load_grid(grids + k * channels * 3, channel, channels)
            code = code_of(value, offset, inverse, threshold, KINDS[k], LEVELS[k])
            weighted = tl.sum(tl.where(inside, g * code, 0.0), axis=1, keep_dims=True)
            part = offset * total + step * weighted
        tl.store(row + 3, part, mask=rows)
        if grad_x is None:
            pass
        elif KINDS[k] == UNIFORM and STES[k] >= CLIP_STE:
            v = (value - offset) * inverse
            slope = slope + tl.where((v >= 0.0) & (v <= LEVELS[k]), a, 0.0)
            store_sum(row, tl.where(v < 0.0, g, 0.0), rows)
            store_sum(row + 1, tl.where(v >= LEVELS[k], g, 0.0), rows)
            if STES[k] == FULL_STE:
                clamped = clamp_code(v, LEVELS[k])
                store_sum(row + 2, tl.where(inside, g * (round_to_even(clamped) - clamped), 0.0), rows)
            else:
                tl.store(row + 2, tl.zeros_like(total), mask=rows)
        else:
            if KINDS[k] != IDENTITY:
                slope = slope + a
            tl.store(row, tl.zeros_like(total), mask=rows)
            tl.store(row + 1, tl.zeros_like(total), mask=rows)
            tl.store(row + 2, tl.zeros_like(total), mask=rows)
    if grad_x is not None:
        store_rounded(grad_x + place, g * slope, inside)


def _checked(
    op: str,
    x: Tensor,
    attention: Tensor,
    grids: Tensor,
    kinds: Sequence[int],
    levels: Sequence[int],
    stes: Sequence[int],
    axis: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_float(op, "x", x)
    count = len(kinds)
    check(1 <= count <= MAX_QUANTIZERS, op, "kinds", f"of 1 to {MAX_QUANTIZERS} quantizers", count)
    check(len(levels) == count, op, "levels", f"one for each of the {count} kinds", len(levels))
    check(len(stes) == count, op, "stes", f"one for each of the {count} kinds", len(stes))
    for kind, n, ste in zip(kinds, levels, stes, strict=True):
        check_quantizer(op, kind, n, ste, last=3, plural="s")
    x = dense(x)
    channels = check_axis(op, x, axis)
    attention = parameters(op, "attention", attention, x, count)
    return x, attention, parameters(op, "grids", grids, x, count, channels, 3)


def attention_quantize(
    x: Tensor,
    attention: Tensor,
    grids: Tensor,
    kinds: Sequence[int],
    levels: Sequence[int],
    stes: Sequence[int],
    axis: int | None,
    convex: bool = False,
    covered: bool = False,
) -> Tensor:
    """``quantkernels.ops.attention_quantize``."""
    op = "attention_quantize"
    x, attention, grids = _checked(op, x, attention, grids, kinds, levels, stes, axis)
    out = torch.empty_like(x)
    if x.numel() > 0:
        tiles = tiles_of(x, axis)
        attention_forward_kernel[tiles.launch](
            x,
            attention,
            grids,
            out,
            COUNT=len(kinds),
            KINDS=tuple(kinds),
            LEVELS=tuple(levels),
            **tiles.arguments,
            **EXACT,
        )
    return out


def attention_quantize_backward(
    grad: Tensor,
    x: Tensor,
    attention: Tensor,
    grids: Tensor,
    kinds: Sequence[int],
    levels: Sequence[int],
    stes: Sequence[int],
    axis: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_x like x, grad_attention float32 [K], sums float32 [K, C, 3]."""
    op = "attention_quantize_backward"
    check_like(op, "grad", grad, x)
    x, attention, grids = _checked(op, x, attention, grids, kinds, levels, stes, axis)
    if x.numel() == 0:
        return torch.empty_like(x), torch.zeros_like(attention), torch.zeros_like(grids)
    grad_x = torch.empty_like(x)
    sums = _sums(grad, x, attention, grids, grad_x, kinds, levels, stes, axis)
    return grad_x, sums[:, :, 3].sum(0).float(), sums[:, :, :3].transpose(0, 1).float().contiguous()


def minmax_attention_quantize(
    x: Tensor, attention: Tensor, levels: Sequence[int], axis: int | None
) -> tuple[Tensor, Tensor]:
    """The mixture of min-max quantizers of x itself, and their grids."""
    grids, zeros = minmax_grids(x, levels, axis), [0] * len(levels)
    return attention_quantize(x, attention, grids, zeros, levels, zeros, axis), grids


def attention_gradient(
    grad: Tensor,
    x: Tensor,
    attention: Tensor,
    grids: Tensor,
    kinds: Sequence[int],
    levels: Sequence[int],
    axis: int | None,
    covered: bool = False,
) -> Tensor:
    """``quantkernels.ops.attention_gradient``."""
    op, stes = "attention_gradient", [0] * len(kinds)
    check_like(op, "grad", grad, x)
    x, attention, grids = _checked(op, x, attention, grids, kinds, levels, stes, axis)
    if x.numel() == 0:
        return torch.zeros_like(attention)
    return _sums(grad, x, attention, grids, None, kinds, levels, stes, axis)[:, :, 3].sum(0).float()


def _sums(
    grad: Tensor,
    x: Tensor,
    attention: Tensor,
    grids: Tensor,
    grad_x: Tensor | None,
    kinds: Sequence[int],
    levels: Sequence[int],
    stes: Sequence[int],
    axis: int | None,
) -> Tensor:
    """float64 [C, K, 4]; writes grad_x, without which only column 3 is filled."""
    tiles = tiles_of(x, axis)
    partial = tiles.partial(x, len(kinds), 4)
    attention_backward_kernel[tiles.launch](
        in_layout_of(grad, x),
        x,
        attention,
        grids,
        grad_x,
        partial,
        COUNT=len(kinds),
        KINDS=tuple(kinds),
        LEVELS=tuple(levels),
        STES=tuple(stes),
        **tiles.arguments,
        **EXACT,
    )
    return partial.sum(0, dtype=torch.float64)


OPS = {
    "attention_quantize": attention_quantize,
    "attention_quantize_backward": attention_quantize_backward,
    "attention_gradient": attention_gradient,
    "minmax_attention_quantize": minmax_attention_quantize,
}

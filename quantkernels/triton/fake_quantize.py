"""fake_quantize and encode: q = offset + step * code(x), its straight-through gradient, and the codes alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._checks import check_axis, check_float, check_like, check_quantizer, parameters
from ._tiles import (
    EXACT,
    FULL_STE,
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


@triton.jit
def fake_quantize_forward_kernel(
    x,  # [outer, channels, inner]
    grid,  # [channels, 3]
    out,  # like x
    channels,
    elements,
    inner,
    KIND: tl.constexpr,
    LEVELS: tl.constexpr,
    CODES: tl.constexpr,
    ONE_RUN: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    ELEMENT_BLOCK: tl.constexpr,
):
    """out = offset + step * code(x), or with CODES the code itself, 0 for a NaN."""
    _, channel, place, inside = tile_of(channels, elements, inner, ONE_RUN, WIDE, CHANNEL_BLOCK, ELEMENT_BLOCK)
    offset, step, inverse, threshold = load_grid(grid, channel, channels)
    code = code_of(load_float(x + place, inside), offset, inverse, threshold, KIND, LEVELS)
    if CODES:
        tl.store(out + place, tl.where(code != code, 0.0, code).to(tl.uint8), mask=inside)
    else:
        store_rounded(out + place, offset + step * code, inside)


@triton.jit
def fake_quantize_backward_kernel(
    grad,  # like x
    x,  # [outer, channels, inner]
    grid,  # [channels, 3]
    grad_x,  # like x
    partial,  # [element_blocks, channels, 3]: below, above, inside
    channels,
    elements,
    inner,
    LEVELS: tl.constexpr,
    STE: tl.constexpr,
    SUMS: tl.constexpr,
    ONE_RUN: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    ELEMENT_BLOCK: tl.constexpr,
):
    """grad_x = g where 0 <= v <= levels, and where SUMS the sums of g below, of g above, of g * (code - v) inside."""
    block, channel, place, inside = tile_of(channels, elements, inner, ONE_RUN, WIDE, CHANNEL_BLOCK, ELEMENT_BLOCK)
    offset, _, inverse, _ = load_grid(grid, channel, channels)
    g = load_float(grad + place, inside)
    v = (load_float(x + place, inside) - offset) * inverse
    store_rounded(grad_x + place, tl.where((v >= 0.0) & (v <= LEVELS), g, 0.0), inside)
    if SUMS:
        row = partial + (block.to(tl.int64) * channels + channel) * 3
        store_sum(row, tl.where(v < 0.0, g, 0.0), channel < channels)
        store_sum(row + 1, tl.where(v >= LEVELS, g, 0.0), channel < channels)
        if STE == FULL_STE:
            # The clamped position is a whole number outside the range: the term vanishes there by itself.
            clamped = clamp_code(v, LEVELS)
            error = tl.where(inside, g * (round_to_even(clamped) - clamped), 0.0)
            store_sum(row + 2, error, channel < channels)
        else:
            store_sum(row + 2, tl.zeros_like(g), channel < channels)


@triton.jit
def store_sum(pointer, value, inside):
    """Sum the tile [CHANNEL_BLOCK, ELEMENT_BLOCK] along its elements, one number a channel."""
    tl.store(pointer, tl.sum(value, axis=1, keep_dims=True), mask=inside)


def quantize(op: str, x: Tensor, grid: Tensor, kind: int, levels: int, axis: int | None, dtype: torch.dtype) -> Tensor:
    """Launch the forward kernel: q in the dtype of x, or codes for ``torch.uint8``."""
    x = dense(x)
    grid = parameters(op, "grid", grid, x, check_axis(op, x, axis), 3)
    out = torch.empty_like(x, dtype=dtype)
    if x.numel() > 0:
        tiles = tiles_of(x, axis)
        fake_quantize_forward_kernel[tiles.launch](
            x, grid, out, KIND=kind, LEVELS=levels, CODES=dtype == torch.uint8, **tiles.arguments, **EXACT
        )
    return out


def fake_quantize(x: Tensor, grid: Tensor, kind: int, levels: int, ste: int, axis: int | None) -> Tensor:
    """``quantkernels.ops.fake_quantize``."""
    check_float("fake_quantize", "x", x)
    check_quantizer("fake_quantize", kind, levels, ste)
    return quantize("fake_quantize", x, grid, kind, levels, axis, x.dtype)


def fake_quantize_backward(
    grad: Tensor, x: Tensor, grid: Tensor, kind: int, levels: int, ste: int, axis: int | None, range_sums: bool = True
) -> tuple[Tensor, Tensor]:
    """grad_x like x, and float32 [C, 3]: the sums below, above and inside the range ([0, 3] unless range_sums)."""
    op = "fake_quantize_backward"
    check_float(op, "x", x)
    check_like(op, "grad", grad, x)
    check_quantizer(op, kind, levels, ste)
    x = dense(x)
    grad = in_layout_of(grad, x)
    grid = parameters(op, "grid", grid, x, check_axis(op, x, axis), 3)
    if ste == 0 or x.numel() == 0:
        return grad.clone(), torch.zeros_like(grid) if range_sums else grid.new_empty((0, 3))
    tiles = tiles_of(x, axis)
    grad_x = torch.empty_like(x)
    partial = tiles.partial(x, 3) if range_sums else grid.new_empty((0, 3))
    fake_quantize_backward_kernel[tiles.launch](
        grad, x, grid, grad_x, partial, LEVELS=levels, STE=ste, SUMS=range_sums, **tiles.arguments, **EXACT
    )
    return grad_x, partial.sum(0, dtype=torch.float64).float() if range_sums else partial


def encode(x: Tensor, grid: Tensor, kind: int, levels: int, axis: int | None) -> Tensor:
    """``quantkernels.ops.encode``: uint8 codes in the layout of x."""
    check_float("encode", "x", x)
    check_quantizer("encode", kind, levels)
    return quantize("encode", x, grid, kind, levels, axis, torch.uint8)


OPS = {
    "fake_quantize": fake_quantize,
    "fake_quantize_backward": fake_quantize_backward,
    "encode": encode,
}

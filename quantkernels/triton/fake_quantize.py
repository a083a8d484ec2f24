"""fake_quantize and encode: q = offset + step * code(x), its straight-through gradient, and the codes alone.

The masked form walks memory in its order, whatever the channels: 32 neighbours share a word of the mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._checks import check, check_axis, check_float, check_like, check_quantizer, parameters
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

_WORDS = 64  # of a mask, a program: 2048 elements, as a tile has


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
def words_of_program(numel, WIDE: tl.constexpr, WORDS: tl.constexpr):
    """This program's words of a mask [WORDS, 1], their bits [1, 32], the element of each, and whether there is one."""
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)[:, None]
    if WIDE:
        word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)[:, None]
    bit = tl.arange(0, 32)[None, :]
    place = word * 32 + bit
    return word, bit, place, place < numel


@triton.jit
def fake_quantize_masked_kernel(
    x,  # [outer, channels, inner]
    grid,  # [channels, 3]
    out,  # like x
    mask,  # [ceil(numel / 32)]
    numel,
    channels,
    inner,
    LEVELS: tl.constexpr,
    ONE_CHANNEL: tl.constexpr,
    WIDE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """out as above; bit i % 32 of mask[i // 32]: whether element i of the memory is inside the range."""
    word, bit, place, inside = words_of_program(numel, WIDE, WORDS)
    channel = tl.zeros((1, 1), tl.int32) if ONE_CHANNEL else (place // inner) % channels
    offset, step, inverse, _ = load_grid(grid, channel, channels)
    v = (load_float(x + place, inside) - offset) * inverse
    clamped = clamp_code(v, LEVELS)
    store_rounded(out + place, offset + step * round_to_even(clamped), inside)
    bits = tl.where(inside & (v == clamped), 1, 0) << bit
    tl.store(mask + word, tl.sum(bits, axis=1, keep_dims=True), mask=word * 32 < numel)


@triton.jit
def apply_mask_kernel(
    grad,  # [numel], as integers of the width of its elements
    mask,  # [ceil(numel / 32)]
    out,  # like grad
    numel,
    WIDE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """out = grad where the bit is set, else 0."""
    word, bit, place, inside = words_of_program(numel, WIDE, WORDS)
    bits = tl.load(mask + word, mask=word * 32 < numel, other=0)
    value = tl.load(grad + place, mask=inside, other=0)
    tl.store(out + place, tl.where((bits >> bit) & 1 == 1, value, 0).to(value.dtype), mask=inside)


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


def fake_quantize_masked(x: Tensor, grid: Tensor, levels: int, axis: int | None) -> tuple[Tensor, Tensor]:
    """q like x, and int32 [ceil(numel / 32)]: where clip lets the gradient pass, a bit an element in memory order."""
    op = "fake_quantize_masked"
    check_float(op, "x", x)
    check_quantizer(op, 0, levels)
    x = dense(x)
    grid = parameters(op, "grid", grid, x, check_axis(op, x, axis), 3)
    out, mask = torch.empty_like(x), x.new_empty(triton.cdiv(x.numel(), 32), dtype=torch.int32)
    if x.numel() > 0:
        tiles = tiles_of(x, axis)
        fake_quantize_masked_kernel[(triton.cdiv(mask.numel(), _WORDS),)](
            *(x, grid, out, mask, x.numel(), tiles.channels, tiles.inner),
            **{"LEVELS": levels, "ONE_CHANNEL": tiles.channels == 1, "WIDE": tiles.arguments["WIDE"], "WORDS": _WORDS},
            **EXACT,
        )
    return out, mask


def apply_mask(grad: Tensor, mask: Tensor) -> Tensor:
    """grad where its bit is set, else 0; grad in the memory order of the x that the mask is of."""
    op = "apply_mask"
    check_float(op, "grad", grad)
    check(mask.dtype == torch.int32, op, "mask", "Int", mask.dtype)
    words = triton.cdiv(grad.numel(), 32)
    check(list(mask.shape) == [words], op, "mask", f"of shape {[words]}", list(mask.shape))
    check(mask.device == grad.device, op, "mask", "on the device of x", "another one")
    grad = dense(grad)
    out = torch.empty_like(grad)
    if grad.numel() > 0:
        as_integers = torch.int32 if grad.dtype == torch.float32 else torch.int16
        apply_mask_kernel[(triton.cdiv(words, _WORDS),)](
            *(grad.view(as_integers), mask.contiguous(), out.view(as_integers), grad.numel()),
            **{"WIDE": tiles_of(grad, None).arguments["WIDE"], "WORDS": _WORDS},
        )
    return out


def encode(x: Tensor, grid: Tensor, kind: int, levels: int, axis: int | None) -> Tensor:
    """``quantkernels.ops.encode``: uint8 codes in the layout of x."""
    check_float("encode", "x", x)
    check_quantizer("encode", kind, levels)
    return quantize("encode", x, grid, kind, levels, axis, torch.uint8)


OPS = {
    "fake_quantize": fake_quantize,
    "fake_quantize_backward": fake_quantize_backward,
    "fake_quantize_masked": fake_quantize_masked,
    "apply_mask": apply_mask,
    "encode": encode,
}

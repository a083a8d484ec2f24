"""What all kernels share: the tile of a program, exact loads and stores, and the formulas of ``csrc/core/quantizer.h``.

A dense tensor is seen as [outer, channels, inner] in memory order, as in ``csrc/ops/dispatch.h``. The elements of one
channel are numbered j = 0 .. outer*inner - 1, and a program owns one tile [channels, elements] of (channel, j): large
channels are cut along j, small ones are taken together, and channels that lie side by side in memory (channels_last)
are read side by side. Reductions are tree sums within a tile, written out and added by torch in a fixed order: no float
atomics, the same bits on every run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

INTERPRETED: bool = bool(knobs.runtime.interpret)

# Triton contracts a*b + c into one rounding where it may (the default differs between its versions), and every
# backend must round twice: this launch option of the CUDA backend forbids it in LLVM and in ptxas (--fmad=false).
EXACT: dict[str, Any] = {"enable_fp_fusion": False}

UNIFORM = tl.constexpr(0)
BINARY = tl.constexpr(1)
TERNARY = tl.constexpr(2)
IDENTITY = tl.constexpr(3)
LEARNED = tl.constexpr(4)
CLIP_STE = tl.constexpr(1)
FULL_STE = tl.constexpr(2)

_ROUNDING_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds |v| < 2^22 to even
_LARGEST = tl.constexpr(3.4028234663852886e38)
_INTERPRETED = tl.constexpr(INTERPRETED)

_TILE = 2048  # elements a program: 16 a thread with four warps, which keeps several 16-byte loads in flight
_NARROW = 32  # rows shorter than this are not worth a coalesced read of their own


@dataclass(frozen=True)
class Tiles:
    """How a tensor is cut: the arguments that ``tile_of`` takes in every kernel, and the number of programs."""

    channels: int
    elements: int
    inner: int
    channel_block: int
    element_block: int

    @property
    def channel_blocks(self) -> int:
        return triton.cdiv(self.channels, self.channel_block)

    @property
    def element_blocks(self) -> int:
        return triton.cdiv(self.elements, self.element_block)

    @property
    def launch(self) -> tuple[int]:
        return (self.channel_blocks * self.element_blocks,)

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "channels": self.channels,
            "elements": self.elements,
            "inner": self.inner,
            "ONE_RUN": self.elements == self.inner,
            "WIDE": self.channels * self.elements >= 2**31 - _TILE * _TILE,
            "CHANNEL_BLOCK": self.channel_block,
            "ELEMENT_BLOCK": self.element_block,
        }

    def partial(self, like: Tensor, *columns: int) -> Tensor:
        """float32 [element_blocks, channels, *columns]: what the programs of one channel sum up, before it is added."""
        return like.new_empty((self.element_blocks, self.channels, *columns), dtype=torch.float32)


def tiles_of(x: Tensor, axis: int | None) -> Tiles:
    """Cut dense ``x`` (``axis`` None: one channel)."""
    outer, channels, inner = 1, 1, x.numel()
    if axis is not None:
        axis %= x.dim()
        order = sorted(range(x.dim()), key=x.stride, reverse=True)
        at = order.index(axis)
        channels = x.shape[axis]
        outer = math.prod(x.shape[d] for d in order[:at])
        inner = math.prod(x.shape[d] for d in order[at + 1 :])
    elements = outer * inner
    if channels == 1:
        inner = elements
    power = triton.next_power_of_2
    channel_block = 1 if inner >= _NARROW else min(power(channels), 64)
    element_block = min(power(elements), _TILE // channel_block)
    channel_block = max(channel_block, min(power(channels), _TILE // element_block))
    return Tiles(channels, elements, inner, channel_block, element_block)


def dense(t: Tensor) -> Tensor:
    """``t`` itself if its elements fill their memory, else a copy with its dimensions in the same order."""
    layout = torch.empty_like(t, device="meta")
    return t if layout.stride() == t.stride() else torch.empty_like(t).copy_(t)


def in_layout_of(t: Tensor, like: Tensor) -> Tensor:
    """``t`` with the strides of ``like``, copied only if they differ."""
    return t if t.stride() == like.stride() else torch.empty_like(like).copy_(t)


@triton.jit
def multiply_add(a, b, c):
    """a * b + c, rounded once. The interpreter's fma rounds twice: there float64 stands in, which holds the product,
    with a sum rounded to odd as in ``quantkernels.reference``."""
    if _INTERPRETED:
        product, more = a.to(tl.float64) * b.to(tl.float64), c.to(tl.float64)
        total = product + more
        back = total - product
        lost = (product - (total - back)) + (more - back)
        bits = total.to(tl.int64, bitcast=True)
        inexact = ((bits & 1) == 0) & (lost != 0) & (lost == lost) & (tl.abs(lost) != float("inf"))
        to_odd = tl.where((lost > 0) == (total > 0), 1, -1)
        return (bits + tl.where(inexact, to_odd, 0)).to(tl.float64, bitcast=True).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def tile_of(
    channels,
    elements,
    inner,
    ONE_RUN: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    ELEMENT_BLOCK: tl.constexpr,
):
    """This program's block of elements, its channels [CHANNEL_BLOCK, 1]; for the tile, offsets and what is inside."""
    blocks = tl.cdiv(channels, CHANNEL_BLOCK)
    block = tl.program_id(0) // blocks
    channel = (tl.program_id(0) % blocks) * CHANNEL_BLOCK + tl.arange(0, CHANNEL_BLOCK)[:, None]
    j = tl.arange(0, ELEMENT_BLOCK)[None, :]
    if WIDE:
        channel = channel.to(tl.int64)
        j = block.to(tl.int64) * ELEMENT_BLOCK + j
    else:
        j = block * ELEMENT_BLOCK + j
    inside = (channel < channels) & (j < elements)
    # One run: the channel's elements lie together, which the compiler would not see through the division.
    offset = channel * inner + j if ONE_RUN else ((j // inner) * channels + channel) * inner + j % inner
    return block, channel, offset, inside


@triton.jit
def load_float(pointer, inside):
    """float32 of the elements; 0 outside."""
    if _INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        # The interpreter gets bfloat16 subnormals wrong. Widening is a shift.
        bits = tl.load(pointer.to(tl.pointer_type(tl.uint16), bitcast=True), mask=inside, other=0)
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_rounded(pointer, value, inside):
    """Store float32 with one rounding to the pointer's type, ties to even."""
    if _INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        # The interpreter truncates to bfloat16; hardware rounds.
        bits = value.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        rounded = tl.where(value != value, 0x7FC0, rounded).to(tl.uint16)
        tl.store(pointer.to(tl.pointer_type(tl.uint16), bitcast=True), rounded, mask=inside)
    else:
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_grid(grid, channel, channels):
    """offset, step, inverse of the step and threshold of each channel."""
    row = grid + channel * 3
    inside = channel < channels
    offset = tl.load(row, mask=inside, other=0.0)
    step = tl.load(row + 1, mask=inside, other=0.0)
    threshold = tl.load(row + 2, mask=inside, other=0.0)
    inverse = tl.div_rn(tl.full(step.shape, 1.0, tl.float32), step)
    inverse = tl.where((step > 0.0) & (inverse <= _LARGEST), inverse, 0.0)
    return offset, step, inverse, threshold


@triton.jit
def clamp_code(v, LEVELS: tl.constexpr):
    """NaN passes both comparisons unchanged."""
    v = tl.where(v < 0.0, 0.0, v)
    return tl.where(v > LEVELS, LEVELS * 1.0, v)


@triton.jit
def round_to_even(v):
    return (v + _ROUNDING_MAGIC) - _ROUNDING_MAGIC


@triton.jit
def code_of(x, offset, inverse, threshold, KIND: tl.constexpr, LEVELS: tl.constexpr):
    """The code of x as float32."""
    if KIND == UNIFORM:
        return round_to_even(clamp_code((x - offset) * inverse, LEVELS))
    elif KIND == BINARY:
        return (x >= 0.0).to(tl.float32)
    else:
        return (x > -threshold).to(tl.float32) + (x > threshold).to(tl.float32)

"""Codes to bit-planes and back: int32 words, planes[bit][row][word], most significant plane first
(docs/formats.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from .fake_quantize import BINARY, TERNARY, UNIFORM, float_codes
from .stats import rows_of

WORD = 32
LEARNED = 4  # codes of a learned basis: planes as those of uniform ones


def plane_count(kind: int, levels: int) -> int:
    """Bits a code: that of `levels` for uniform and learned, 1 for binary, 2 for ternary."""
    if kind in (UNIFORM, LEARNED):
        return int(levels).bit_length()
    return {BINARY: 1, TERNARY: 2}[kind]


def plane_bits(codes: Tensor, kind: int, levels: int) -> list[Tensor]:
    """The boolean planes of codes, most significant first. Ternary: (code >= 1), (code >= 2), a
    thermometer."""
    value = codes.long()
    if kind == TERNARY:
        return [value >= 1, value >= 2]
    count = plane_count(kind, levels)
    return [(value >> bit) & 1 == 1 for bit in range(count - 1, -1, -1)]


def encode(x: Tensor, grid: Tensor, kind: int, levels: int, axis: int | None = None) -> Tensor:
    """uint8 codes in the shape and layout of x; the code of a NaN is 0."""
    codes = float_codes(x, grid, kind, levels, axis)
    return torch.nan_to_num(codes, nan=0.0).to(torch.uint8)


def pack_bitplanes(codes: Tensor, kind: int, levels: int) -> Tensor:
    """uint8 codes [rows, n] -> int32 [bits, rows, ceil(n/32)]: element i is bit i % 32 of word i // 32."""
    rows, n = codes.shape
    words = (n + WORD - 1) // WORD
    planes = torch.zeros(plane_count(kind, levels), rows, words * WORD, dtype=torch.int64, device=codes.device)
    for index, bits in enumerate(plane_bits(codes, kind, levels)):
        planes[index, :, :n] = bits.long()
    weights = 1 << torch.arange(WORD, dtype=torch.int64, device=codes.device)
    packed = (planes.reshape(planes.shape[0], rows, words, WORD) * weights).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def unpack_bitplanes(planes: Tensor, kind: int, n: int) -> Tensor:
    """int32 [bits, rows, words] -> uint8 codes [rows, n]."""
    count, rows, words = planes.shape
    shifts = torch.arange(WORD, dtype=torch.int64, device=planes.device)
    bits = ((planes.long()[..., None] >> shifts) & 1).reshape(count, rows, words * WORD)[:, :, :n]
    if kind == TERNARY:
        return bits.sum(0).to(torch.uint8)
    value = torch.zeros(rows, n, dtype=torch.int64, device=planes.device)
    for plane in bits:
        value = value * 2 + plane
    return value.to(torch.uint8)


def quantize_pack(x: Tensor, grid: Tensor, kind: int, levels: int, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """x [rows, n], axis None or 0 -> planes int32 [bits, rows, words] and the set bits of each, int32 [bits,
    rows]."""
    codes = encode(x, grid, kind, levels, axis)
    sums = [rows_of(bits, 0).sum(1) for bits in plane_bits(codes, kind, levels)]
    return pack_bitplanes(codes, kind, levels), torch.stack(sums).to(torch.int32)

"""Codes of a tensor, and codes as bit-planes; none of it is differentiable.

Planes are int32 words ``planes[bit][row][word]``, most significant plane first, element i of a row in bit ``i % 32`` of
word ``i // 32``, the last word padded with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import call
from ._register import OpRules, rules
from .fake_quantize import Kind
from .learned_basis import learned_basis_encode

WORD = 32


def plane_count(kind: int, levels: int) -> int:
    """Planes that a quantizer's codes take: 1 for BINARY, 2 for TERNARY (code >= 1 and code >= 2), else n for levels
    2^n - 1."""
    return 2 if kind == Kind.TERNARY else int(levels).bit_length()


def digits_kind(kind: int) -> int:
    """The kind whose codes have the same planes: a learned code is stored by its binary digits, as a uniform one is."""
    return Kind.UNIFORM if kind == Kind.LEARNED else kind


def encode(x: Tensor, grid: Tensor, kind: int, levels: int, axis: int | None = None) -> Tensor:
    """Codes of x. With ``Kind.LEARNED`` those of :func:`learned_basis_encode`.

    Args:
        x: any shape and memory layout; float32, float16 or bfloat16.
        grid, kind, levels, axis: as for ``fake_quantize``.

    Returns:
        uint8 in the shape and layout of ``x``, from 0 to ``levels``; the code of a NaN is 0.

    Raises:
        RuntimeError: naming the argument, what it must be and what it was.
    """
    if kind == Kind.LEARNED:
        return learned_basis_encode(x, grid, axis)
    return call("encode", x, grid, kind, levels, axis)


def pack_bitplanes(codes: Tensor, kind: int, levels: int) -> Tensor:
    """Codes to planes.

    Args:
        codes: uint8 [rows, columns], from 0 to ``levels``.
        kind, levels: of the quantizer, as for ``fake_quantize``; they set the number of planes.

    Returns:
        int32 [bits, rows, ceil(columns / 32)].

    Raises:
        RuntimeError: naming the argument, what it must be and what it was.
    """
    return call("pack_bitplanes", codes, digits_kind(kind), levels)


def unpack_bitplanes(planes: Tensor, kind: int, columns: int) -> Tensor:
    """Planes to codes: the inverse of ``pack_bitplanes``.

    Args:
        planes: int32 [bits, rows, words].
        kind: of the quantizer.
        columns: elements of a row; ``words`` must be ceil(columns / 32).

    Returns:
        uint8 [rows, columns]. The first b planes of UNIFORM codes give the codes' b most significant bits.

    Raises:
        RuntimeError: naming the argument, what it must be and what it was.
    """
    return call("unpack_bitplanes", planes, digits_kind(kind), columns)


def quantize_pack(x: Tensor, grid: Tensor, kind: int, levels: int, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """``pack_bitplanes(encode(x))`` in one pass, and how many bits are set.

    Args:
        x: [rows, columns]; float32, float16 or bfloat16.
        grid: float32 [1, 3] with ``axis`` None, or [rows, 3] with ``axis`` 0.
        kind, levels: as for ``fake_quantize``.

    Returns:
        planes int32 [bits, rows, ceil(columns / 32)], and their ones a row, int32 [bits, rows].

    Raises:
        RuntimeError: naming the argument, what it must be and what it was.
    """
    if kind == Kind.LEARNED:
        codes = learned_basis_encode(x, grid, axis)
        ones = [((codes >> bit) & 1).sum(1, dtype=torch.int32) for bit in reversed(range(plane_count(kind, levels)))]
        return pack_bitplanes(codes, kind, levels), torch.stack(ones)
    return call("quantize_pack", x, grid, kind, levels, axis)


def _fake_encode(x: Tensor, grid: Tensor, kind: int, levels: int, axis: int | None) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


def _fake_planes(rows: Tensor, kind: int, levels: int) -> Tensor:
    shape = plane_count(kind, levels), rows.size(0), (rows.size(1) + WORD - 1) // WORD
    return rows.new_empty(shape, dtype=torch.int32)


def _fake_unpack(planes: Tensor, kind: int, columns: int) -> Tensor:
    return planes.new_empty((planes.size(1), columns), dtype=torch.uint8)


def _fake_quantize_pack(x: Tensor, grid: Tensor, kind: int, levels: int, axis: int | None) -> tuple[Tensor, Tensor]:
    sums = x.new_empty((plane_count(kind, levels), x.size(0)), dtype=torch.int32)
    return _fake_planes(x, kind, levels), sums


rules("encode", OpRules(_fake_encode))
rules("pack_bitplanes", OpRules(_fake_planes))
rules("unpack_bitplanes", OpRules(_fake_unpack))
rules("quantize_pack", OpRules(_fake_quantize_pack))

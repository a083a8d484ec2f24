"""A tensor as bit-planes: what `encode` of a quantizer returns and a packed layer holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from .fake_quantize import Kind
from .learned_basis import level_table


def to_rows(x: Tensor, axis: int | None = None) -> Tensor:
    """x as [rows, n]: a row is one index of `axis` (of dimension 0 where axis is None), a vector is one row.

    The rest of a row keeps its order, except that of a 4-d tensor with three dimensions left, which is (h, w, c): the
    order of the packed format for convolution weights.
    """
    if x.dim() == 0 or (x.dim() == 1 and axis is None):
        return x.reshape(1, -1)
    moved = x.movedim(axis or 0, 0)
    if moved.dim() == 4:
        moved = moved.permute(0, 2, 3, 1)
    return moved.reshape(moved.shape[0], moved.numel() // max(moved.shape[0], 1))


def from_rows(rows: Tensor, shape: torch.Size, axis: int | None = None) -> Tensor:
    """The inverse of `to_rows`."""
    if len(shape) == 0 or (len(shape) == 1 and axis is None):
        return rows.reshape(shape)
    first = (axis or 0) % len(shape)
    rest = [size for index, size in enumerate(shape) if index != first]
    if len(shape) == 4:
        moved = rows.reshape(shape[first], rest[1], rest[2], rest[0]).permute(0, 3, 1, 2)
    else:
        moved = rows.reshape(shape[first], *rest)
    return moved.movedim(0, first)


def decode(codes: Tensor, grid: Tensor, kind: int, axis: int | None) -> Tensor:
    """float32 values of uint8 codes: offset + step * code, or of a learned basis offset + sum_j step_j bit_j."""
    shape = [1] * codes.dim()
    if axis is not None:
        shape[axis] = grid.shape[0]
    if kind != Kind.LEARNED:
        offset, step = grid[:, 0].reshape(shape), grid[:, 1].reshape(shape)
        return offset + step * codes.float()
    table = level_table(grid)
    first = (torch.arange(table.shape[0], device=codes.device) * table.shape[1]).reshape(shape)
    return table.reshape(-1)[first + codes]


@dataclass(frozen=True)
class BitPlanes:
    """The codes of a tensor, packed, and the grid that gives them values: x ~ offset + step * code.

    planes: int32 [bits, rows, words], most significant plane first (docs/formats.md). grid: float32 [1, 3] or [rows,
    3], of a learned basis [1, 1 + bits] or [rows, 1 + bits]. kind, levels: as the ops take them. shape, dtype: of the
    tensor that was encoded. axis: the dimension of the rows, None for one grid a tensor (its rows are dimension 0).
    """

    planes: Tensor
    grid: Tensor
    kind: int
    levels: int
    shape: torch.Size
    axis: int | None = None
    dtype: torch.dtype = torch.float32

    @classmethod
    def encode(cls, x: Tensor, grid: Tensor, kind: int, levels: int, axis: int | None = None) -> BitPlanes:
        """Encode and pack x under a grid [C, 3]; the code of a NaN is 0."""
        planes, _ = ops.quantize_pack(to_rows(x, axis), grid, kind, levels, None if axis is None else 0)
        return cls(planes, grid, int(kind), levels, x.shape, axis, x.dtype)

    @property
    def bits(self) -> int:
        """Planes: the bits of a code."""
        return self.planes.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the planes and of the grid."""
        return self.planes.nbytes + self.grid.nbytes

    def codes(self) -> Tensor:
        """uint8 codes in the shape of the tensor."""
        row_length = self.shape.numel() // max(self.planes.shape[1], 1)
        return from_rows(ops.unpack_bitplanes(self.planes, self.kind, row_length), self.shape, self.axis)

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """offset + step * code in the tensor's shape: float32 arithmetic, one rounding to dtype (default: as
        encoded)."""
        return decode(self.codes(), self.grid, self.kind, self.axis).to(dtype or self.dtype)

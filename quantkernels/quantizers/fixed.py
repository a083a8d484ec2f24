"""A grid that no longer changes: what is left of a quantizer in a converted network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import ops
from ..ops import Kind, Ste
from ..ops.planes import decode
from .base import Quantizer


class Fixed(Quantizer):
    """Quantizes with the grid it was given, float32 [C, 3]. Identity STE; a learned basis ([C, 1 + bits])
    passes no gradient.

    kind, levels: as the ops take them; bits: how many planes a code has. axis: None or the channel dimension.
    widths: bit-widths, highest first, of uniform grids [len(widths), C, 3]; `set_bits` chooses one. levels is then that
    of the highest. None: one grid.
    """

    learned = True
    constant: Tensor

    def __init__(
        self, grid: Tensor, kind: int, levels: int, axis: int | None = None, widths: Sequence[int] | None = None
    ) -> None:
        bits = {Kind.BINARY: 1, Kind.TERNARY: 2}.get(Kind(kind), int(levels).bit_length())
        super().__init__(bits, int(kind), levels, Ste.IDENTITY, axis)
        self.widths = None if widths is None else list(widths)
        self.register_buffer("constant", grid.detach().to(torch.float32).clone())

    def quantize(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """q in the shape and dtype of x, and a function that gives it again."""
        return (self._decoded(x), self._decoded) if self.kind == Kind.LEARNED else super().quantize(x)

    def _decoded(self, x: Tensor) -> Tensor:
        codes = ops.encode(x, self.constant, self.kind, self.levels, self.axis)
        return decode(codes, self.constant, self.kind, self.axis).to(x.dtype)

    def batch_grid(self, x: Tensor, stats: Tensor | None) -> Tensor:
        """The grid."""
        return self.constant if self.widths is None else self.constant[self.widths.index(self.bits)]

    def check_bits(self, bits: int) -> None:
        """Raises ValueError unless there is a grid of that many bits."""
        if self.widths is None:
            super().check_bits(bits)
        elif bits not in self.widths:
            raise ValueError(f"set_bits: the packed layer has {self.widths} bits, not {bits}")

    def set_bits(self, bits: int) -> None:
        """Use the grid of that many bits."""
        self.check_bits(bits)
        if self.widths is not None:
            self.bits, self.levels = bits, 2**bits - 1

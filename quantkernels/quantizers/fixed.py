"""A grid that no longer changes: what is left of a quantizer in a converted network."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Kind, Ste
from .base import Quantizer


class Fixed(Quantizer):
    """Quantizes with the grid it was given, float32 [C, 3]. Identity STE.

    kind, levels: as the ops take them; bits: how many planes a code has. axis: None or the channel dimension.
    """

    learned = True
    constant: Tensor

    def __init__(self, grid: Tensor, kind: int, levels: int, axis: int | None = None) -> None:
        bits = {Kind.BINARY: 1, Kind.TERNARY: 2}.get(Kind(kind), int(levels).bit_length())
        super().__init__(bits, int(kind), levels, Ste.IDENTITY, axis)
        self.register_buffer("constant", grid.detach().to(torch.float32).clone())

    def batch_grid(self, x: Tensor, stats: Tensor | None) -> Tensor:
        """The grid."""
        return self.constant

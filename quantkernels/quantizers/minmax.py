"""Min-max: uniform levels from the smallest to the largest value."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..ops import Kind, Ste
from .base import Quantizer, uniform_levels
from .sharing import sharing


class MinMax(Quantizer):
    """q = lo + d*round((x - lo)/d), lo = min x, hi = max x, d = (hi - lo)/(2^bits - 1); DQA, equations 9 to
    13.

    bits: 1 to 8. axis: None or the channel dimension. The gradient passes unchanged (identity STE).
    A constant tensor (lo == hi) is returned as it is.
    """

    needs_statistics = True

    def __init__(self, bits: int, axis: int | None = None) -> None:
        super().__init__(bits, Kind.UNIFORM, uniform_levels("MinMax", bits), Ste.IDENTITY, axis)

    def batch_grid(self, x: Tensor, stats: Tensor | None) -> Tensor:
        """(lo, (hi - lo)/levels, 0) of each channel."""
        assert stats is not None
        low = stats[:, 0]
        return torch.stack((low, (stats[:, 1] - low) / self.levels, torch.zeros_like(low)), 1)

    def fresh_grid(self, x: Tensor, stats: Tensor | None) -> Tensor:
        """Where no statistics are at hand or worth keeping, one op takes x to the grid."""
        if stats is not None or sharing():
            return super().fresh_grid(x, stats)
        return ops.minmax_grids(x, [self.levels], self.axis)[0]

    def check_bits(self, bits: int) -> None:
        """Raises ValueError unless bits is an int from 1 to 8."""
        uniform_levels("set_bits", bits)

    def set_bits(self, bits: int) -> None:
        """Change the number of levels and keep the range."""
        self._set_uniform_levels(bits)

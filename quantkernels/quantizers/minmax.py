"""Min-max: uniform levels from the smallest to the largest value."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Kind, Ste
from .base import Quantizer, uniform_levels


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
        """(lo, (hi - lo)/levels) of each channel."""
        assert stats is not None
        return minmax_grids(stats, self.levels)

    def check_bits(self, bits: int) -> None:
        """Raises ValueError unless bits is an int from 1 to 8."""
        uniform_levels("set_bits", bits)

    def set_bits(self, bits: int) -> None:
        """Change the number of levels and keep the range."""
        self._set_uniform_levels(bits)


def minmax_grids(stats: Tensor, levels: int | Tensor) -> Tensor:
    """Grids [C, 3] for one `levels`, or [K, C, 3] for K of them (a float32 tensor [K, 1]), from stats [C,
    4]."""
    low = stats[:, 0]
    step = (stats[:, 1] - low) / levels
    # A uniform quantizer has no threshold; repeating the step there saves an op.
    return torch.stack((low.expand_as(step), step, step), -1)


def level_tensor(levels: list[int]) -> Tensor:
    """float32 [K, 1]: what `minmax_grids` divides the range by for K members at once."""
    return torch.tensor(levels, dtype=torch.float32)[:, None]

"""One and two thresholds: binary (BWN) and ternary (TWN) quantizers."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..ops import Kind, Ste
from .base import Quantizer, ScaledGrid, channel_size

# Li et al. 2016, equation 7: the threshold that is near optimal for uniform and normal weights.
THRESHOLD_SHARE = 0.7


class BWN(ScaledGrid):
    """q = beta where x >= 0 else -beta, beta = E|x|; Rastegari et al. 2016, equation 6.

    axis: None (per tensor, as in DQA) or 0 (per output channel, as in XNOR-Net). Identity STE. bits is 1.
    """

    needs_statistics = True

    def __init__(self, axis: int | None = None) -> None:
        super().__init__(1, Kind.BINARY, 1, Ste.IDENTITY, axis, (-1.0, 0.5, float("inf")))

    def batch_grid(self, x: Tensor, stats: Tensor | None) -> Tensor:
        """(-beta, 2*beta, 0) of each channel."""
        assert stats is not None
        return self.scaled(stats[:, 2:3] / max(channel_size(x, self.axis), 1))


class TWN(Quantizer):
    """q in {-beta, 0, beta}: delta = 0.7*E|x|, beta = E[|x| : |x| > delta]; Li et al. 2016, equations 6 and
    7.

    The code counts the thresholds that x exceeds, (x > -delta) + (x > delta). Identity STE. bits is 2: two
    planes, a thermometer.
    """

    needs_statistics = True

    def __init__(self, axis: int | None = None) -> None:
        super().__init__(2, Kind.TERNARY, 2, Ste.IDENTITY, axis)

    def batch_grid(self, x: Tensor, stats: Tensor | None) -> Tensor:
        """(-beta, beta, delta) of each channel."""
        assert stats is not None
        threshold = stats[:, 2] * (THRESHOLD_SHARE / max(channel_size(x, self.axis), 1))
        beta = ops.conditional_abs_mean(x, threshold, self.axis)
        return torch.stack((-beta, beta, threshold), 1)

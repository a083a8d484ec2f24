"""SAWB: statistics-aware weight binning, uniform levels on [-a, a]."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..ops import Kind, Ste
from .base import ScaledGrid, channel_size, uniform_levels

# a = c1*sqrt(E[x^2]) + c2*E|x|: Choi et al., "Accurate and efficient 2-bit quantized neural networks", 2019.
# With one bit the levels are +-a and a = E|x| is the exact optimum.
COEFFICIENTS = {1: (0.0, 1.0), 2: (3.12, -2.064), 3: (7.509, -6.892), 4: (12.68, -12.80)}

# The search looks at this many ranges, in equal ratios from max|x| down to the root mean square, below which
# no range pays with 4 bits or more. For a bell-shaped tensor (max|x| of 5 to 10 root mean squares)
# neighbours are 7 to 11 % apart.
CANDIDATES = 24


class SAWB(ScaledGrid):
    """Uniform levels on [-a, a], a chosen from E[x^2] and E|x| so that the squared error is small.

    bits: 1 to 8. For 2, 3 and 4 bits a is SAWB's linear fit, for 1 bit E|x|. From 5 bits on, and wherever
    the fit is not positive (4 bits, when all magnitudes are nearly equal), a is the candidate range with the
    least squared error (DQA, equation 12): 24 candidates from max|x| down to sqrt(E[x^2]) in equal ratios,
    measured in one pass, the first of equals.

    ste: "clip" (no gradient outside [-a, a]) or "identity" (SAWB+). axis: None or the channel dimension.
    """

    needs_statistics = True
    exponents: Tensor

    def __init__(self, bits: int, axis: int | None = None, ste: str = "clip") -> None:
        if ste not in ("clip", "identity"):
            raise ValueError(f'SAWB: ste must be "clip" or "identity", got {ste!r}')
        levels = uniform_levels("SAWB", bits)
        mode = Ste.CLIP if ste == "clip" else Ste.IDENTITY
        super().__init__(bits, Kind.UNIFORM, levels, mode, axis, (-1.0, levels / 2.0, float("inf")))
        self.register_buffer("exponents", torch.linspace(0.0, 1.0, CANDIDATES)[None], persistent=False)

    def batch_grid(self, x: Tensor, stats: Tensor | None) -> Tensor:
        """(-a, 2a/levels, 0) of each channel."""
        assert stats is not None
        if self.bits not in COEFFICIENTS:
            return self.scaled(self._search(x, stats))
        c1, c2 = COEFFICIENTS[self.bits]
        n = max(channel_size(x, self.axis), 1)
        fit = torch.add(stats[:, 3:4].sqrt() * (c1 / n**0.5), stats[:, 2:3], alpha=c2 / n)
        return self.scaled(self._positive(fit, x, stats))

    def _positive(self, fit: Tensor, x: Tensor, stats: Tensor) -> Tensor:
        """fit [C, 1] where it is positive, else the searched range."""
        c1, c2 = COEFFICIENTS[self.bits]
        if c1 + c2 > 0:  # E|x| <= sqrt(E[x^2]), so a >= 0 and the fit fails only with 4 bits
            return fit
        on_host = fit.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_host and bool((fit > 0).all()):  # reading the value is free there; a device would have to wait for it
            return fit
        return torch.where(fit > 0, fit, self._search(x, stats))

    def _search(self, x: Tensor, stats: Tensor) -> Tensor:
        """[C, 1]: of the candidate ranges the one with the least squared error."""
        largest = torch.maximum(stats[:, 1:2], -stats[:, 0:1])
        root_mean_square = stats[:, 3:4].sqrt() * (1.0 / max(channel_size(x, self.axis), 1) ** 0.5)
        ratio = (root_mean_square / largest).nan_to_num(1.0)  # an all-zero channel: every candidate is 0
        candidates = largest * ratio**self.exponents
        errors = ops.range_errors(x, candidates, self.levels, self.axis)
        return candidates.gather(1, errors.argmin(1, keepdim=True))

    def check_bits(self, bits: int) -> None:
        """Raises ValueError unless bits is an int from 1 to 8."""
        uniform_levels("set_bits", bits)

    def set_bits(self, bits: int) -> None:
        """Change the number of levels and keep the range."""
        self._set_uniform_levels(bits)
        self.divisor[:, 1] = self.levels / 2.0

    def extra_repr(self) -> str:
        """The arguments, as they would be written."""
        return super().extra_repr() + (', ste="identity"' if self.ste == Ste.IDENTITY else "")

"""PACT: a clipping range for activations that is learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import Kind, Ste
from .base import ScaledGrid, uniform_levels

# What alpha is not let below. Activations whose useful range is smaller than this do not occur after
# batch-norm.
ALPHA_FLOOR = 1e-4


class PACT(ScaledGrid):
    """y = clip(x, 0, alpha); q = round(y*N/alpha)*alpha/N, N = 2^bits - 1; Choi et al. 2018, equations 1 to
    3.

    dL/dx = g*1[0 <= x <= alpha], dL/dalpha = sum g*1[x >= alpha]; with plus=True (PACT+) the in-range term
    sum g*(q - x)/alpha as well. bits: 1 to 8; per tensor.

    `alpha` is a float32 parameter [1], for the optimizer to give its own learning rate and weight decay. It
    stays positive by projection: each training forward first sets an alpha below 1e-4 to 1e-4 in place, so a
    step that overshoots costs one step and leaves the gradient alive; eval clamps the value it reads and
    writes nothing. The device is never waited for.
    """

    learned = True

    def __init__(self, bits: int, alpha: float = 8.0, plus: bool = False) -> None:
        levels = uniform_levels("PACT", bits)
        if not alpha >= ALPHA_FLOOR:
            raise ValueError(f"PACT: alpha must be at least {ALPHA_FLOOR}, got {alpha}")
        mode = Ste.FULL if plus else Ste.CLIP
        super().__init__(bits, Kind.UNIFORM, levels, mode, None, (float("inf"), float(levels), float("inf")))
        self.alpha = nn.Parameter(torch.tensor([alpha], dtype=torch.float32))
        self.plus = plus

    def batch_grid(self, x: Tensor, stats: Tensor | None) -> Tensor:
        """(0, alpha/levels, 0), differentiable in alpha."""
        if self.training:
            with torch.no_grad():
                self.alpha.clamp_(min=ALPHA_FLOOR)
            return self.scaled(self.alpha[:, None])
        return self.scaled(self.alpha.clamp(min=ALPHA_FLOOR)[:, None])

    def check_bits(self, bits: int) -> None:
        """Raises ValueError unless bits is an int from 1 to 8."""
        uniform_levels("set_bits", bits)

    def set_bits(self, bits: int) -> None:
        """Change the number of levels and keep the range."""
        self._set_uniform_levels(bits)
        self.divisor[:, 1] = float(self.levels)

    def extra_repr(self) -> str:
        """The arguments, as they would be written, with alpha as it is now."""
        alpha = "meta" if self.alpha.is_meta else f"{self.alpha.item():.4g}"
        return super().extra_repr() + f", alpha={alpha}" + (", plus=True" if self.plus else "")

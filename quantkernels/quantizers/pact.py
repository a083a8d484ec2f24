"""PACT: a clipping range for activations that is learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops import Kind, Ste
from .base import ScaledGrid, check_widths, uniform_levels

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

    per_bit: bit-widths with an alpha each, `bits` among them, such as [8, 6, 4, 2]; `set_bits` chooses one of them,
    and alpha is [len(per_bit)], highest bits first. None: one alpha for whatever `set_bits` says.
    """

    learned = True

    def __init__(self, bits: int, alpha: float = 8.0, plus: bool = False, per_bit: Sequence[int] | None = None) -> None:
        levels = uniform_levels("PACT", bits)
        if not alpha >= ALPHA_FLOOR:
            raise ValueError(f"PACT: alpha must be at least {ALPHA_FLOOR}, got {alpha}")
        mode = Ste.FULL if plus else Ste.CLIP
        super().__init__(bits, Kind.UNIFORM, levels, mode, None, (float("inf"), float(levels), float("inf")))
        self.plus = plus
        self.per_bit = None if per_bit is None else check_widths("PACT: per_bit", per_bit)
        self.index = 0
        if self.per_bit is not None:
            rows = [(float("inf"), 2.0**n - 1, float("inf")) for n in self.per_bit]
            self.register_buffer("divisor", torch.tensor(rows), persistent=False)
            self.set_bits(bits)
        self.alpha = nn.Parameter(torch.full((len(self.divisor),), float(alpha)))

    def batch_grid(self, x: Tensor, stats: Tensor | None) -> Tensor:
        """(0, alpha/levels, 0), differentiable in alpha."""
        alpha: Tensor = self.alpha
        if self.training:
            with torch.no_grad():
                alpha.clamp_(min=ALPHA_FLOOR)
        else:
            alpha = alpha.clamp(min=ALPHA_FLOOR)
        if self.per_bit is None:
            return self.scaled(alpha[:, None])
        chosen = slice(self.index, self.index + 1)
        return alpha[chosen, None] / self.divisor[chosen]

    def check_bits(self, bits: int) -> None:
        """Raises ValueError unless bits is an int from 1 to 8, one of `per_bit` where that is given."""
        uniform_levels("set_bits", bits)
        if self.per_bit is not None and bits not in self.per_bit:
            raise ValueError(f"set_bits: PACT has clipping levels for {self.per_bit} bits, not for {bits}")

    def set_bits(self, bits: int) -> None:
        """Use the alpha of that many bits, or without `per_bit` keep the range."""
        self.check_bits(bits)
        if self.per_bit is None:
            self._set_uniform_levels(bits)
            self.divisor[:, 1] = float(self.levels)
            return
        self.bits, self.levels, self.index = bits, uniform_levels("PACT", bits), self.per_bit.index(bits)

    @torch.no_grad()
    def copy_bits(self, source: int, target: int) -> None:
        """Give `target` bits the alpha of `source` bits, where `per_bit` has both."""
        if self.per_bit is not None:
            self.alpha[self.per_bit.index(target)] = self.alpha[self.per_bit.index(source)]

    def extra_repr(self) -> str:
        """The arguments, as they would be written, with alpha as it is now."""
        alpha = "meta" if self.alpha.is_meta else f"{self.alpha[self.index].item():.4g}"
        widths = "" if self.per_bit is None else f", per_bit={self.per_bit}"
        return super().extra_repr() + f", alpha={alpha}" + (", plus=True" if self.plus else "") + widths

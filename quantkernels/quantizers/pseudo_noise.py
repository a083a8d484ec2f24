"""Learned bit-widths: noise in place of rounding while training, true quantization afterwards (DiffQ)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import Kind, Ste
from .base import MAX_BITS, Quantizer

HIGHEST_BITS = 15


class PseudoNoise(Quantizer):
    """A weight quantizer whose bits are learned, for each group of weights (Defossez et al. 2021, DiffQ).

    In training q = x + U[-1/2, 1/2] * (max - min) / (2^b - 1), with b = min_bits + sigmoid(logit) (max_bits -
    min_bits), differentiable in x and in b; the range is a constant of the backward. In eval min-max quantization at
    round(b) bits.

    groups: 1, the whole tensor, or the size of dimension 0 for bits and a range of its own for each output channel.
    start: b at first. `logits` is a float32 parameter [groups]. `seed`: an int gives the noise of the next training
    forwards, the same on all processes that have it; None takes torch's generator.

    Codes, and so `encode` and `quantkernels.convert`, exist for at most 8 bits: a network that is to be packed needs
    max_bits=8, one with more can be trained and evaluated.

    Raises ValueError unless 2 <= min_bits < max_bits <= 15 and start is between them.
    """

    needs_statistics = True

    def __init__(self, groups: int = 1, start: float = 8.0, min_bits: int = 2, max_bits: int = HIGHEST_BITS) -> None:
        if not 2 <= min_bits < max_bits <= HIGHEST_BITS:
            raise ValueError(
                f"PseudoNoise: min_bits and max_bits must be rising numbers from 2 to {HIGHEST_BITS}, "
                f"got {min_bits} and {max_bits}"
            )
        if not min_bits < start < max_bits:
            raise ValueError(f"PseudoNoise: start must be between {min_bits} and {max_bits}, got {start}")
        if groups < 1:
            raise ValueError(f"PseudoNoise: groups must be 1 or the number of output channels, got {groups}")
        bits = round(start)
        super().__init__(bits, Kind.UNIFORM, 2**bits - 1, Ste.IDENTITY, 0 if groups > 1 else None)
        self.min_bits, self.max_bits = min_bits, max_bits
        share = (start - min_bits) / (max_bits - min_bits)
        self.logits = nn.Parameter(torch.full((groups,), math.log(share / (1 - share))))
        self.seed: int | None = None

    def bit_widths(self) -> Tensor:
        """b of every group, float32 [groups], differentiable."""
        return self.min_bits + torch.sigmoid(self.logits) * (self.max_bits - self.min_bits)

    def size(self, weights: int) -> Tensor:
        """Bits that a tensor of so many weights takes, a scalar, differentiable in the logits."""
        return self.bit_widths().mean() * weights

    def track(self, momentum: float = 0.1) -> PseudoNoise:
        """Raises ValueError: activations have no weights to store."""
        raise ValueError("PseudoNoise is for weights: its bits are paid for by the size of the network")

    def train(self, mode: bool = True) -> PseudoNoise:
        """In eval the bits are whole numbers: read from the device here, once, rather than in each forward."""
        super().train(mode)
        if not mode:
            self._round_bits()
        return self

    def _round_bits(self) -> None:
        if not self.logits.is_meta:
            self.bits = int(self.bit_widths().detach().round().max())
            self.levels = 2**self.bits - 1

    def quantize(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """q in the shape and dtype of x, and a function that gives it again: of a weight, it is kept."""
        self._check_groups(x)
        if not self.training and self.bits <= MAX_BITS:
            return super().quantize(x)
        q = self._noisy(x) if self.training else self._rounded(x)
        fixed = q.detach()
        return q, lambda _: fixed

    def _rounded(self, x: Tensor) -> Tensor:
        offset, step = self._along(x, *self._range(x))
        return (offset + step * ((x.float() - offset) / step).round()).to(x.dtype)

    def _noisy(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            stats = self.statistics(x)
            noise = torch.rand(x.shape, device=x.device, generator=self._generator(x)) - 0.5
        extent = (stats[:, 1] - stats[:, 0]) / (torch.exp2(self.bit_widths()) - 1)
        (scale,) = self._along(x, extent)
        return (x + noise * scale).to(x.dtype)

    def _generator(self, x: Tensor) -> torch.Generator | None:
        return None if self.seed is None else torch.Generator(x.device).manual_seed(self.seed)

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(offset, step) of every group at its whole number of bits; step 1 for a group of equal values."""
        stats = self.statistics(x)
        step = (stats[:, 1] - stats[:, 0]) / (torch.exp2(self.bit_widths().detach().round()) - 1)
        return stats[:, 0], torch.where(step > 0, step, 1.0)

    def _along(self, x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        """[groups] as what broadcasts over x."""
        return tuple(value.view(-1, *[1] * (x.dim() - 1)) if self.axis == 0 else value for value in values)

    def _check_groups(self, x: Tensor) -> None:
        if self.axis == 0 and (x.dim() == 0 or x.shape[0] != len(self.logits)):
            raise ValueError(f"PseudoNoise: groups = {len(self.logits)} must be the size of dimension 0, got {x.shape}")

    def batch_grid(self, x: Tensor, stats: Tensor | None) -> Tensor:
        """(min, step, 0) of every group. Raises RuntimeError for more than 8 bits."""
        if self.bits > MAX_BITS:
            raise RuntimeError(
                f"PseudoNoise learned {self.bits} bits and codes have at most {MAX_BITS}: "
                f"train with max_bits={MAX_BITS} to pack the network"
            )
        offset, step = self._range(x)
        return torch.stack((offset, step, torch.zeros_like(step)), 1)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._round_bits()

    def extra_repr(self) -> str:
        """The arguments, as they would be written, with the bits as they are now."""
        bits = "meta" if self.logits.is_meta else f"{self.bit_widths().mean().item():.2f}"
        return f"groups={len(self.logits)}, min_bits={self.min_bits}, max_bits={self.max_bits}, bits={bits}"

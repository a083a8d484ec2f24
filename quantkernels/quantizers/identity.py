"""No quantization, as a quantizer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops import Kind, Ste
from ..ops.planes import BitPlanes
from .base import Quantizer


class Identity(Quantizer):
    """q = x. The full-precision member of a mixture (bits 32), or the way to say that a layer's tensor stays
    float."""

    learned = True

    def __init__(self) -> None:
        super().__init__(32, Kind.IDENTITY, 0, Ste.IDENTITY, None)

    def batch_grid(self, x: Tensor, stats: Tensor | None) -> Tensor:
        """A row of zeros, which no op reads."""
        return torch.zeros(1, 3, dtype=torch.float32, device=x.device)

    def quantize(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """x itself, and the identity."""
        return x, lambda x: x

    def encode(self, x: Tensor) -> BitPlanes:
        """Raises TypeError: a float has no codes."""
        raise TypeError("Identity keeps values in floating point and has no codes to pack")

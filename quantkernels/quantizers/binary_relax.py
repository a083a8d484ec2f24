"""Binary-Relax: quantization that tightens epoch by epoch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .base import Quantizer
from .identity import Identity
from .mixture import Mixture


class BinaryRelax(Mixture):
    """One quantizer: q = (omega*Q_1(x) + x)/(omega + 1). Three: q = (omega*Q_1 + Q_2 + Q_3)/(omega + 2).

    Yin et al. 2018 for one quantizer; the form for three is DQA's comparison. Q_1 is the one with the lowest
    bits. `omega` float32 buffer, initially 1; `step_epoch()` multiplies it by `growth` (1.02). The last
    phase of the method uses Q_1 alone: `select()`.
    """

    omega: Tensor
    others: Tensor

    def __init__(self, quantizers: Iterable[Quantizer], growth: float = 1.02) -> None:
        members = list(quantizers)
        if len(members) not in (1, 3):
            raise ValueError(f"BinaryRelax: needs one quantizer or three, got {len(members)}")
        if not growth >= 1.0:
            raise ValueError(f"BinaryRelax: growth must be at least 1, got {growth}")
        super().__init__([*members, Identity()] if len(members) == 1 else members)
        self.growth = growth
        self.register_buffer("omega", torch.tensor(1.0, dtype=torch.float32))
        self.register_buffer("others", torch.ones(len(self.quantizers) - 1), persistent=False)

    def step_epoch(self) -> None:
        """omega *= growth: call once after each epoch."""
        self.omega.mul_(self.growth)

    def weights(self) -> Tensor:
        """float32 [K]: (omega, 1, ...) over their sum."""
        parts = torch.cat((self.omega[None], self.others))
        return parts / parts.sum()

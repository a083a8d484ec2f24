"""HWGQ: fixed levels for activations that follow a batch-norm."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Kind, Ste
from .base import ScaledGrid

# The uniform steps of least squared error for the positive half of a unit Gaussian, by bits.
HWGQ_STEPS = {2: 0.538, 3: 0.3217, 4: 0.185}


class HWGQ(ScaledGrid):
    """q = s*clip(round(x/s), 0, N), N = 2^bits - 1, s = 0.538, 0.3217, 0.185 for 2, 3, 4 bits.

    Half-wave Gaussian quantization, Cai et al. 2017, with its uniform quantizer and the clipped
    ReLU as its backward: dL/dx = g*1[0 <= x <= N*s]. The paper's range is open at 0; at x = 0 itself the op
    passes g (docs/numerics.md). For inputs of unit variance, which is what a batch-norm gives; per tensor,
    nothing is learned or tracked.
    """

    learned = True
    constant: Tensor

    def __init__(self, bits: int) -> None:
        step = hwgq_step("HWGQ", bits)
        super().__init__(bits, Kind.UNIFORM, 2**bits - 1, Ste.CLIP, None, (float("inf"), 1.0, float("inf")))
        self.register_buffer("constant", torch.tensor([[step]], dtype=torch.float32), persistent=False)

    def batch_grid(self, x: Tensor, stats: Tensor | None) -> Tensor:
        """(0, s, 0)."""
        return self.scaled(self.constant)

    def check_bits(self, bits: int) -> None:
        """Raises ValueError unless bits is 2, 3 or 4."""
        hwgq_step("set_bits", bits)

    def set_bits(self, bits: int) -> None:
        """Take the levels of that many bits; the range is the one that belongs to them."""
        self.constant.fill_(hwgq_step("set_bits", bits))
        self.bits, self.levels = bits, 2**bits - 1


def hwgq_step(name: str, bits: int) -> float:
    """The step for that many bits. Raises ValueError unless bits is 2, 3 or 4."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in HWGQ_STEPS:
        raise ValueError(f"{name}: HWGQ has steps for {sorted(HWGQ_STEPS)} bits, got {bits!r}")
    return HWGQ_STEPS[bits]

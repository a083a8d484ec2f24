"""LSQ: a quantizer whose step is learned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import Kind, Ste
from .base import ScaledGrid, uniform_levels

# What the step is not let below: the lower clamp of LIMPQ.
STEP_FLOOR = 1e-5


class ScaleGradient(torch.autograd.Function):
    """The value as it is, its gradient times a number: the value of a step must not depend on who reads it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: float) -> Tensor:
        """value; backward multiplies by `scale`."""
        ctx.scale = scale
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The gradient times `scale`."""
        return grads[0] * ctx.scale, None


class LSQ(ScaledGrid):
    """q = s*clip(round(x/s), -Qn, Qp) with a learned step s; Esser et al. 2020, equations 1 to 3.

    signed: Qn = 2^(bits-1), Qp = 2^(bits-1) - 1 (weights); unsigned: Qn = 0, Qp = 2^bits - 1 (activations).
    None, the default, is signed, until a layer takes the quantizer for its activation (`track`).
    bits: 1 to 8, signed 2 to 8 (with one bit Qp is 0); per tensor.

    dL/dx = g*1[-Qn <= v <= Qp], dL/ds = sum g*(round(v) - v inside, -Qn below, Qp from Qp on) / sqrt(numel*Qp),
    v = x/s, numel all elements of x. At v = -Qn itself the step gets nothing (docs/numerics.md).

    `step` is a float32 parameter [1], NaN until the first training batch sets it to 2 E|x| / sqrt(Qp). It
    stays positive as PACT's alpha does: each training forward first raises a step below 1e-5 to 1e-5, eval
    clamps what it reads. The device is never waited for. With several processes run one batch before
    distributing the model: each would start from its own batch.
    """

    learned = True

    def __init__(self, bits: int, signed: bool | None = None) -> None:
        levels = lsq_levels("LSQ", bits, signed is not False)
        super().__init__(bits, Kind.UNIFORM, levels, Ste.FULL, None, (float("inf"), 1.0, float("inf")))
        self.step = nn.Parameter(torch.full((1,), float("nan")))
        self.role_decides = signed is None
        self.signed = signed is not False
        self._set_offset()

    @property
    def negative(self) -> int:
        """Qn."""
        return 2 ** (self.bits - 1) if self.signed else 0

    @property
    def positive(self) -> int:
        """Qp."""
        return self.levels - self.negative

    def _set_offset(self) -> None:
        # s / (-1/Qn) is -Qn*s without a rounding, since Qn is a power of two.
        self.divisor[:, 0] = -1.0 / self.negative if self.signed else float("inf")

    def track(self, momentum: float = 0.1) -> LSQ:
        """Become unsigned, unless `signed` was given: a layer calls this on its activation quantizer.
        Returns self."""
        if self.role_decides:
            self.signed = False
            self._set_offset()
        return self

    def grid(self, x: Tensor, stats: Tensor | None = None, update: bool = True) -> Tensor:
        """(-Qn*s, s, 0), differentiable in s. The first training call sets s from x.

        Raises RuntimeError where there is no step yet and this call may not set it: in eval, or with
        update=False.
        """
        if not self.calibrated:
            if update and self.updates(x):
                self._initialise(x)
            elif not (self.training and x.numel() == 0):
                raise RuntimeError(
                    f"LSQ(bits={self.bits}) takes its step from the first training batch and has none yet: "
                    "run at least one forward in training mode before eval, or load a state dict"
                )
        return super().grid(x, stats, update)

    @torch.no_grad()
    def _initialise(self, x: Tensor) -> None:
        self.step.copy_(2 * x.detach().float().abs().mean() / self.positive**0.5)
        self.calibrated = True

    def batch_grid(self, x: Tensor, stats: Tensor | None) -> Tensor:
        """(-Qn*s, s, 0), differentiable in s."""
        if not self.training:
            return self.scaled(self.step.clamp(min=STEP_FLOOR)[:, None])
        with torch.no_grad():
            self.step.clamp_(min=STEP_FLOOR)
        scale = (max(x.numel(), 1) * self.positive) ** -0.5
        return self.scaled(ScaleGradient.apply(self.step, scale)[:, None])

    def check_bits(self, bits: int) -> None:
        """Raises ValueError unless bits is an int from 1 (signed: 2) to 8."""
        lsq_levels("set_bits", bits, self.signed)

    def set_bits(self, bits: int) -> None:
        """Change the number of levels and keep the width of the range; the step changes with it."""
        self.check_bits(bits)
        levels = uniform_levels("set_bits", bits)
        with torch.no_grad():
            self.step.mul_(self.levels / levels)
        self.bits, self.levels = bits, levels
        self._set_offset()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if prefix + "step" in state_dict:
            self.calibrated = not bool(state_dict[prefix + "step"].isnan().any())

    def extra_repr(self) -> str:
        """The arguments, as they would be written, with the step as it is now."""
        step = "meta" if self.step.is_meta else f"{self.step.item():.4g}"
        return super().extra_repr() + f", signed={self.signed}, step={step}"


def lsq_levels(name: str, bits: int, signed: bool) -> int:
    """2^bits - 1. Raises ValueError unless bits is an int from 1, signed from 2, to 8."""
    levels = uniform_levels(name, bits)
    if signed and bits < 2:
        raise ValueError(f"{name}: signed LSQ needs at least 2 bits (with 1 bit Qp is 0), got {bits}; use BWN")
    return levels

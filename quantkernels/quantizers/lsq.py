"""LSQ: a quantizer whose step is learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import Kind, Ste
from .base import ScaledGrid, check_widths, uniform_levels
from .processes import average_over_processes, process_count

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
    per_bit: bit-widths with a step each, `bits` among them, such as [6, 5, 4, 3, 2]: `set_bits` chooses one
    of them and its step (LIMPQ, Tang et al. 2022, section 3). None: one step, which `set_bits` rescales.

    dL/dx = g*1[-Qn <= v <= Qp], dL/ds = sum g*(round(v) - v inside, -Qn below, Qp from Qp on) / sqrt(numel*Qp),
    v = x/s, numel all elements of x, of an activation those of all processes' batches together. At v = -Qn itself the
    step gets nothing (docs/numerics.md).

    `step` is a float32 parameter [1], or [len(per_bit)] with the highest bits first, NaN until the first training batch
    sets it to 2 E|x| / sqrt(Qp), the mean being that of all processes, or `set_step` does. It stays positive as
    PACT's alpha does: each training forward first raises a step below 1e-5 to 1e-5, eval clamps what it reads.
    The device is never waited for.
    """

    learned = True

    def __init__(self, bits: int, signed: bool | None = None, per_bit: Sequence[int] | None = None) -> None:
        levels = lsq_levels("LSQ", bits, signed is not False)
        super().__init__(bits, Kind.UNIFORM, levels, Ste.FULL, None, (float("inf"), 1.0, float("inf")))
        self.role_decides = signed is None
        self.batched = False
        self.signed = signed is not False
        self.per_bit = None if per_bit is None else check_widths("LSQ: per_bit", per_bit)
        self.index = 0
        if self.per_bit is not None:
            lsq_levels("LSQ: per_bit", self.per_bit[-1], self.signed)
            self.set_bits(bits)
        widths = len(self.widths)
        self.step = nn.Parameter(torch.full((widths,), float("nan")))
        self.register_buffer("divisor", self.divisor.repeat(widths, 1), persistent=False)
        self._set_offsets()

    @property
    def widths(self) -> list[int]:
        """The bit-widths of `step`'s elements."""
        return [self.bits] if self.per_bit is None else self.per_bit

    @property
    def negative(self) -> int:
        """Qn."""
        return 2 ** (self.bits - 1) if self.signed else 0

    @property
    def positive(self) -> int:
        """Qp."""
        return self.levels - self.negative

    def _set_offsets(self) -> None:
        # s / (-1/Qn) is -Qn*s without a rounding, since Qn is a power of two.
        for row, bits in zip(self.divisor, self.widths, strict=True):
            row[0] = -(2.0 ** (1 - bits)) if self.signed else float("inf")

    def track(self, momentum: float = 0.1) -> LSQ:
        """Become unsigned, unless `signed` was given: a layer calls this on its activation quantizer.
        Returns self."""
        self.batched = True
        if self.role_decides:
            self.signed = False
            self._set_offsets()
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
        size = 2 * average_over_processes(x.detach().float().abs().mean())
        positive = [2 ** (bits - 1) - 1 if self.signed else 2**bits - 1 for bits in self.widths]
        self.set_step(torch.stack([size / q**0.5 for q in positive]))

    @torch.no_grad()
    def set_step(self, step: Tensor) -> None:
        """Start from these steps, float32 in the shape of `step`, rather than from the first training batch."""
        if step.shape != self.step.shape:
            raise ValueError(f"set_step: step must have shape {list(self.step.shape)}, got {list(step.shape)}")
        self.step.copy_(step)
        self.calibrated = True

    def batch_grid(self, x: Tensor, stats: Tensor | None) -> Tensor:
        """(-Qn*s, s, 0), differentiable in s."""
        step: Tensor = self.step
        divisor = self.divisor
        if self.training:
            with torch.no_grad():
                step.clamp_(min=STEP_FLOOR)
            # of a batch each process has its part: the scale is that of the whole one
            numel = max(x.numel(), 1) * (process_count() if self.batched else 1)
            step = ScaleGradient.apply(step, (numel * self.positive) ** -0.5)
        else:
            step = step.clamp(min=STEP_FLOOR)
        if self.per_bit is not None:
            chosen = slice(self.index, self.index + 1)
            step, divisor = step[chosen], divisor[chosen]
        return step[:, None] / divisor

    def check_bits(self, bits: int) -> None:
        """Raises ValueError unless bits is an int from 1 (signed: 2) to 8, one of `per_bit` where that is given."""
        lsq_levels("set_bits", bits, self.signed)
        if self.per_bit is not None and bits not in self.per_bit:
            raise ValueError(f"set_bits: LSQ has steps for {self.per_bit} bits, not for {bits}")

    def set_bits(self, bits: int) -> None:
        """Use the step of that many bits, or without `per_bit` keep the width of the range with another step."""
        self.check_bits(bits)
        before, self.bits, self.levels = self.levels, bits, uniform_levels("set_bits", bits)
        if self.per_bit is not None:
            self.index = self.per_bit.index(bits)
            return
        with torch.no_grad():
            self.step.mul_(before / self.levels)
        self._set_offsets()

    @torch.no_grad()
    def copy_bits(self, source: int, target: int) -> None:
        """Give `target` bits the step of `source` bits, where `per_bit` has both."""
        if self.per_bit is not None:
            self.step[self.per_bit.index(target)] = self.step[self.per_bit.index(source)]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if prefix + "step" in state_dict:
            self.calibrated = not bool(state_dict[prefix + "step"].isnan().any())

    def extra_repr(self) -> str:
        """The arguments, as they would be written, with the step as it is now."""
        step = "meta" if self.step.is_meta else f"{self.step[self.index].item():.4g}"
        widths = "" if self.per_bit is None else f", per_bit={self.per_bit}"
        return super().extra_repr() + f", signed={self.signed}{widths}, step={step}"


def lsq_levels(name: str, bits: int, signed: bool) -> int:
    """2^bits - 1. Raises ValueError unless bits is an int from 1, signed from 2, to 8."""
    levels = uniform_levels(name, bits)
    if signed and bits < 2:
        raise ValueError(f"{name}: signed LSQ needs at least 2 bits (with 1 bit Qp is 0), got {bits}; use BWN")
    return levels

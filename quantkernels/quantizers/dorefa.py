"""DoReFa and its adaptive forms: weights squashed by tanh, then uniform levels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import Kind, Ste
from .base import MAX_BITS, Quantizer, uniform_levels
from .sharing import once


@torch.no_grad()
def squashed(x: Tensor) -> tuple[Tensor, Tensor]:
    """(tanh x in float32, max|tanh x| as a 0-d tensor); the maximum is 1 where it would be 0."""

    def compute() -> tuple[Tensor, Tensor]:
        tanh = torch.tanh(x.float())
        if x.numel() == 0:
            return tanh, tanh.new_ones(())
        largest = torch.linalg.vector_norm(tanh, torch.inf)
        return tanh, torch.where(largest > 0, largest, torch.ones_like(largest))

    return once(x, "squashed", compute)


class Squash(torch.autograd.Function):
    """A value with the gradient of gain * u, u = tanh x / max|tanh x|.

    tanh and the maximum come ready made and no graph leads to them: any number of forwards can share them, each with
    its own backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, tanh: Tensor, largest: Tensor, gain: Tensor | None) -> Tensor:
        """value, float32 in the shape of x. gain: 0-d, None for 1."""
        ctx.save_for_backward(tanh, largest, gain)
        ctx.dtype = x.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Through the quotient, to the largest |tanh| (shared by all that are) and to every tanh."""
        tanh, largest, gain = ctx.saved_tensors
        grad = grads[0] if gain is None else grads[0] * gain
        grad = grad / largest
        ends = tanh.abs() == largest
        share = (grad * tanh).sum() / largest / ends.sum().clamp(min=1)
        grad = grad - torch.where(ends, tanh.sign() * share, 0.0)
        return (grad * (1 - tanh * tanh)).to(ctx.dtype), None, None, None, None


class DoReFa(Quantizer):
    """q = 2*round(N*t)/N - 1, t = tanh w / (2 max|tanh w|) + 1/2, N = 2^bits - 1; Zhou et al. 2016, equation 9.

    With 1 bit q = sign(w) * E|w| (equation 8; 0 is positive), with the gradient passed unchanged. With more, rounding
    is passed straight through and the gradient goes on through tanh and the maximum. bits: 1 to 8. Per tensor, for
    weights: a layer refuses it for activations.
    """

    constants: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__(bits, Kind.UNIFORM, uniform_levels("DoReFa", bits), Ste.IDENTITY)
        # All grids there are, so that another number of bits is another row and nothing is written to the device.
        rows = [(-1.0, 2 / (2**n - 1), 0.0) for n in range(1, MAX_BITS + 1)]
        self.register_buffer("constants", torch.tensor(rows), persistent=False)
        self.set_bits(bits)

    def transform(self, x: Tensor) -> Tensor:
        """u = 2t - 1 in [-1, 1], float32; x itself with 1 bit."""
        if self.bits == 1:
            return x
        tanh, largest = squashed(x)
        return Squash.apply(x, tanh / largest, tanh, largest, None)

    def batch_grid(self, x: Tensor, stats: Tensor | None) -> Tensor:
        """(-1, 2/N, 0), or (-E|x|, 2 E|x|, 0) with 1 bit."""
        if self.bits > 1:
            return self.constants[self.bits - 1 : self.bits]
        scale = x.float().abs().mean() if x.numel() else x.new_zeros((), dtype=torch.float32)
        return torch.stack((-scale, 2 * scale, torch.zeros_like(scale)))[None]

    def check_bits(self, bits: int) -> None:
        """Raises ValueError unless bits is an int from 1 to 8."""
        uniform_levels("set_bits", bits)

    def set_bits(self, bits: int) -> None:
        """Take the levels of that many bits."""
        self.bits, self.levels = bits, uniform_levels("set_bits", bits)
        self.kind = Kind.BINARY if bits == 1 else Kind.UNIFORM


class NestedDoReFa(Quantizer):
    """What `ModifiedDoReFa` and `CentredDoReFa` share: the code with b bits is the first b bits of that with `highest`.

    `transform` is not t but the value on the grid that the code stands for, so that rounding to the grid is the
    floor(h / 2^(highest - bits)) of the papers, exactly. The gradient passes rounding, floor and scale unchanged (dq/dt
    = 2) and goes on through tanh and the maximum.

    rescale: q / sqrt(n_out * Var[q]), n_out = size of dimension 0, the scale being a constant of the gradient; AdaBits
    does this to the last layer, which no batch-norm follows.
    """

    nested = True

    def __init__(self, bits: int, highest: int = 8, rescale: bool = False) -> None:
        name = type(self).__name__
        uniform_levels(f"{name}(highest=...)", highest)
        super().__init__(bits, Kind.UNIFORM, uniform_levels(name, bits), Ste.IDENTITY)
        self.highest, self.rescale = highest, rescale
        self.check_bits(bits)

    def highest_codes(self, x: Tensor) -> Tensor:
        """h: the codes of x with `highest` bits, float32 integers."""
        raise TypeError(f"{type(self).__name__} must define highest_codes(x)")

    def levels_of(self, highest: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """(offset, step), 0-d. highest: h; codes: those with `bits` bits."""
        raise TypeError(f"{type(self).__name__} must define levels_of(highest, codes)")

    def _highest(self, x: Tensor) -> Tensor:
        return once(x, (type(self), self.highest), lambda: self.highest_codes(x))

    def _scaled(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(grid [1, 3], gain 0-d)."""

        def compute() -> tuple[Tensor, Tensor | None]:
            if x.numel() == 0:
                return torch.tensor([[-1.0, 2 / self.levels, 0.0]], device=x.device), None
            highest = self._highest(x)
            codes = torch.floor(highest * 2.0 ** (self.bits - self.highest))
            offset, step = self.levels_of(highest, codes)
            gain = None
            if self.rescale:
                variance = step * step * codes.var(correction=0) * (x.shape[0] if x.dim() else 1)
                gain = torch.where(variance > 0, variance, torch.ones_like(variance)).rsqrt()
                offset, step = offset * gain, step * gain
            return torch.stack((offset, step, torch.zeros_like(step)))[None], gain

        with torch.no_grad():
            return once(x, (type(self), self.highest, self.rescale, self.bits), compute)

    def batch_grid(self, x: Tensor, stats: Tensor | None) -> Tensor:
        """(offset, step, 0) of the level formula."""
        return self._scaled(x)[0]

    def transform(self, x: Tensor) -> Tensor:
        """The middle of what rounds to the code, float32: within half a step of its level."""
        tanh, largest = squashed(x)
        grid, gain = self._scaled(x)
        with torch.no_grad():
            dropped = 2.0 ** (self.highest - self.bits)
            offset, step = grid[0, 0], grid[0, 1]
            # h / dropped = code + some of 0, 1/dropped, ..., 1 - 1/dropped: centred, all of these round to the code.
            value = torch.addcmul(offset - step * (0.5 - 0.5 / dropped), self._highest(x), step / dropped)
        return Squash.apply(x, value, tanh, largest, gain)

    def check_bits(self, bits: int) -> None:
        """Raises ValueError unless bits is an int from 1 to `highest`."""
        uniform_levels("set_bits", bits)
        if bits > self.highest:
            raise ValueError(f"set_bits: {type(self).__name__}(highest={self.highest}) cannot have {bits} bits")

    def set_bits(self, bits: int) -> None:
        """Take the first `bits` bits of the codes."""
        self.check_bits(bits)
        self.bits, self.levels = bits, uniform_levels("set_bits", bits)

    def extra_repr(self) -> str:
        """The arguments, as they would be written."""
        return super().extra_repr() + f", highest={self.highest}" + (", rescale=True" if self.rescale else "")


class ModifiedDoReFa(NestedDoReFa):
    """q = 2*(l/(2^B - 1))*(mean h/mean l) - 1, h = round((2^B - 1) t), l = floor(h/2^(B - b))*2^(B - b); CoQuant.

    t = tanh w / (2 max|tanh w|) + 1/2, b = bits, B = highest. At b = B > 1 it is `DoReFa`. The ratio of means is 1
    where l is 0 everywhere. Per tensor, for weights.
    """

    def highest_codes(self, x: Tensor) -> Tensor:
        """round((2^B - 1) t)."""
        tanh, largest = squashed(x)
        half = (2**self.highest - 1) / 2
        return (tanh / largest + 1).mul_(half).round_()

    def levels_of(self, highest: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """(-1, 2*2^(B - b)/(2^B - 1) * mean h/mean l)."""
        dropped = 2.0 ** (self.highest - self.bits)
        low = codes.mean() * dropped
        ratio = torch.where(low > 0, highest.mean() / low, torch.ones_like(low))
        return -torch.ones_like(ratio), ratio * (2 * dropped / (2**self.highest - 1))


class CentredDoReFa(NestedDoReFa):
    """q = 2*(min(floor(2^b t), 2^b - 1) + 1/2)/2^b - 1, t = tanh w / (2 max|tanh w|) + 1/2; AdaBits.

    Each level is the centre of the interval that it stands for; the levels are symmetric and none is 0. Per tensor,
    for weights.
    """

    def highest_codes(self, x: Tensor) -> Tensor:
        """min(floor(2^B t), 2^B - 1)."""
        tanh, largest = squashed(x)
        return (tanh / largest + 1).mul_(2.0 ** (self.highest - 1)).floor_().clamp_(max=2**self.highest - 1)

    def levels_of(self, highest: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """(2^-b - 1, 2^(1 - b))."""
        step = codes.new_full((), 2.0 ** (1 - self.bits))
        return step / 2 - 1, step

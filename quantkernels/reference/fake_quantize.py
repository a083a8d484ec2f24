"""One quantizer: q = offset + step * code, and its straight-through gradients.

`grid` is float32 [C, 3]: offset, step, threshold of each channel. `kind` says how the code is found,
`levels` is the highest code, `ste` how the gradient passes (docs/numerics.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .stats import rows_of

UNIFORM, BINARY, TERNARY, IDENTITY = 0, 1, 2, 3
IDENTITY_STE, CLIP_STE, FULL_STE = 0, 1, 2


def columns_of(grid: Tensor, x: Tensor, axis: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """offset, step, threshold, each shaped to broadcast against x."""
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = grid.shape[0]
    offset, step, threshold = (grid[:, column].reshape(shape) for column in range(3))
    return offset, step, threshold


def inverse_of(step: Tensor) -> Tensor:
    """The float32 reciprocal, or 0 where the step is not positive or its reciprocal is not finite."""
    reciprocal = 1.0 / step
    return torch.where((step > 0) & reciprocal.isfinite(), reciprocal, torch.zeros_like(step))


def position(x: Tensor, grid: Tensor, axis: int | None) -> Tensor:
    """v = (x - offset) * inv_step in float32: where x lies on the grid, before clamping and rounding."""
    offset, step, _ = columns_of(grid, x, axis)
    return (x.float() - offset) * inverse_of(step)


def float_codes(x: Tensor, grid: Tensor, kind: int, levels: int, axis: int | None) -> Tensor:
    """The codes of x as float32, NaN where a uniform quantizer meets a NaN."""
    if kind == UNIFORM:
        return position(x, grid, axis).clamp(0, levels).round()
    if kind == BINARY:
        return (x >= 0).float()
    if kind == TERNARY:
        threshold = columns_of(grid, x, axis)[2]
        value = x.float()
        return (value > -threshold).float() + (value > threshold).float()
    raise ValueError(f"kind must be 0 (uniform), 1 (binary) or 2 (ternary), got {kind}")


def dequantize(codes: Tensor, grid: Tensor, axis: int | None) -> Tensor:
    """offset + step * code: two float32 roundings."""
    offset, step, _ = columns_of(grid, codes, axis)
    return offset + step * codes.float()


def channel_sum(value: Tensor, axis: int | None) -> Tensor:
    """float32 [C]: the sum over everything but the channel, accumulated in float64."""
    return rows_of(value, axis).double().sum(1).float()


def fake_quantize(
    x: Tensor, grid: Tensor, kind: int, levels: int, ste: int = IDENTITY_STE, axis: int | None = None
) -> Tensor:
    """q, in the shape and dtype of x: float32 arithmetic and one rounding at the store."""
    return dequantize(float_codes(x, grid, kind, levels, axis), grid, axis).to(x.dtype)


def fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    grid: Tensor,
    kind: int,
    levels: int,
    ste: int = IDENTITY_STE,
    axis: int | None = None,
) -> tuple[Tensor, Tensor]:
    """grad_x in the dtype of x, and float32 [C, 3]: sums of g below the range, of g above it, of g*(code -
    v) inside.

    With the identity straight-through estimator, and for binary and ternary quantizers, the sums are zero; the
    last one is also zero with clip, which does not use it.
    """
    if kind != UNIFORM or ste == IDENTITY_STE:
        return grad.to(x.dtype), torch.zeros_like(grid)
    g = grad.float()
    v = position(x, grid, axis)
    mask = (v >= 0) & (v <= levels)
    below, above = v < 0, v >= levels
    inside = ~(below | above)
    code = float_codes(x, grid, kind, levels, axis)
    terms = [
        torch.where(below, g, 0.0),
        torch.where(above, g, 0.0),
        torch.where(inside, g * (code - v), 0.0) if ste == FULL_STE else torch.zeros_like(g),
    ]
    sums = torch.stack([channel_sum(term, axis) for term in terms], 1)
    return torch.where(mask, g, 0.0).to(x.dtype), sums


def fake_quantize_masked(x: Tensor, grid: Tensor, levels: int, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """q, and whether 0 <= v <= levels: bit i % 32 of int32 word i // 32 for element i of x in memory, zeros behind."""
    v = position(x, grid, axis)
    inside = torch.empty_like(x, dtype=torch.bool).copy_((v >= 0) & (v <= levels))
    bits = inside.as_strided((inside.numel(),), (1,)).long()
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 32)).view(-1, 32)
    return fake_quantize(x, grid, UNIFORM, levels, CLIP_STE, axis), (bits << torch.arange(32)).sum(1).int()


def apply_mask(grad: Tensor, mask: Tensor) -> Tensor:
    """grad where the bit of its place in memory is set, else 0."""
    bits = (mask[:, None] >> torch.arange(32)) & 1
    kept = torch.empty_like(grad, dtype=torch.bool)
    kept.as_strided((grad.numel(),), (1,)).copy_(bits.flatten()[: grad.numel()])
    return torch.where(kept, grad, torch.zeros_like(grad))


def differentiable_fake_quantize(
    x: Tensor, grid: Tensor, kind: int, levels: int, ste: int = IDENTITY_STE, axis: int | None = None
) -> Tensor:
    """The same q, built so that autograd itself finds the straight-through gradients of x and of the grid.

    Clip differentiates clip(x, offset, offset + levels*step); full differentiates offset + step*round(v) with
    v = (x - offset)/step and round passing its gradient through. In both, v == levels counts as above the
    range for the grid (PACT: 1[x >= alpha]) and still passes the gradient to x.
    """
    q = fake_quantize(x, grid.detach(), kind, levels, ste, axis).float().detach()
    value = x.float()
    if kind != UNIFORM or ste == IDENTITY_STE:
        return (q + (value - value.detach())).to(x.dtype)
    offset, step, _ = columns_of(grid, x, axis)
    place = position(x, grid, axis).detach()
    below, above = place < 0, place >= levels
    if ste == CLIP_STE:
        smooth = torch.where(below, offset, torch.where(above, offset + levels * step, value))
    else:
        v = (value - offset) / torch.where(inverse_of(step.detach()) > 0, step, 1.0)
        rounded = v + (place.clamp(0, levels).round() - v).detach()
        smooth = offset + step * torch.where(below, 0.0, torch.where(above, float(levels), rounded))
    at_end = torch.where(place == levels, value - value.detach(), 0.0)
    return (q + (smooth - smooth.detach()) + at_end).to(x.dtype)

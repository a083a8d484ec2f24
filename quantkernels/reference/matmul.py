"""A linear layer on codes: exact integer sums, then one float32 epilogue (docs/numerics.md)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .bitplanes import LEARNED, encode, plane_bits, unpack_bitplanes
from .fake_quantize import TERNARY, columns_of, float_codes
from .learned_basis import learned_basis_encode

INF = float("inf")

Coding = tuple[Tensor, int, int]
"""grid, kind and levels."""


def activation_codes(x: Tensor, grid: Tensor, kind: int, levels: int) -> Tensor:
    """int64 codes of an activation: encoded if it is floating, taken as it is if it holds uint8 codes."""
    if x.dtype == torch.uint8:
        return x.long()
    return (learned_basis_encode(x, grid) if kind == LEARNED else encode(x, grid, kind, levels, None)).long()


def digits(codes: Tensor, kind: int, levels: int) -> list[Tensor]:
    """Bits of codes as float64, in the order in which products by planes add them: the least significant first."""
    planes = plane_bits(codes, kind, levels)
    return [plane.double() for plane in (planes if kind == TERNARY else reversed(planes))]


def digit_steps(grid: Tensor, kind: int, count: int) -> Tensor:
    """float32 [C, count]: what each bit of a code adds to the value."""
    if kind == LEARNED:
        return grid[:, 1:]
    weights = [1.0 if kind == TERNARY else 2.0**d for d in range(count)]
    return grid[:, 1:2] * torch.tensor(weights, device=grid.device)


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """float32 a * b + c, rounded once.

    In float64 the product is exact; the sum is rounded to odd (Boldo and Melquiond, 2008): where it loses something,
    its last bit is 1, which makes the rounding to float32 that of the exact sum, ties among the float32 included.
    """
    product, c = torch.broadcast_tensors(a.double() * b.double(), c.double())
    total = product + c
    back = total - product
    lost = (product - (total - back)) + (c - back)
    bits = total.view(torch.int64)
    to_odd = torch.where((lost > 0) == (total > 0), 1, -1)
    even = (bits & 1) == 0
    return torch.where(even & torch.isfinite(lost) & (lost != 0), bits + to_odd, bits).view(torch.float64).float()


Product = Callable[[Tensor, Tensor], Tensor]
"""What multiplies an activation and a weight in float64, the result that of exact integers."""


def exact_sums(
    codes: Tensor, weight: Tensor, x_coding: Coding, w_coding: Coding, channel_axis: int, product: Product
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor, Tensor]:
    """D, SA, SW and V, and the grids of activation and weight that go with them.

    Where a basis is learned they are sums over the digits of both codes, which have the steps in them, and the grids
    have steps of 1. codes and weight: int64, as ``product`` takes them.
    """
    ones = torch.ones_like(codes).double(), torch.ones_like(weight).double()
    count = product(*ones)
    (x_grid, x_kind, x_levels), (w_grid, w_kind, w_levels) = x_coding, w_coding
    if LEARNED not in (x_kind, w_kind):
        a, w = codes.double(), weight.double()
        return (product(a, w), product(a, ones[1]), product(ones[0], w), count), x_grid, w_grid
    x_digits, w_digits = digits(codes, x_kind, x_levels), digits(weight, w_kind, w_levels)
    x_steps, w_steps = digit_steps(x_grid, x_kind, len(x_digits))[0], digit_steps(w_grid, w_kind, len(w_digits))
    shape = [1] * count.dim()
    shape[channel_axis] = w_grid.shape[0]
    dot = activation = weights = torch.zeros_like(count, dtype=torch.float32)
    for w_digit, w_step in zip(w_digits, w_steps.unbind(1), strict=True):
        for x_digit, x_step in zip(x_digits, x_steps, strict=True):
            dot = dot + (w_step * x_step).reshape(shape) * product(x_digit, w_digit).float()
        weights = weights + w_step.reshape(shape) * product(ones[0], w_digit).float()
    for x_digit, x_step in zip(x_digits, x_steps, strict=True):
        activation = activation + x_step * product(x_digit, ones[1]).float()
    unit = x_grid.new_tensor([0.0, 1.0, 0.0])
    x_unit, w_unit = (functional.pad(grid[:, :1], (0, 2)) + unit for grid in (x_grid, w_grid))
    return (dot, activation, weights, count), x_unit, w_unit


def epilogue(
    sums: tuple[Tensor, Tensor, Tensor, Tensor],
    x_grid: Tensor,
    w_grid: Tensor,
    channel_axis: int,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    lower: float,
    upper: float,
    out_grid: Tensor | None,
    out_kind: int,
    out_levels: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """sa*(sw*D + ow*SA) + oa*(sw*SW + ow*V), + bias, *scale + shift, clamped to [lower, upper], and codes
    where out_grid is given.

    Sums D, SA, SW, V are exact integers, rounded to float32 once; each operation after that is one float32
    rounding, "* scale + shift" together too.
    """
    dot, activation_sum, weight_sum, count = (value.float() for value in sums)
    offset_a, step_a = x_grid[0, 0], x_grid[0, 1]
    offset_w, step_w, _ = columns_of(w_grid, dot, None if w_grid.shape[0] == 1 else channel_axis)
    y = step_a * (step_w * dot + offset_w * activation_sum) + offset_a * (step_w * weight_sum + offset_w * count)
    shape = [1] * y.dim()
    shape[channel_axis] = y.shape[channel_axis]
    if bias is not None:
        y = y + bias.float().reshape(shape)
    if scale is not None and shift is not None:
        y = fused_multiply_add(y, scale.reshape(shape), shift.reshape(shape))
    y = torch.where(y < lower, lower, y)
    y = torch.where(y > upper, upper, y)
    if out_grid is None:
        return y.to(out_dtype)
    if out_kind == LEARNED:
        return learned_basis_encode(y, out_grid)
    codes = float_codes(y, out_grid, out_kind, out_levels, None)
    return torch.nan_to_num(codes, nan=0.0).to(torch.uint8)


def lowbit_linear(
    x: Tensor,
    x_grid: Tensor,
    x_kind: int,
    x_levels: int,
    planes: Tensor,
    w_grid: Tensor,
    w_kind: int,
    w_levels: int,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    lower: float = -INF,
    upper: float = INF,
    out_grid: Tensor | None = None,
    out_kind: int = 0,
    out_levels: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x [..., features], floating or uint8 codes; planes int32 [bits, out_features, words] -> [...,
    out_features].

    x_grid is float32 [1, 3]; w_grid float32 [1, 3] or [out_features, 3]; of a learned basis with 1 + bits columns.
    """
    features = x.shape[-1]
    weight = unpack_bitplanes(planes, w_kind, features).long()
    codes = activation_codes(x, x_grid, x_kind, x_levels)
    sums, x_unit, w_unit = exact_sums(
        codes,
        weight,
        (x_grid, x_kind, x_levels),
        (w_grid, w_kind, w_levels),
        codes.dim() - 1,
        lambda a, w: a @ w.t(),  # float64 holds every sum here exactly
    )
    if out_dtype is None:
        out_dtype = x.dtype if x.is_floating_point() else torch.float32
    return epilogue(
        sums,
        x_unit,
        w_unit,
        codes.dim() - 1,
        bias,
        scale,
        shift,
        lower,
        upper,
        out_grid,
        out_kind,
        out_levels,
        out_dtype,
    )

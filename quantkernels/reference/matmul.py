"""A linear layer on codes: exact integer sums, then one float32 epilogue (docs/numerics.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from .bitplanes import encode, unpack_bitplanes
from .fake_quantize import columns_of, float_codes

INF = float("inf")


def activation_codes(x: Tensor, grid: Tensor, kind: int, levels: int) -> Tensor:
    """int64 codes of an activation: encoded if it is floating, taken as it is if it holds uint8 codes."""
    return x.long() if x.dtype == torch.uint8 else encode(x, grid, kind, levels, None).long()


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
        # A fused multiply-add: in float64 the product is exact, so this rounds once.
        y = (y.double() * scale.double().reshape(shape) + shift.double().reshape(shape)).float()
    y = torch.where(y < lower, lower, y)
    y = torch.where(y > upper, upper, y)
    if out_grid is None:
        return y.to(out_dtype)
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

    x_grid is float32 [1, 3]; w_grid float32 [1, 3] or [out_features, 3].
    """
    features = x.shape[-1]
    weight = unpack_bitplanes(planes, w_kind, features).double()
    codes = activation_codes(x, x_grid, x_kind, x_levels).double()  # float64 holds every sum here exactly
    dot = codes @ weight.t()
    activation_sum = codes.sum(-1, keepdim=True).expand_as(dot)
    weight_sum = weight.sum(1).expand_as(dot)
    count = torch.full_like(dot, features)
    if out_dtype is None:
        out_dtype = x.dtype if x.is_floating_point() else torch.float32
    sums = (dot, activation_sum, weight_sum, count)
    return epilogue(
        sums,
        x_grid,
        w_grid,
        dot.dim() - 1,
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

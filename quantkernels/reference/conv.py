"""A convolution on codes. A padded tap contributes nothing at all: every sum runs over valid taps only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .bitplanes import unpack_bitplanes
from .matmul import INF, activation_codes, epilogue, exact_sums


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """(n, n) of an int n, or the two values of a sequence."""
    if isinstance(value, int):
        return value, value
    height, width = value
    return int(height), int(width)


def four_sides(padding: int | Sequence[int]) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of an int, of (vertical, horizontal), or of the four themselves."""
    if isinstance(padding, int) or len(padding) == 2:
        vertical, horizontal = pair(padding)
        return vertical, vertical, horizontal, horizontal
    top, bottom, left, right = padding
    return top, bottom, left, right


def lowbit_conv2d(
    x: Tensor,
    x_grid: Tensor,
    x_kind: int,
    x_levels: int,
    planes: Tensor,
    w_grid: Tensor,
    w_kind: int,
    w_levels: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
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
    """x [N, C, H, W], floating or uint8 codes; planes int32 [bits, out_channels, words] -> [N, out_channels,
    H', W'].

    padding is one number, (vertical, horizontal) or (top, bottom, left, right). The rows of `planes` are one
    output channel of one group in (kh, kw, cin) order. The four sums are float64 convolutions of the codes
    and of ones: integers, exact, and zero on padding because padding adds zeros to each.
    """
    kernel = pair(kernel_size)
    channels = x.shape[1] // groups
    out_channels = planes.shape[1]
    rows = unpack_bitplanes(planes, w_kind, kernel[0] * kernel[1] * channels)
    weight = rows.reshape(out_channels, kernel[0], kernel[1], channels).permute(0, 3, 1, 2).long()
    codes = activation_codes(x, x_grid, x_kind, x_levels)

    top, bottom, left, right = four_sides(padding)

    def convolve(image: Tensor, taps: Tensor) -> Tensor:
        padded = functional.pad(image, (left, right, top, bottom))
        result = functional.conv2d(padded, taps, None, pair(stride), 0, pair(dilation), groups)
        return result.round()  # whatever algorithm ran, the exact result is an integer below 2^52

    codings = (x_grid, x_kind, x_levels), (w_grid, w_kind, w_levels)
    sums, x_unit, w_unit = exact_sums(codes, weight, *codings, 1, convolve)
    if out_dtype is None:
        out_dtype = x.dtype if x.is_floating_point() else torch.float32
    return epilogue(
        sums, x_unit, w_unit, 1, bias, scale, shift, lower, upper, out_grid, out_kind, out_levels, out_dtype
    )

"""A convolution on codes: exact integer sums over the valid taps and one float epilogue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._dispatch import call_without_gradient
from ._register import OpRules, rules
from .matmul import INF, output_dtype


def pair(name: str, value: int | Sequence[int], op: str = "lowbit_conv2d") -> list[int]:
    """[n, n] of an int n, or the two numbers of a sequence."""
    numbers = [value, value] if isinstance(value, int) else list(value)
    if len(numbers) != 2:
        raise ValueError(f"{op}: {name} must be an int or 2 of them, got {value!r}")
    return numbers


def four_sides(padding: int | Sequence[int]) -> list[int]:
    """[top, bottom, left, right] of an int, of (vertical, horizontal), or of the four themselves."""
    numbers = [padding] * 4 if isinstance(padding, int) else list(padding)
    if len(numbers) == 2:
        numbers = [numbers[0], numbers[0], numbers[1], numbers[1]]
    if len(numbers) != 4:
        raise ValueError(f"lowbit_conv2d: padding must be an int, 2 or 4 of them, got {padding!r}")
    return numbers


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
    prepacked: Tensor | None = None,
) -> Tensor:
    """Convolution of a quantized activation with a packed quantized weight, computed on their codes.

    The formula is that of :func:`lowbit_linear`, with all sums over the V taps of a window that lie inside the image::

        y = sa*(sw*D + ow*SA) + oa*(sw*SW + ow*V)        D = sum ca*cw, SA = sum ca, SW = sum cw

    A padded tap has the value 0, which need not be a code of the quantizer, so it contributes to none of the sums, nor
    to those over bit-planes where a basis is learned.

    Args:
        x: [batch, channels, height, width]. float32, float16 or bfloat16 values, encoded by ``x_grid`` (NaN gives code
            0); or uint8 codes. Contiguous and channels_last are read as they are, other layouts copied once.
        planes: int32 [bits, out_channels, words], the packed rows of the output channels, each in (kh, kw,
            in_channels / groups) order: words = ceil(kh * kw * in_channels / groups / 32).
        w_grid: float32 [1, 3], or [out_channels, 3] with a grid an output channel; 1 + n columns where it is learned.
        kernel_size, stride, dilation: an int or (vertical, horizontal).
        padding: an int, (vertical, horizontal), or (top, bottom, left, right).
        groups: a divisor of x's channels and of out_channels.
        bias, scale, shift: float32 [out_channels].
        x_grid, x_kind, x_levels, w_kind, w_levels, lower, upper, out_grid, out_kind, out_levels, out_dtype, prepacked:
            as in :func:`lowbit_linear`.

    Returns:
        [batch, out_channels, out_height, out_width]: channels_last where x is channels_last and not contiguous, else
        contiguous. For inference: no gradient passes, whatever requires one.

    Raises:
        RuntimeError: naming the argument, what it must be and what it was.
        ValueError: for a size argument of the wrong length.
    """
    sizes = pair("kernel_size", kernel_size), pair("stride", stride), four_sides(padding), pair("dilation", dilation)
    geometry: tuple[Any, ...] = (*sizes, groups)
    return call_without_gradient(
        "lowbit_conv2d",
        x,
        x_grid,
        x_kind,
        x_levels,
        planes,
        w_grid,
        w_kind,
        w_levels,
        *geometry,
        bias,
        scale,
        shift,
        lower,
        upper,
        out_grid,
        out_kind,
        out_levels,
        out_dtype,
        prepacked,
    )


def _fake(
    x: Tensor,
    x_grid: Tensor,
    x_kind: int,
    x_levels: int,
    planes: Tensor,
    w_grid: Tensor,
    w_kind: int,
    w_levels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    lower: float,
    upper: float,
    out_grid: Tensor | None,
    out_kind: int,
    out_levels: int,
    out_dtype: torch.dtype | None,
    prepacked: Tensor | None = None,
) -> Tensor:
    batch, _, height, width = x.shape
    out_height = (height + padding[0] + padding[1] - dilation[0] * (kernel_size[0] - 1) - 1) // stride[0] + 1
    out_width = (width + padding[2] + padding[3] - dilation[1] * (kernel_size[1] - 1) - 1) // stride[1] + 1
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.empty(
        (batch, planes.shape[1], out_height, out_width),
        dtype=output_dtype(x, out_grid, out_dtype),
        device=x.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


rules("lowbit_conv2d", OpRules(_fake))

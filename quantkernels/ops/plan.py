"""Which CUDA kernel a low-bit product is given, without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._library import _host
from .conv import four_sides, pair


def plan(
    shape: Sequence[int],
    out_channels: int,
    kernel_size: int | Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    x_bits: int,
    w_bits: int,
    learned: bool = False,
    architecture: int = 90,
    multiprocessors: int = 132,
) -> dict[str, Any]:
    """The kernel that CUDA runs for ``lowbit_linear`` (``kernel_size`` None) or ``lowbit_conv2d``.

    Args:
        shape: of x: [..., in_features] or [batch, channels, height, width].
        out_channels: or out_features.
        kernel_size, stride, padding, dilation, groups: as ``lowbit_conv2d`` takes them.
        x_bits, w_bits: bits of the codes, 1 to 8.
        learned: whether the basis of an operand is learned, so that pairs of bit-planes are multiplied.
        architecture: the device's compute capability, 80 for 8.0.
        multiprocessors: of the device.

    Returns:
        ``engine``: "dot product" or "plane product" (weights streamed once: dp4a, or popcounts), "depthwise" (direct),
        "bytes" or "bits" (tensor cores on codes or on bit-planes); for the last two also ``tile`` (output channels,
        pixels) of a block, ``copy_bytes`` that one copy of the activation moves, ``steps`` of 128 bytes of depth,
        ``splits`` that share them, and ``blocks`` in all.

    Raises:
        ValueError: where the numbers describe no product.
    """
    *batch, last = shape
    if kernel_size is None:
        rows = 1
        for size in batch:
            rows *= size
        geometry = [rows, last, 1, 1, out_channels, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1]
    else:
        if len(shape) != 4:
            raise ValueError(f"plan: shape must be [batch, channels, height, width], got {list(shape)}")
        kernel, step, spread = pair("kernel_size", kernel_size), pair("stride", stride), pair("dilation", dilation)
        top, bottom, left, right = four_sides(padding)
        out = [
            (size + border - d * (k - 1) - 1) // s + 1
            for size, border, k, s, d in zip(shape[2:], (top + bottom, left + right), kernel, step, spread, strict=True)
        ]
        geometry = [*shape, out_channels, *out, *kernel, *step, top, left, *spread, groups]
    return _host.plan(geometry, x_bits, w_bits, learned, architecture, multiprocessors)

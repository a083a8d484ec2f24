"""Packed weights arranged once for all calls of a product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._dispatch import call_without_gradient
from ._register import OpRules, rules
from .conv import pair


def prepack_weight(
    planes: Tensor,
    w_kind: int,
    w_levels: int,
    channels: int,
    kernel_size: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """A packed weight as the kernels of its device read it, for the argument ``prepacked`` of the low-bit products.

    On a CPU with AVX-512 these are panels of channels side by side whose bytes hold as many codes as fit (3 bits take
    4, 5 to 7 take 8), and the sums of their taps: about as much memory as the planes. What it looks like may change
    with every version and every processor, so it is not for files.

    Args:
        planes: int32 [bits, out_channels, ceil(kh * kw * channels / 32)].
        w_kind, w_levels: as for :func:`lowbit_linear`.
        channels: codes of a tap, in_channels / groups or in_features.
        kernel_size: of a convolution, an int or (vertical, horizontal); 1 of a linear layer.
        groups: of a convolution.

    Returns:
        uint8 [n]; empty where the backend has no use for it (other processors, GPUs, learned bases, depthwise
        convolutions).

    Raises:
        RuntimeError: naming the argument, what it must be and what it was.
        ValueError: for a kernel_size of the wrong length.
    """
    kernel = pair("kernel_size", kernel_size, "prepack_weight")
    return call_without_gradient("prepack_weight", planes, w_kind, w_levels, channels, kernel, groups)


def _fake(planes: Tensor, w_kind: int, w_levels: int, channels: int, kernel_size: Sequence[int], groups: int) -> Tensor:
    return planes.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.uint8)


rules("prepack_weight", OpRules(_fake))

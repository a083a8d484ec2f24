"""A linear layer on codes: exact integer dot products and one float epilogue."""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import call_without_gradient
from ._register import OpRules, rules

INF = float("inf")


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
    prepacked: Tensor | None = None,
) -> Tensor:
    """Product of a quantized activation and a packed quantized weight, computed on their codes.

    With codes ca, cw and values q = offset + step * code, each output is::

        y = sa*(sw*D + ow*SA) + oa*(sw*SW + ow*K)        D = sum ca*cw, SA = sum ca, SW = sum cw

    The sums are exact integers, each rounded to float32 once; then float32, in this order, nothing fused: ``+ bias``,
    ``* scale + shift``, the clamp to [lower, upper], and the encoding by ``out_grid``.

    A learned basis has a step for each bit of its code. Where an operand's is learned, bit-planes are multiplied, those
    of the other operand with the steps that its bits have (a uniform one's are step * 2^i)::

        y = sum_ij (sw_i*sa_j)*D_ij + ow*A + oa*(W + ow*K)      A = sum_j sa_j*SA_j, W = sum_i sw_i*SW_i

    from the lowest bit on, the weight's bits outside. D_ij counts the ones that plane i and plane j share, SA_j and
    SW_i their own.

    Args:
        x: [..., in_features]. float32, float16 or bfloat16 values, encoded by ``x_grid`` (NaN gives code 0); or uint8
            codes.
        x_grid: float32 [1, 3], the row (offset, step, threshold) of the activation's quantizer; of a learned basis
            [1, 1 + n], the offset and the step of each bit.
        x_kind: 0 uniform, 1 binary, 2 ternary, 4 learned: a :class:`~quantkernels.ops.Kind`.
        x_levels: the highest code: 2^n - 1 for uniform and learned with n from 1 to 8, 1 for binary, 2 for ternary.
        planes: int32 [bits, out_features, ceil(in_features / 32)], as ``pack_bitplanes`` makes them from the weight's
            codes.
        w_grid: float32 [1, 3], or [out_features, 3] with a grid an output channel; 1 + n columns where it is learned.
        w_kind, w_levels: as for x.
        bias: float32 [out_features].
        scale, shift: float32 [out_features], both or neither: a folded batch-norm.
        lower, upper: the output is clamped to this range; (0, inf) is ReLU.
        out_grid: float32 [1, 3] or [1, 1 + n]: the output is then the uint8 codes of ``out_kind`` and ``out_levels``,
            ready for the next layer; they are taken from the float32 result.
        out_dtype: float32, float16 or bfloat16; default that of x, float32 where x holds codes.
        prepacked: what :func:`prepack_weight` made of ``planes``: the same result, sooner. A backend that has no use
            for it goes by the planes.

    Returns:
        [..., out_features], contiguous. For inference: no gradient passes, whatever requires one.

    Raises:
        RuntimeError: naming the argument, what it must be and what it was.
    """
    return call_without_gradient(
        "lowbit_linear",
        x,
        x_grid,
        x_kind,
        x_levels,
        planes,
        w_grid,
        w_kind,
        w_levels,
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


def output_dtype(x: Tensor, out_grid: Tensor | None, out_dtype: torch.dtype | None) -> torch.dtype:
    """uint8 for codes, else ``out_dtype``, x's own, or float32 where x holds codes."""
    if out_grid is not None:
        return torch.uint8
    if out_dtype is not None:
        return out_dtype
    return x.dtype if x.is_floating_point() else torch.float32


def _fake(
    x: Tensor,
    x_grid: Tensor,
    x_kind: int,
    x_levels: int,
    planes: Tensor,
    w_grid: Tensor,
    w_kind: int,
    w_levels: int,
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
    return x.new_empty((*x.shape[:-1], planes.shape[1]), dtype=output_dtype(x, out_grid, out_dtype))


rules("lowbit_linear", OpRules(_fake))

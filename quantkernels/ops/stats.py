"""What quantizers need to know of a tensor: range, moments, conditional mean, error of candidate ranges.

Results are float32 on the device of x and have no gradient: statistics are constants of a quantizer's backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._dispatch import call
from ._register import OpRules, rules


def channel_stats(x: Tensor, axis: int | None = None) -> Tensor:
    """Minimum, maximum, sum of |x| and sum of x^2 of each channel, in one pass.

    Args:
        x: any shape and memory layout; float32, float16 or bfloat16. Sums are accumulated in at least float32.
        axis: the channel dimension, or None for the whole tensor.

    Returns:
        float32 [C, 4], C = ``x.size(axis)`` or 1: min, max, sum |x|, sum x^2. A NaN in a channel makes all four NaN; a
        channel without elements has zeros. Not differentiable.

    Raises:
        RuntimeError: naming the argument, what it must be and what it was.
    """
    return call("channel_stats", x, axis)


def minmax_grids(x: Tensor, levels: Sequence[int], axis: int | None = None) -> Tensor:
    """The grids of min-max quantizers of K widths, in one pass: what ``channel_stats`` finds, on its way to
    ``fake_quantize`` and ``attention_quantize`` without further ops (DQA, equations 9 to 11).

    Args:
        x: any shape and memory layout; float32, float16 or bfloat16.
        levels: K highest codes, each 2^n - 1 with n from 1 to 8; K from 1 to 8.
        axis: the channel dimension, or None for the whole tensor (C = 1).

    Returns:
        float32 [K, C, 3]: min, (max - min) / levels[k], 0. A NaN in a channel makes its offset and step NaN; a channel
        without elements has zeros. Not differentiable.

    Raises:
        RuntimeError: naming the argument, what it must be and what it was.
    """
    return call("minmax_grids", x, levels, axis)


def conditional_abs_mean(x: Tensor, threshold: Tensor, axis: int | None = None) -> Tensor:
    """Mean of |x| over the elements with |x| > threshold: the scale of a ternary quantizer (Li et al., Ternary weight
    networks, 2016, equation 6).

    Args:
        x: any shape and memory layout; float32, float16 or bfloat16.
        threshold: float32 [C].
        axis: the channel dimension, or None for the whole tensor (C = 1).

    Returns:
        float32 [C]; 0 where no element exceeds the threshold. Not differentiable.

    Raises:
        RuntimeError: naming the argument, what it must be and what it was.
    """
    return call("conditional_abs_mean", x, threshold, axis)


def range_errors(x: Tensor, candidates: Tensor, levels: int, axis: int | None = None) -> Tensor:
    """Squared error of uniform quantization for each of J symmetric ranges (DQA, equation 12).

    Args:
        x: any shape and memory layout; float32, float16 or bfloat16.
        candidates: float32 [C, J], the ranges a: ``levels`` steps on [-a, a].
        levels: the highest code, 2^n - 1 with n from 1 to 8.
        axis: the channel dimension, or None for the whole tensor (C = 1).

    Returns:
        float32 [C, J]: sum of (Q(x) - x)^2, with Q as ``fake_quantize`` computes it. Not differentiable.

    Raises:
        RuntimeError: naming the argument, what it must be and what it was.
    """
    return call("range_errors", x, candidates, levels, axis)


def _channels(x: Tensor, axis: int | None) -> int:
    return 1 if axis is None else x.size(axis)


def _fake_channel_stats(x: Tensor, axis: int | None) -> Tensor:
    return x.new_empty((_channels(x, axis), 4), dtype=torch.float32)


def _fake_minmax_grids(x: Tensor, levels: Sequence[int], axis: int | None) -> Tensor:
    return x.new_empty((len(levels), _channels(x, axis), 3), dtype=torch.float32)


def _fake_conditional_abs_mean(x: Tensor, threshold: Tensor, axis: int | None) -> Tensor:
    return x.new_empty(_channels(x, axis), dtype=torch.float32)


def _fake_range_errors(x: Tensor, candidates: Tensor, levels: int, axis: int | None) -> Tensor:
    return x.new_empty((_channels(x, axis), candidates.size(1)), dtype=torch.float32)


def _no_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


def _backward(ops: Any, ctx: Any, grad: Tensor) -> tuple[None, ...]:
    return (None,) * len(ctx.needs_input_grad)


rules("channel_stats", OpRules(_fake_channel_stats, _backward, _no_gradient))
rules("minmax_grids", OpRules(_fake_minmax_grids, _backward, _no_gradient))
rules("conditional_abs_mean", OpRules(_fake_conditional_abs_mean, _backward, _no_gradient))
rules("range_errors", OpRules(_fake_range_errors, _backward, _no_gradient))

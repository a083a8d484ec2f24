"""A weighted mixture of up to 8 quantizers of one tensor, in one pass each way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._dispatch import call
from ._register import OpRules, rules
from .fake_quantize import grid_gradient


def attention_quantize(
    x: Tensor,
    attention: Tensor,
    grids: Tensor,
    kinds: Sequence[int],
    levels: Sequence[int],
    stes: Sequence[int],
    axis: int | None = None,
    convex: bool = False,
    covered: bool = False,
) -> Tensor:
    """The mixture ``q = sum_k a_k Q_k(x)`` (DQA, equation 3); a = (1, 0, ...) gives Q_0 to the bit.

    Differentiable in ``x`` (each member passes the gradient as its ``ste`` says, weighted by a_k; IDENTITY members pass
    it whole), in ``attention`` (<g, Q_k>) and in the grids of members whose ``ste`` is CLIP or FULL.

    Args:
        x: any shape and memory layout; float32, float16 or bfloat16.
        attention: float32 [K], K from 1 to 8; any weights, they need not sum to 1.
        grids: float32 [K, C, 3], for each member the grid that ``fake_quantize`` takes; C = ``x.size(axis)``, or 1 if
            ``axis`` is None. The rows of IDENTITY members are ignored.
        kinds: K of :class:`Kind`; IDENTITY is x itself.
        levels: K highest codes, as for ``fake_quantize``; ignored for IDENTITY.
        stes: K of :class:`Ste`.
        axis: the channel dimension, or None for one grid a member for the whole tensor.
        convex: the attention sums to one, as a softmax does. Where every ``ste`` is IDENTITY the gradient of ``x``
            is then that of q, and no pass is spent on multiplying it by a sum that is one up to rounding.
        covered: no element lies outside the range of a uniform member, as where grids come from the smallest and the
            largest of them: the result is the same, and nothing need be clamped. Where it is not true codes may be
            out of range.

    Returns:
        Tensor like ``x``, in the dtype of ``x``; arithmetic is float32 with one rounding at the end.

    Raises:
        RuntimeError: naming the argument, what it must be and what it was.
    """
    return call("attention_quantize", x, attention, grids, kinds, levels, stes, axis, convex, covered)


def attention_gradient(
    grad: Tensor,
    x: Tensor,
    attention: Tensor,
    grids: Tensor,
    kinds: Sequence[int],
    levels: Sequence[int],
    axis: int | None = None,
    covered: bool = False,
) -> Tensor:
    """The gradient of ``attention_quantize`` in its attention alone: <grad, Q_k(x)> for each k, float32 [K].

    Reads ``grad`` and ``x`` once and writes nothing of their size. Not differentiable. Arguments are those of
    ``attention_quantize``; ``grad`` is like ``x``, and the values of ``attention`` do not matter.

    Raises:
        RuntimeError: naming the argument, what it must be and what it was.
    """
    return call("attention_gradient", grad, x, attention, grids, kinds, levels, axis, covered)


def _fake_minmax(x: Tensor, attention: Tensor, levels: Sequence[int], axis: int | None) -> tuple[Tensor, Tensor]:
    channels = 1 if axis is None else x.size(axis)
    return torch.empty_like(x), x.new_empty((len(levels), channels, 3), dtype=torch.float32)


def _fake(
    x: Tensor,
    attention: Tensor,
    grids: Tensor,
    kinds: Sequence[int],
    levels: Sequence[int],
    stes: Sequence[int],
    axis: int | None,
    convex: bool = False,
    covered: bool = False,
) -> Tensor:
    return torch.empty_like(x)


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    attention: Tensor,
    grids: Tensor,
    kinds: Sequence[int],
    levels: Sequence[int],
    stes: Sequence[int],
    axis: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), attention.new_empty(attention.shape), grids.new_empty(grids.shape)


def _fake_gradient(
    grad: Tensor,
    x: Tensor,
    attention: Tensor,
    grids: Tensor,
    kinds: Sequence[int],
    levels: Sequence[int],
    axis: int | None,
    covered: bool = False,
) -> Tensor:
    return attention.new_empty(attention.shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, attention, grids, *options = inputs
    ctx.save_for_backward(x, attention, grids)
    ctx.options = options


def _grids_gradient(sums: Tensor, attention: Tensor, levels: Sequence[int], stes: Sequence[int]) -> Tensor:
    # Members with the identity estimator have zero sums, so their rows vanish whatever the formula.
    rows = [grid_gradient(sums[k], levels[k], stes[k]) for k in range(len(levels))]
    return torch.stack(rows) * attention[:, None, None]


def _backward(ops: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    kinds, levels, stes, axis, convex, covered = ctx.options
    x, attention, grids = ctx.saved_tensors
    for_x, for_attention, for_grids = ctx.needs_input_grad[:3]
    straight = not any(stes)  # all of them are Ste.IDENTITY: grids learn nothing
    if straight and (convex or not for_x):
        gradient = ops.attention_gradient.default
        alone = gradient(grad, x, attention, grids, kinds, levels, axis, covered) if for_attention else None
        return grad if for_x else None, alone, *(None,) * 7
    if straight and not for_attention:
        slope = sum(attention.unbind())  # in the order of k, as the kernel adds them
        return (grad.float() * slope).to(grad.dtype), *(None,) * 8
    backward = ops.attention_quantize_backward.default
    grad_x, grad_attention, sums = backward(grad, x, attention, grids, kinds, levels, stes, axis)
    grad_grids = _grids_gradient(sums, attention, levels, stes) if for_grids and not straight else None
    return grad_x if for_x else None, grad_attention, grad_grids, *(None,) * 6


rules("attention_quantize", OpRules(_fake, _backward, _setup_context))
rules("attention_quantize_backward", OpRules(_fake_backward))
rules("attention_gradient", OpRules(_fake_gradient))
rules("minmax_attention_quantize", OpRules(_fake_minmax))

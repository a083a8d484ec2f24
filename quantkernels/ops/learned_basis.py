"""Quantization by a learned basis (LQ-Nets), and the statistics that the next basis is computed from."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from ._dispatch import call
from ._register import OpRules, rules
from .fake_quantize import Ste


class Encoding(IntEnum):
    """The digits e of a code (``csrc/core/learned_basis.h``)."""

    SIGNED = 0
    UNSIGNED = 1


def learned_basis_quantize(
    x: Tensor,
    basis: Tensor,
    encoding: int,
    ste: int = Ste.IDENTITY,
    axis: int | None = None,
    statistics: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest of the 2^n levels ``v^T e``, v a channel's basis (LQ-Nets, Zhang et al. 2018, equations 3 to 5).

    The same pass gives the statistics of QEM: with B [n, N] the digits e of all N elements of a channel,
    ``B B^T`` and ``B x``, of which the least-squares basis for these codes is ``(B B^T)^-1 B x``.

    Args:
        x: any shape and memory layout; float32, float16 or bfloat16.
        basis: float32 [C, n], n from 1 to 8; C = ``x.size(axis)``, or 1 without axis. No gradient passes to it.
        encoding: an :class:`Encoding`. SIGNED: e in {-1, +1}^n (weights); UNSIGNED: e in {0, 1}^n (activations).
        ste: IDENTITY passes the gradient of x; CLIP passes it where x is not above the top level (of every element, not
            only of positive ones: x is taken to follow a ReLU).
        axis: the channel dimension, or None for one basis for the whole tensor.
        statistics: whether the two statistics are wanted.

    Returns:
        q like ``x``, in its dtype: levels are separated by the midpoints of neighbours, a tie goes down, a NaN to the
        lowest level. ``B B^T`` float32 [C, n, n], whole numbers, and ``B x`` float32 [C, n], neither differentiable;
        without ``statistics`` both have no channels.

    Raises:
        RuntimeError: naming the argument, what it must be and what it was.
    """
    return call("learned_basis_quantize", x, basis, encoding, ste, axis, statistics)


def learned_basis_encode(x: Tensor, grid: Tensor, axis: int | None = None) -> Tensor:
    """The codes of x: bit j of a code is the digit that step_j belongs to.

    Args:
        x: any shape and memory layout; float32, float16 or bfloat16.
        grid: float32 [C, 1 + n], offset and step of each bit (:func:`grid_of_basis`).
        axis: the channel dimension, or None (C = 1).

    Returns:
        uint8 in the shape and layout of ``x``; a NaN has the code of the lowest level.

    Raises:
        RuntimeError: naming the argument, what it must be and what it was.
    """
    return call("learned_basis_encode", x, grid, axis)


def level_table(grid: Tensor) -> Tensor:
    """Grid [C, 1 + n] -> float32 [C, 2^n], the value of each code: ``offset + step_0 bit_0 + ...``, in this order."""
    levels = grid[:, :1]
    for step in grid[:, 1:].unbind(1):
        # First the codes without the bit, then those with it.
        levels = torch.cat((levels, levels + step[:, None]), 1)
    return levels


def grid_of_basis(basis: Tensor, encoding: int) -> Tensor:
    """Basis [C, n] -> grid float32 [C, 1 + n]: offset and the step of each bit, ``q = offset + sum_j step_j bit_j``.

    SIGNED: offset -sum v, added in the order of j, and steps 2v. UNSIGNED: 0 and v.
    """
    if encoding == Encoding.UNSIGNED:
        return torch.cat((torch.zeros_like(basis[:, :1]), basis), 1)
    total = basis[:, :1]
    for j in range(1, basis.shape[1]):
        total = total + basis[:, j : j + 1]
    return torch.cat((-total, basis + basis), 1)


def _fake(
    x: Tensor, basis: Tensor, encoding: int, ste: int, axis: int | None, statistics: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    n = basis.size(1)
    channels = basis.size(0) if statistics else 0
    return torch.empty_like(x), basis.new_empty((channels, n, n)), basis.new_empty((channels, n))


def _fake_backward(grad: Tensor, x: Tensor, basis: Tensor, encoding: int, axis: int | None) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, basis, encoding, ste, axis = inputs[:5]
    ctx.mark_non_differentiable(*output[1:])
    ctx.count = len(inputs)
    ctx.clips = ste == Ste.CLIP
    if ctx.clips:
        ctx.save_for_backward(x, basis)
    ctx.options = encoding, axis


def _backward(ops: Any, ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if ctx.clips:
        x, basis = ctx.saved_tensors
        encoding, axis = ctx.options
        grad = ops.learned_basis_quantize_backward(grad, x, basis, encoding, axis)
    return grad, *[None] * (ctx.count - 1)


def _fake_encode(x: Tensor, grid: Tensor, axis: int | None) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


rules("learned_basis_encode", OpRules(_fake_encode))
rules("learned_basis_quantize", OpRules(_fake, _backward, _setup_context))
rules("learned_basis_quantize_backward", OpRules(_fake_backward))

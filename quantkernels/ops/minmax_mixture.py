"""DQA's commonest step, softmax attention over min-max quantizers of one tensor, as one node of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._dispatch import current_namespace, explain, traced
from ._register import apply_of, below_autograd, kernel
from .attention import attention_quantize
from .fake_quantize import Kind, Ste
from .stats import minmax_grids


def minmax_mixture(
    x: Tensor, logits: Tensor, temperature: Tensor, levels: Sequence[int], axis: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``attention_quantize`` with weights ``softmax(logits / temperature)`` over the ``minmax_grids`` of x itself (DQA,
    equations 3 to 6 and 9 to 11).

    Differentiable in ``x``, which is handed the gradient of q, and in ``logits``.

    Args:
        x: any shape and memory layout; float32, float16 or bfloat16.
        logits: float32 [K], K from 1 to 8.
        temperature: float32, one positive number.
        levels: K highest codes, each 2^n - 1 with n from 1 to 8.
        axis: the channel dimension, or None for the whole tensor.

    Returns:
        q like ``x``; and, without gradients, the weights [K] and grids [K, C, 3] that it was made with.

    Raises:
        RuntimeError: naming the argument, what it must be and what it was.
    """
    if not traced():
        made_with: list[Tensor] = []
        try:
            return (_apply(x, logits, temperature, levels, axis, made_with), *made_with)  # type: ignore[return-value]
        except NotImplementedError as error:
            explain(error, [x])
            raise
    weights, grids = torch.softmax(logits / temperature, 0), minmax_grids(x.detach(), levels, axis)
    q = attention_quantize(x, weights, grids, *_members(levels), axis, convex=True, covered=True)
    return q, weights.detach(), grids


def _members(levels: Sequence[int]) -> tuple[list[int], Sequence[int], list[int]]:
    return [int(Kind.UNIFORM)] * len(levels), levels, [int(Ste.IDENTITY)] * len(levels)


class _MinMaxMixture(torch.autograd.Function):
    """On a layer's weights the kernels take some hundred microseconds, and each further node of autograd ten, and each
    further output five. So weights and grids are not outputs: they are appended to a list.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        logits: Tensor,
        temperature: Tensor,
        levels: Sequence[int],
        axis: int | None,
        made_with: list[Tensor],
    ) -> Tensor:
        namespace = current_namespace()
        with below_autograd():
            weights = torch.softmax(logits / temperature, 0)
            q, grids = kernel("minmax_attention_quantize", namespace)(x, weights, levels, axis)
        ctx.save_for_backward(x, weights, grids, temperature)
        ctx.options = namespace, levels, axis
        made_with += weights, grids
        return q

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        for_x, for_logits = ctx.needs_input_grad[:2]
        slope = None
        if for_logits:
            x, weights, grids, temperature = ctx.saved_tensors
            namespace, levels, axis = ctx.options
            with below_autograd():
                gradient = kernel("attention_gradient", namespace)
                along = gradient(grad, x, weights, grids, *_members(levels)[:2], axis, True)
                slope = torch._softmax_backward_data(along, weights, 0, torch.float32) / temperature
        return grad if for_x else None, slope, None, None, None, None


_apply = apply_of(_MinMaxMixture)

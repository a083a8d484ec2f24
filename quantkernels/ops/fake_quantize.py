"""Uniform, binary and ternary fake quantization of one tensor."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from ._dispatch import call, current_namespace, explain, traced
from ._register import OpRules, apply_of, below_autograd, kernel, rules


class Kind(IntEnum):
    """How a value becomes a code (``csrc/core/quantizer.h``)."""

    UNIFORM = 0
    BINARY = 1
    TERNARY = 2
    IDENTITY = 3
    LEARNED = 4  # its grid has n + 1 columns: offset, and the step of each bit; by codes only


class Ste(IntEnum):
    """What the straight-through estimator lets pass."""

    IDENTITY = 0
    CLIP = 1
    FULL = 2


def fake_quantize(
    x: Tensor, grid: Tensor, kind: int, levels: int, ste: int = Ste.IDENTITY, axis: int | None = None
) -> Tensor:
    """Quantize and dequantize: ``q = offset + step * code(x)``.

    Args:
        x: any shape and memory layout; float32, float16 or bfloat16.
        grid: float32 [C, 3], a row (offset, step, threshold) a channel; C = ``x.size(axis)``, or 1 without axis.
        kind: a :class:`Kind` other than IDENTITY. UNIFORM: ``code = round((x - offset) / step)``, ties to even,
            clamped to [0, levels]. BINARY: ``x >= 0``. TERNARY: ``(x > -threshold) + (x > threshold)``.
        levels: the highest code: 2^n - 1 for UNIFORM with n from 1 to 8, 1 for BINARY, 2 for TERNARY.
        ste: a :class:`Ste`; CLIP and FULL are for UNIFORM. IDENTITY passes the gradient of x and gives none to the
            grid; CLIP passes it inside the range, and the ends of the range learn (PACT); FULL also gives the step
            the gradient of the rounding error inside (PACT+, LSQ).
        axis: the channel dimension, or None for one grid for the whole tensor.

    Returns:
        Tensor like ``x``, in the dtype of ``x``; arithmetic is float32 with one rounding at the end.

    Where x has a gradient and the grid has none, CLIP keeps one bit an element for the backward pass and not x.

    Raises:
        RuntimeError: naming the argument, what it must be and what it was.
    """
    if ste == Ste.CLIP and kind == Kind.UNIFORM and masks(x, grid, axis):
        return _masked(x, grid, levels, axis)
    return call("fake_quantize", x, grid, kind, levels, ste, axis)


def _masked(x: Tensor, grid: Tensor, levels: int, axis: int | None) -> Tensor:
    if traced():
        return call("fake_quantize_masked", x, grid, levels, axis)[0]
    try:
        return _apply(x, grid, levels, axis)
    except NotImplementedError as error:
        explain(error, [x])
        raise


def masks(x: Tensor, grid: Tensor, axis: int | None) -> bool:
    """Whether one bit an element is all that the backward pass of x needs, and quicker than x itself.

    A channel that ends inside a byte of the mask is not: its bits are set one by one.
    """
    if not (torch.is_grad_enabled() and x.requires_grad) or grid.requires_grad:
        return False
    if axis is None or not -x.dim() <= axis < x.dim():
        return True
    stride = x.stride(axis)
    return stride % 8 == 0 if stride > 1 else x.shape[axis] % 8 == 0


def grid_gradient(sums: Tensor, levels: int, ste: int) -> Tensor:
    """Gradient of the grid [..., 3] from the sums (below, above, inside) of each channel, [..., 3] too.

    Below the range q = offset, above it q = offset + levels * step; inside, dq/dstep = code - (x - offset) / step.
    """
    below, above, inside = sums.unbind(-1)
    step = above * levels + inside if ste == Ste.FULL else above * levels
    return torch.stack((below + above, step, torch.zeros_like(below)), -1)


def _fake(x: Tensor, grid: Tensor, kind: int, levels: int, ste: int, axis: int | None) -> Tensor:
    return torch.empty_like(x)


def _fake_backward(
    grad: Tensor, x: Tensor, grid: Tensor, kind: int, levels: int, ste: int, axis: int | None, range_sums: bool = True
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), grid.new_empty(grid.shape if range_sums else (0, 3))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, grid, kind, levels, ste, axis = inputs
    if ste != Ste.IDENTITY:
        ctx.save_for_backward(x, grid)
    ctx.options = kind, levels, ste, axis


def _backward(ops: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    kind, levels, ste, axis = ctx.options
    if ste == Ste.IDENTITY:
        return grad, None, None, None, None, None
    x, grid = ctx.saved_tensors
    for_grid = ctx.needs_input_grad[1]
    grad_x, sums = ops.fake_quantize_backward.default(grad, x, grid, kind, levels, ste, axis, for_grid)
    return grad_x, grid_gradient(sums, levels, ste) if for_grid else None, None, None, None, None


def _fake_masked(x: Tensor, grid: Tensor, levels: int, axis: int | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((x.numel() + 31) // 32, dtype=torch.int32)


def _fake_apply_mask(grad: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(grad)


def _setup_masked(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, mask = output
    ctx.save_for_backward(mask)
    ctx.stride = q.stride()
    ctx.set_materialize_grads(False)


def _as_in_memory(grad: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The bits of a mask are in the order in which the elements that they are of lie in memory."""
    if grad.stride() == stride:
        return grad
    return torch.empty_strided(grad.shape, stride, dtype=grad.dtype, device=grad.device).copy_(grad)


def _backward_masked(ops: Any, ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    return ops.apply_mask.default(_as_in_memory(grad, ctx.stride), *ctx.saved_tensors), None, None, None


class _Masked(torch.autograd.Function):
    """``fake_quantize_masked`` with q as its only output: one that nobody reads costs microseconds, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Tensor, levels: int, axis: int | None) -> Tensor:
        namespace = current_namespace()
        with below_autograd():
            q, mask = kernel("fake_quantize_masked", namespace)(x, grid, levels, axis)
        ctx.save_for_backward(mask)
        ctx.stride, ctx.apply_mask = q.stride(), kernel("apply_mask", namespace)
        return q

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.apply_mask(_as_in_memory(grad, ctx.stride), *ctx.saved_tensors), None, None, None


_apply = apply_of(_Masked)

rules("fake_quantize", OpRules(_fake, _backward, _setup_context))
rules("fake_quantize_backward", OpRules(_fake_backward))
rules("fake_quantize_masked", OpRules(_fake_masked, _backward_masked, _setup_masked))
rules("apply_mask", OpRules(_fake_apply_mask))

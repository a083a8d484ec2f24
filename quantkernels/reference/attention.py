"""The attention-weighted mixture of K quantizers: q = sum_k a_k Q_k(x) (DQA, equation 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .fake_quantize import (
    CLIP_STE,
    FULL_STE,
    IDENTITY,
    UNIFORM,
    channel_sum,
    columns_of,
    differentiable_fake_quantize,
    fake_quantize_backward,
    float_codes,
    position,
)


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
    """attention float32 [K], grids float32 [K, C, 3] -> q in the shape and dtype of x.

    base = sum_k a_k*offset_k and w_k = a_k*step_k in float32, then q = ((base + w_0*c_0) + w_1*c_1) + ... in
    the order of k; an identity member adds a_k*x and has no base.
    """
    base = torch.zeros((), dtype=torch.float32, device=x.device)
    for k, kind in enumerate(kinds):
        if kind != IDENTITY:
            base = base + attention[k] * columns_of(grids[k], x, axis)[0]
    q = base.expand(x.shape)
    for k, kind in enumerate(kinds):
        if kind == IDENTITY:
            q = q + attention[k] * x.float()
        else:
            step = columns_of(grids[k], x, axis)[1]
            q = q + (attention[k] * step) * float_codes(x, grids[k], kind, levels[k], axis)
    return q.to(x.dtype)


def attention_quantize_backward(
    grad: Tensor,
    x: Tensor,
    attention: Tensor,
    grids: Tensor,
    kinds: Sequence[int],
    levels: Sequence[int],
    stes: Sequence[int],
    axis: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_x; grad_attention float32 [K] = sum g*Q_k(x); sums float32 [K, C, 3] as of
    `fake_quantize_backward`.

    The sums are those of each quantizer alone: the caller multiplies them by a_k to get the gradient of grid
    k.
    """
    g = grad.float()
    slope = torch.zeros((), dtype=torch.float32, device=x.device)
    grad_attention, all_sums = [], []
    for k, kind in enumerate(kinds):
        grid = grids[k]
        mask = torch.ones((), dtype=torch.float32, device=x.device)
        if kind == IDENTITY:
            grad_attention.append((g.double() * x.double()).sum())
            all_sums.append(torch.zeros_like(grid))
        else:
            total = channel_sum(g, axis).double()
            weighted = channel_sum(g * float_codes(x, grid, kind, levels[k], axis), axis).double()
            grad_attention.append((grid[:, 0].double() * total + grid[:, 1].double() * weighted).sum())
            all_sums.append(fake_quantize_backward(g, x, grid, kind, levels[k], stes[k], axis)[1])
            if kind == UNIFORM and stes[k] in (CLIP_STE, FULL_STE):
                v = position(x, grid, axis)
                mask = ((v >= 0) & (v <= levels[k])).float()
        slope = slope + attention[k] * mask
    return (g * slope).to(x.dtype), torch.stack(grad_attention).float(), torch.stack(all_sums)


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
    """float32 [K]: sum g*Q_k(x), whatever the attention."""
    return attention_quantize_backward(grad, x, attention, grids, kinds, levels, [0] * len(kinds), axis)[1]


def differentiable_attention_quantize(
    x: Tensor,
    attention: Tensor,
    grids: Tensor,
    kinds: Sequence[int],
    levels: Sequence[int],
    stes: Sequence[int],
    axis: int | None = None,
) -> Tensor:
    """sum_k a_k Q_k(x) for autograd: gradients of x, attention and grids come from
    `differentiable_fake_quantize`."""
    value = x.float()
    terms = [
        attention[k]
        * (value if kind == IDENTITY else differentiable_fake_quantize(value, grids[k], kind, n, ste, axis))
        for k, (kind, n, ste) in enumerate(zip(kinds, levels, stes, strict=True))
    ]
    return torch.stack(terms).sum(0).to(x.dtype)

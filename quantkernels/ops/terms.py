"""A learned basis as a sum of binary quantizers, so that products of learned operands are sums of products on bits.

    q = offset + sum_j step_j bit_j = (offset + step_0 bit_0) + (0 + step_1 bit_1) + ...

Each term is a binary quantizer with one plane of the code, and a product is distributive: with n_a and n_w terms it is
the sum of n_a * n_w products of planes. Over padded taps each of these has nothing at all, and so has their sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .bitplanes import encode
from .fake_quantize import Kind


class Operand(NamedTuple):
    """An activation (values or codes) or the planes of a weight, and how its codes become values."""

    data: Tensor
    grid: Tensor
    kind: int
    levels: int


Product = Callable[[Operand, Operand], Tensor]
"""What multiplies activation and weight: float32, and nothing after it."""


def _binary(data: Tensor, grid: Tensor, j: int) -> Operand:
    nothing = torch.zeros_like(grid[:, 0])
    row = torch.stack((nothing if j else grid[:, 0], grid[:, 1 + j], nothing), 1)
    return Operand(data, row, Kind.BINARY, 1)


def activation_terms(x: Operand) -> list[Operand]:
    """The terms of an activation, each as uint8 codes; x as codes where its basis is not learned."""
    codes = encode(*x) if x.data.is_floating_point() else x.data
    if x.kind != Kind.LEARNED:
        return [x._replace(data=codes)]
    return [_binary((codes >> j) & 1, x.grid, j) for j in range(x.grid.shape[1] - 1)]


def weight_terms(w: Operand) -> list[Operand]:
    """The terms of a weight, a plane each."""
    if w.kind != Kind.LEARNED:
        return [w]
    return [_binary(w.data[-1 - j : w.data.shape[0] - j], w.grid, j) for j in range(w.grid.shape[1] - 1)]


def is_learned(x_kind: int, w_kind: int, out_grid: Tensor | None, out_kind: int) -> bool:
    """Whether an operand, or the quantizer of the output, has a learned basis."""
    return Kind.LEARNED in (x_kind, w_kind) or (out_grid is not None and out_kind == Kind.LEARNED)


def sum_of_products(x: Operand, w: Operand, product: Product) -> Tensor:
    """float32: the products of all pairs of terms, added in the order of the weight's terms, then the activation's."""
    total: Tensor | None = None
    activations = activation_terms(x)
    for weight in weight_terms(w):
        for activation in activations:
            y = product(activation, weight)
            total = y if total is None else total + y
    assert total is not None
    return total


def finish(
    y: Tensor,
    channel_axis: int,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    lower: float,
    upper: float,
    out_grid: Tensor | None,
    out_kind: int,
    out_levels: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """The epilogue of ``csrc/core/algebra.h`` on float32 y: bias, batch-norm, clamp; then a type, or codes."""
    shape = [1] * y.dim()
    shape[channel_axis] = y.shape[channel_axis]
    if bias is not None:
        y = y + bias.reshape(shape)
    if scale is not None and shift is not None:
        # One rounding, as a fused multiply-add: float64 holds the product.
        y = (y.double() * scale.double().reshape(shape) + shift.double().reshape(shape)).float()
    y = y.clamp(lower, upper)
    return encode(y, out_grid, out_kind, out_levels) if out_grid is not None else y.to(out_dtype)

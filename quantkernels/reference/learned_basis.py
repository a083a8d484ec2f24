"""A learned basis (LQ-Nets): q is the nearest of the levels v^T e, and QEM fits v to the codes.

`basis` is float32 [C, n]. `encoding` 0: e in {-1, +1}^n; 1: e in {0, 1}^n.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .stats import rows_of

SIGNED, UNSIGNED = 0, 1


def digits(codes: Tensor, bits: int, encoding: int) -> Tensor:
    """e of integer codes, float32 with one more dimension of size n at the end: bit j of the code is e_j."""
    ones = (codes[..., None] >> torch.arange(bits, device=codes.device)) & 1
    return (ones if encoding == UNSIGNED else 2 * ones - 1).float()


def grid_of(basis: Tensor, encoding: int) -> Tensor:
    """float32 [C, 1 + n]: the value of code 0, and what setting bit j adds."""
    if encoding == UNSIGNED:
        return torch.cat((torch.zeros_like(basis[:, :1]), basis), 1)
    total = torch.zeros_like(basis[:, 0])
    for v in basis.unbind(1):
        total = total + v
    return torch.cat((-total[:, None], basis + basis), 1)


def levels_of_grid(grid: Tensor) -> Tensor:
    """float32 [C, 2^n]: the level of each code, offset + sum_j step_j * bit_j, added in the order of j."""
    found = []
    for code in range(2 ** (grid.shape[1] - 1)):
        level = grid[:, 0]
        for j in range(grid.shape[1] - 1):
            if code >> j & 1:
                level = level + grid[:, 1 + j]
        found.append(level)
    return torch.stack(found, 1)


def levels(basis: Tensor, encoding: int) -> Tensor:
    """float32 [C, 2^n]: the level of each code of a basis."""
    return levels_of_grid(grid_of(basis, encoding))


def nearest_codes(x: Tensor, table: Tensor, axis: int | None) -> Tensor:
    """int64 [C, N]: for the elements of each channel the code of the nearest level in `table` [C, 2^n].

    x is compared with the midpoints of neighbouring levels, a tie goes down, NaN compares as smaller. Equal levels
    are in the order of their codes.
    """
    rows = rows_of(x, axis).float()
    ordered, by_rank = table.sort(dim=1, stable=True)
    thresholds = (ordered[:, :-1] + ordered[:, 1:]) * 0.5
    rank = torch.zeros(rows.shape, dtype=torch.int64, device=x.device)
    for threshold in thresholds.unbind(1):
        rank += rows > threshold[:, None]
    return by_rank.gather(1, rank)


def learned_basis_encode(x: Tensor, grid: Tensor, axis: int | None = None) -> Tensor:
    """uint8 codes in the shape of x; grid is float32 [C, 1 + n]."""
    return from_rows(nearest_codes(x, levels_of_grid(grid), axis), x, axis).to(torch.uint8)


def from_rows(rows: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """The inverse of `rows_of` for a tensor of x's shape."""
    if axis is None:
        return rows.reshape(x.shape)
    moved = x.movedim(axis, 0).shape
    return rows.reshape(moved).movedim(0, axis)


def learned_basis_quantize(
    x: Tensor, basis: Tensor, encoding: int, ste: int = 0, axis: int | None = None, statistics: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """q like x; B B^T float32 [C, n, n] and B x float32 [C, n] with B [n, N] the digits of a channel's elements."""
    table = levels(basis, encoding)
    codes = nearest_codes(x, table, axis)
    q = from_rows(table.gather(1, codes), x, axis).to(x.dtype)
    if not statistics:
        return q, basis.new_zeros(0, basis.shape[1], basis.shape[1]), basis.new_zeros(0, basis.shape[1])
    b = digits(codes, basis.shape[1], encoding).double()
    product = b.transpose(1, 2) @ rows_of(x, axis).double()[..., None]
    return q, (b.transpose(1, 2) @ b).float(), product[..., 0].float()


def learned_basis_quantize_backward(
    grad: Tensor, x: Tensor, basis: Tensor, encoding: int, axis: int | None = None
) -> Tensor:
    """g where x is not above the top level, else 0."""
    top = levels(basis, encoding).amax(1)
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = basis.shape[0]
    return torch.where(x.float() <= top.reshape(shape), grad, 0.0).to(x.dtype)


def differentiable_learned_basis_quantize(
    x: Tensor, basis: Tensor, encoding: int, ste: int = 0, axis: int | None = None
) -> Tensor:
    """The same q, built so that autograd itself finds the straight-through gradient: that of x, or of min(x, top)."""
    q = learned_basis_quantize(x.detach(), basis, encoding, ste, axis, False)[0].float()
    smooth = x.float()
    if ste != 0:
        top = levels(basis, encoding).amax(1)
        shape = [1] * x.dim()
        if axis is not None:
            shape[axis] = basis.shape[0]
        smooth = torch.where(smooth <= top.reshape(shape), smooth, top.reshape(shape))
    return (q + (smooth - smooth.detach())).to(x.dtype)


def qem_basis(gram: Tensor, product: Tensor, basis: Tensor, epsilon: float) -> Tensor:
    """(B B^T + eps I)^-1 (B x + eps v), float32 [C, n], solved in float64: the ridge that pulls towards v."""
    ridge = epsilon * torch.eye(basis.shape[1], dtype=torch.float64, device=basis.device)
    right = product.double() + epsilon * basis.double()
    return torch.linalg.solve(gram.double() + ridge, right[..., None])[..., 0].float()

"""learned_basis_quantize: the nearest level by a walk down a search tree, with B B^T and B x in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.learned_basis import grid_of_basis, level_table
from ._checks import check, check_axis, check_float, check_like, parameters
from ._tiles import EXACT, dense, in_layout_of, load_float, store_rounded, tile_of, tiles_of
from .fake_quantize import store_sum


@triton.jit
def learned_basis_forward_kernel(
    x,  # [outer, channels, inner]
    tree,  # [channels, 2 * LEVELS]: unused, thresholds by node, levels in ascending order (csrc/core/learned_basis.h)
    codes,  # int32 [channels, LEVELS]: those of the levels
    out,  # like x
    partial,  # [element_blocks, channels, BITS * (BITS + 1) / 2 + BITS]: upper triangle of B B^T, B x; or None
    channels,
    elements,
    inner,
    BITS: tl.constexpr,
    SIGNED: tl.constexpr,
    CODES: tl.constexpr,
    ONE_RUN: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    ELEMENT_BLOCK: tl.constexpr,
):
    """out = the nearest level, or with CODES its code; the moments where ``partial`` is not None."""
    block, channel, place, inside = tile_of(channels, elements, inner, ONE_RUN, WIDE, CHANNEL_BLOCK, ELEMENT_BLOCK)
    LEVELS: tl.constexpr = 1 << BITS
    value = load_float(x + place, inside)
    node = tl.full([CHANNEL_BLOCK, ELEMENT_BLOCK], 1, tl.int32)
    for _ in tl.static_range(BITS):
        threshold = tl.load(tree + channel * (2 * LEVELS) + node, mask=channel < channels, other=0.0)
        node = 2 * node + (value > threshold).to(tl.int32)
    if CODES:
        leaf = tl.load(codes + channel * LEVELS + (node - LEVELS), mask=channel < channels, other=0)
        tl.store(out + place, leaf.to(tl.uint8), mask=inside)
    else:
        level = tl.load(tree + channel * (2 * LEVELS) + node, mask=channel < channels, other=0.0)
        store_rounded(out + place, level, inside)
    if partial is not None:
        code = tl.load(codes + channel * LEVELS + (node - LEVELS), mask=channel < channels, other=0)
        row = partial + (block.to(tl.int64) * channels + channel) * (BITS * (BITS + 1) // 2 + BITS)
        for i in tl.static_range(BITS):
            digit = ((code >> i) & 1).to(tl.float32)
            if SIGNED:
                digit = 2.0 * digit - 1.0
            digit = tl.where(inside, digit, 0.0)
            for j in tl.static_range(i, BITS):
                other = ((code >> j) & 1).to(tl.float32)
                if SIGNED:
                    other = 2.0 * other - 1.0
                store_sum(row, digit * other, channel < channels)
                row += 1
        for i in tl.static_range(BITS):
            digit = ((code >> i) & 1).to(tl.float32)
            if SIGNED:
                digit = 2.0 * digit - 1.0
            store_sum(row, tl.where(inside, digit * value, 0.0), channel < channels)
            row += 1


@triton.jit
def learned_basis_backward_kernel(
    grad,  # like x
    x,  # [outer, channels, inner]
    top,  # [channels]
    grad_x,  # like x
    channels,
    elements,
    inner,
    ONE_RUN: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    ELEMENT_BLOCK: tl.constexpr,
):
    """g where x is not above the top level."""
    _, channel, place, inside = tile_of(channels, elements, inner, ONE_RUN, WIDE, CHANNEL_BLOCK, ELEMENT_BLOCK)
    limit = tl.load(top + channel, mask=channel < channels, other=0.0)
    g = load_float(grad + place, inside)
    store_rounded(grad_x + place, tl.where(load_float(x + place, inside) <= limit, g, 0.0), inside)


def sorted_levels(grid: Tensor) -> tuple[Tensor, Tensor]:
    """Levels of each channel in ascending order, equal ones by their codes, and their codes; [C, 2^n] both."""
    ordered, codes = level_table(grid).sort(dim=1, stable=True)
    return ordered, codes.to(torch.int32)


def search_tree(ordered: Tensor) -> Tensor:
    """[C, 2^n] sorted levels -> [C, 2^(n+1)]: midpoints by node, from node 1 on, and then the levels themselves."""
    count = ordered.shape[1]
    midpoints = (ordered[:, :-1] + ordered[:, 1:]) * 0.5
    above: list[int] = []  # ranks of the levels above the nodes' thresholds, row by row of the tree
    width = count
    while width > 1:
        above += range(width // 2, count, width)
        width //= 2
    chosen = midpoints[:, torch.tensor([rank - 1 for rank in above], device=ordered.device)]
    return torch.cat((torch.zeros_like(ordered[:, :1]), chosen, ordered), 1)


def _checked(op: str, x: Tensor, basis: Tensor, encoding: int, axis: int | None) -> Tensor:
    fits = basis.dim() == 2 and 1 <= basis.shape[1] <= 8
    check(fits, op, "basis", "of shape [channels, n] with n from 1 to 8", list(basis.shape))
    check(encoding in (0, 1), op, "encoding", "0 ({-1, +1}) or 1 ({0, 1})", encoding)
    return parameters(op, "basis", basis, x, check_axis(op, x, axis), basis.shape[1])


def learned_basis_quantize(
    x: Tensor, basis: Tensor, encoding: int, ste: int, axis: int | None, statistics: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """``quantkernels.ops.learned_basis_quantize``."""
    op = "learned_basis_quantize"
    check_float(op, "x", x)
    check(ste in (0, 1), op, "ste", "0 (identity) or 1 (clip)", ste)
    x = dense(x)
    basis = _checked(op, x, basis, encoding, axis)
    bits, out = basis.shape[1], torch.empty_like(x)
    channels = basis.shape[0] if statistics else 0
    gram, product = basis.new_zeros((channels, bits, bits)), basis.new_zeros((channels, bits))
    if x.numel() == 0:
        return out, gram, product
    ordered, codes = sorted_levels(grid_of_basis(basis, encoding))
    tiles = tiles_of(x, axis)
    partial = tiles.partial(x, bits * (bits + 1) // 2 + bits) if statistics else None
    learned_basis_forward_kernel[tiles.launch](
        x, search_tree(ordered), codes, out, partial, BITS=bits, SIGNED=encoding == 0, CODES=False,
        **tiles.arguments, **EXACT,
    )  # fmt: skip
    if partial is not None:
        sums = partial.sum(0, dtype=torch.float64).float()
        rows, columns = torch.triu_indices(bits, bits, device=x.device)
        gram[:, rows, columns] = gram[:, columns, rows] = sums[:, :-bits]
        product = sums[:, -bits:].clone()
    return out, gram, product


def learned_basis_quantize_backward(grad: Tensor, x: Tensor, basis: Tensor, encoding: int, axis: int | None) -> Tensor:
    """g where x is not above the top level, else 0."""
    op = "learned_basis_quantize_backward"
    check_float(op, "x", x)
    check_like(op, "grad", grad, x)
    x = dense(x)
    grad = in_layout_of(grad, x)
    basis = _checked(op, x, basis, encoding, axis)
    grad_x = torch.empty_like(x)
    if x.numel() > 0:
        top = sorted_levels(grid_of_basis(basis, encoding))[0][:, -1].contiguous()
        tiles = tiles_of(x, axis)
        learned_basis_backward_kernel[tiles.launch](grad, x, top, grad_x, **tiles.arguments, **EXACT)
    return grad_x


def learned_basis_encode(x: Tensor, grid: Tensor, axis: int | None) -> Tensor:
    """``quantkernels.ops.learned_basis_encode``."""
    op = "learned_basis_encode"
    check_float(op, "x", x)
    fits = grid.dim() == 2 and 2 <= grid.shape[1] <= 9
    check(fits, op, "grid", "of shape [channels, 1 + n] with n from 1 to 8", list(grid.shape))
    x = dense(x)
    grid = parameters(op, "grid", grid, x, check_axis(op, x, axis), grid.shape[1])
    out = torch.empty_like(x, dtype=torch.uint8)
    if x.numel() > 0:
        ordered, codes = sorted_levels(grid)
        tiles = tiles_of(x, axis)
        learned_basis_forward_kernel[tiles.launch](
            x, search_tree(ordered), codes, out, None, BITS=grid.shape[1] - 1, SIGNED=False, CODES=True,
            **tiles.arguments, **EXACT,
        )  # fmt: skip
    return out


OPS = {
    "learned_basis_encode": learned_basis_encode,
    "learned_basis_quantize": learned_basis_quantize,
    "learned_basis_quantize_backward": learned_basis_quantize_backward,
}

"""lowbit_linear: exact integer sums of codes on the tensor cores, then the epilogue of ``csrc/core/algebra.h``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._checks import check, check_float, check_quantizer, parameters
from ._tiles import EXACT, LEARNED, TERNARY, code_of, load_float, load_grid, multiply_add, store_rounded
from .learned_basis import learned_basis_encode

_BLOCK_ROWS = 32
_BLOCK_COLUMNS = 32
_BLOCK_DEPTH = 64
# |sum of products of shifted codes| <= 128 * 128 * depth stays below 2^31 up to this depth.
_DEPTH_OF_INT32 = 2**31 // 2**14 - 1


@triton.jit
def activation_tile(x, inside, grid, KIND: tl.constexpr, LEVELS: tl.constexpr, CODES: tl.constexpr):
    """int32 codes of a tile of the activation; 0 outside and for a NaN."""
    if CODES:
        return tl.load(x, mask=inside, other=0).to(tl.int32)
    offset, _, inverse, threshold = load_grid(grid, 0, 1)
    code = code_of(load_float(x, inside), offset, inverse, threshold, KIND, LEVELS)
    return tl.where(inside & (code == code), code, 0.0).to(tl.int32)


@triton.jit
def weight_tile(planes, plane_stride, word, bit, inside, KIND: tl.constexpr, BITS: tl.constexpr):
    """int32 codes of a tile of packed weights: planes most significant first; ternary planes weigh 1 each."""
    code = tl.zeros(word.shape, tl.int32)
    for plane in tl.static_range(BITS):
        words = tl.load(planes + plane * plane_stride + word, mask=inside, other=0)
        ones = (words >> bit) & 1
        code = code + ones if KIND == TERNARY else code * 2 + ones
    return code


@triton.jit
def tile_sums(
    x,
    x_grid,
    planes,
    row,
    column,
    rows,
    columns,
    words,
    x_digit,
    w_digit,
    DEPTH: tl.constexpr,
    X_KIND: tl.constexpr,
    X_LEVELS: tl.constexpr,
    X_CODES: tl.constexpr,
    W_KIND: tl.constexpr,
    W_BITS: tl.constexpr,
    X_SHIFT: tl.constexpr,
    W_SHIFT: tl.constexpr,
    WIDE: tl.constexpr,
    DIGITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """D, SA and SW of a tile, int64: of codes, or where DIGITS of one digit of each."""
    dot = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.int64 if WIDE else tl.int32)
    row_sum = tl.zeros([BLOCK_ROWS, 1], tl.int64)
    column_sum = tl.zeros([1, BLOCK_COLUMNS], tl.int64)
    for start in range(0, DEPTH, BLOCK_DEPTH):
        across = start + tl.arange(0, BLOCK_DEPTH)[None, :]
        down = start + tl.arange(0, BLOCK_DEPTH)[:, None]
        row_inside = (row < rows) & (across < DEPTH)
        column_inside = (down < DEPTH) & (column < columns)
        codes = activation_tile(x + row * DEPTH + across, row_inside, x_grid, X_KIND, X_LEVELS, X_CODES)
        word, bit = column * words + down // 32, down % 32
        if DIGITS:
            codes = (codes > x_digit).to(tl.int32) if X_KIND == TERNARY else (codes >> x_digit) & 1
            plane = w_digit if W_KIND == TERNARY else W_BITS - 1 - w_digit
            weights = (tl.load(planes + plane * columns * words + word, mask=column_inside, other=0) >> bit) & 1
        else:
            weights = weight_tile(planes, columns * words, word, bit, column_inside, W_KIND, W_BITS)
        row_sum += tl.sum(codes, axis=1, keep_dims=True).to(tl.int64)
        column_sum += tl.sum(weights, axis=0, keep_dims=True).to(tl.int64)
        a = tl.where(row_inside, codes - X_SHIFT, 0).to(tl.int8)
        b = tl.where(column_inside, weights - W_SHIFT, 0).to(tl.int8)
        part = tl.dot(a, b, out_dtype=tl.int32)
        dot += part.to(tl.int64) if WIDE else part
    products = dot.to(tl.int64) + W_SHIFT * row_sum + X_SHIFT * column_sum - X_SHIFT * W_SHIFT * DEPTH
    return products, row_sum, column_sum


@triton.jit
def digit_step(row, inside, digit, KIND: tl.constexpr):
    """What a digit that is set adds to the value, for rows of a grid."""
    if KIND == LEARNED:
        return tl.load(row + 1 + digit, mask=inside, other=0.0)
    step = tl.load(row + 1, mask=inside, other=0.0)
    if KIND == TERNARY:
        return step
    return step * (tl.full(step.shape, 1, tl.int32) << digit).to(tl.float32)


@triton.jit
def lowbit_linear_kernel(
    x,  # [rows, DEPTH]: floats, or uint8 codes
    x_grid,  # [1, 3 or 1 + X_BITS]
    planes,  # [W_BITS, columns, words]
    w_grid,  # [1 or columns, W_COLUMNS]
    bias,  # [columns] or None
    scale,  # [columns] or None
    shift,  # [columns] or None
    out_grid,  # [1, 3] or None
    out,  # [rows, columns]: floats, or uint8 codes of out_grid
    rows,
    columns,
    words,
    lower,
    upper,
    DEPTH: tl.constexpr,  # a constant: the interpreter of Triton 3.6 takes no other bound of a loop
    X_KIND: tl.constexpr,
    X_LEVELS: tl.constexpr,
    X_CODES: tl.constexpr,
    W_KIND: tl.constexpr,
    W_BITS: tl.constexpr,
    X_BITS: tl.constexpr,
    W_COLUMNS: tl.constexpr,
    DIGITS: tl.constexpr,
    W_PER_CHANNEL: tl.constexpr,
    OUT_KIND: tl.constexpr,
    OUT_LEVELS: tl.constexpr,
    X_SHIFT: tl.constexpr,
    W_SHIFT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """out = epilogue(D, SA, SW, V) with D = sum ca*cw, SA = sum ca, SW = sum cw, V = DEPTH.

    Tensor cores multiply signed bytes, codes go to 255: codes of 8 bits are multiplied less 128, and
    sum (ca - s)(cw - t) = D - t*SA - s*SW + s*t*V gives D back, exactly.

    DIGITS (a basis is learned): one product of each pair of digits, added up with their steps.
    """
    blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = (tl.program_id(0) % blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    there = column < columns
    w_row = w_grid + (column if W_PER_CHANNEL else tl.zeros_like(column)) * W_COLUMNS
    x_offset = tl.load(x_grid)
    w_offset = tl.load(w_row, mask=there, other=0.0)
    if DIGITS:
        x_step = 1.0
        by_activation = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        activations = tl.zeros([BLOCK_ROWS, 1], tl.float32)
        weights = tl.zeros([1, BLOCK_COLUMNS], tl.float32)
        for i in range(W_BITS):
            w_step = digit_step(w_row, there, i, W_KIND)
            for j in range(X_BITS):
                products, row_sum, column_sum = tile_sums(
                    x, x_grid, planes, row, column, rows, columns, words, j, i, DEPTH, X_KIND, X_LEVELS, X_CODES,
                    W_KIND, W_BITS, 0, 0, WIDE, True, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH,
                )  # fmt: skip
                own_step = digit_step(x_grid, True, j, X_KIND)
                by_activation += (w_step * own_step) * products.to(tl.float32)
                if i == 0:
                    activations += own_step * row_sum.to(tl.float32)
                if j == 0:
                    weights += w_step * column_sum.to(tl.float32)
        by_activation += w_offset * activations
        by_offset = weights + w_offset * tl.full(column.shape, DEPTH, tl.float32)
    else:
        products, row_sum, column_sum = tile_sums(
            x, x_grid, planes, row, column, rows, columns, words, 0, 0, DEPTH, X_KIND, X_LEVELS, X_CODES, W_KIND,
            W_BITS, X_SHIFT, W_SHIFT, WIDE, False, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH,
        )  # fmt: skip
        x_step, w_step = tl.load(x_grid + 1), tl.load(w_row + 1, mask=there, other=0.0)
        by_activation = w_step * products.to(tl.float32) + w_offset * row_sum.to(tl.float32)
        by_offset = w_step * column_sum.to(tl.float32) + w_offset * tl.full(column.shape, DEPTH, tl.float32)
    y = x_step * by_activation + x_offset * by_offset
    if bias is not None:
        y = y + tl.load(bias + column, mask=there, other=0.0)
    if scale is not None:
        slope = tl.load(scale + column, mask=there, other=0.0)
        y = multiply_add(y, slope, tl.load(shift + column, mask=there, other=0.0))
    y = tl.where(y < lower, lower, y)
    y = tl.where(y > upper, upper, y)
    place = out + row * columns + column
    if out_grid is not None:
        offset, _, inverse, threshold = load_grid(out_grid, 0, 1)
        code = code_of(y, offset, inverse, threshold, OUT_KIND, OUT_LEVELS)
        tl.store(place, tl.where(code != code, 0.0, code).to(tl.uint8), mask=inside)
    else:
        store_rounded(place, y, inside)


def coded(op: str, kind: int, levels: int) -> tuple[int, int]:
    """Bits of a quantizer's codes, and columns of its grid."""
    if kind != LEARNED.value:
        check_quantizer(op, kind, levels)
        return 2 if kind == TERNARY.value else levels.bit_length(), 3
    fits = 1 <= levels <= 255 and levels & (levels + 1) == 0
    check(fits, op, "levels", "2^n - 1 with n from 1 to 8 for a learned basis", levels)
    return levels.bit_length(), 1 + levels.bit_length()


def lowbit_linear(
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
    """``quantkernels.ops.lowbit_linear``; it goes by the planes."""
    op = "lowbit_linear"
    if x.dtype != torch.uint8:
        check_float(op, "x", x)
    check(x.dim() >= 1, op, "x", "of at least one dimension", list(x.shape))
    x_bits, x_columns = coded(op, x_kind, x_levels)
    bits, w_columns = coded(op, w_kind, w_levels)
    depth = x.shape[-1]
    words = triton.cdiv(depth, 32)
    check(planes.dtype == torch.int32, op, "planes", "Int", planes.dtype)
    shape = f"of shape [{bits}, out_features, {words}]"
    fits = planes.dim() == 3 and planes.shape[0] == bits and planes.shape[2] == words
    check(fits, op, "planes", shape, list(planes.shape))
    columns = planes.shape[1]
    per_channel = w_grid.dim() == 2 and w_grid.shape[0] == columns and columns != 1
    x_grid = parameters(op, "x_grid", x_grid, x, 1, x_columns)
    w_grid = parameters(op, "w_grid", w_grid, x, columns if per_channel else 1, w_columns)
    vectors = [
        None if v is None else parameters(op, name, v, x, columns)
        for name, v in (("bias", bias), ("scale", scale), ("shift", shift))
    ]
    if out_grid is not None:
        out_grid = parameters(op, "out_grid", out_grid, x, 1, coded(op, out_kind, out_levels)[1])
        if out_kind == LEARNED.value:
            y = lowbit_linear(
                x, x_grid, x_kind, x_levels, planes, w_grid, w_kind, w_levels, bias, scale, shift, lower, upper,
                None, 0, 0, torch.float32,
            )  # fmt: skip
            return learned_basis_encode(y, out_grid, None)
        out_dtype = torch.uint8
    elif out_dtype is None:
        out_dtype = torch.float32 if x.dtype == torch.uint8 else x.dtype
    if x_kind == LEARNED.value and x.dtype != torch.uint8:
        x = learned_basis_encode(x, x_grid, None)
    codes = x.dtype == torch.uint8
    x, planes = x.contiguous(), planes.contiguous()
    out = x.new_empty((*x.shape[:-1], columns), dtype=out_dtype)
    if out.numel() == 0:
        return out
    rows = out.numel() // columns
    lowbit_linear_kernel[(triton.cdiv(rows, _BLOCK_ROWS) * triton.cdiv(columns, _BLOCK_COLUMNS),)](
        x,
        x_grid,
        planes,
        w_grid,
        *vectors,
        out_grid,
        out,
        rows,
        columns,
        words,
        lower,
        upper,
        DEPTH=depth,
        X_KIND=x_kind,
        X_LEVELS=x_levels,
        X_CODES=codes,
        W_KIND=w_kind,
        W_BITS=bits,
        X_BITS=x_bits,
        W_COLUMNS=w_columns,
        DIGITS=LEARNED.value in (x_kind, w_kind),
        W_PER_CHANNEL=per_channel,
        OUT_KIND=out_kind,
        OUT_LEVELS=out_levels,
        X_SHIFT=128 if codes or x_levels > 127 else 0,
        W_SHIFT=128 if w_levels > 127 else 0,
        WIDE=depth > _DEPTH_OF_INT32,
        BLOCK_ROWS=_BLOCK_ROWS,
        BLOCK_COLUMNS=_BLOCK_COLUMNS,
        BLOCK_DEPTH=_BLOCK_DEPTH,
        **EXACT,
    )
    return out


OPS = {"lowbit_linear": lowbit_linear}

"""The complaints of ``csrc/ops``, in its words, for kernels that are launched from Python."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_QUANTIZERS = 8
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# In messages types are called as the native checks call them.
_NAMES = {
    torch.float32: "Float",
    torch.float64: "Double",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.uint8: "Byte",
    torch.int8: "Char",
    torch.int16: "Short",
    torch.int32: "Int",
    torch.int64: "Long",
    torch.bool: "Bool",
}


def check(ok: bool, op: str, argument: str, expected: str, got: object) -> None:
    """RuntimeError ``op: argument must be expected, got ...`` unless ok."""
    if not ok:
        got = _NAMES.get(got, str(got)) if isinstance(got, torch.dtype) else got
        raise RuntimeError(f"{op}: {argument} must be {expected}, got {got}")


def check_float(op: str, argument: str, t: Tensor) -> None:
    check(t.dtype in FLOATS, op, argument, "float32, float16 or bfloat16", t.dtype)


def check_axis(op: str, x: Tensor, axis: int | None) -> int:
    """The number of channels."""
    if axis is None:
        return 1
    dim = x.dim()
    expected = f"None or in [{-dim}, {dim - 1}] for x of shape {list(x.shape)}"
    check(-dim <= axis < dim, op, "axis", expected, axis)
    return x.shape[axis]


def check_like(op: str, argument: str, t: Tensor, x: Tensor) -> None:
    check(t.dtype == x.dtype, op, argument, _NAMES[x.dtype], t.dtype)
    check(t.shape == x.shape, op, argument, f"of x's shape {list(x.shape)}", list(t.shape))


def parameters(op: str, argument: str, t: Tensor, x: Tensor, *shape: int) -> Tensor:
    """float32 parameters of this shape on x's device, contiguous."""
    check(t.dtype == torch.float32, op, argument, _NAMES[torch.float32], t.dtype)
    check(list(t.shape) == list(shape), op, argument, f"of shape {list(shape)}", list(t.shape))
    check(t.device == x.device, op, argument, f"on the device of x, {x.device}", t.device)
    return t.contiguous()


def check_quantizer(op: str, kind: int, levels: int, ste: int = 0, last: int = 2, plural: str = "") -> None:
    """``kind`` from 0 to ``last``, and the levels and the straight-through estimator that it allows."""
    names = ("0 (uniform)", "1 (binary)", "2 (ternary)", "3 (identity)")
    check(0 <= kind <= last, op, "kind" + plural, ", ".join(names[: last + 1]), kind)
    if kind == 0:
        fits = 1 <= levels <= 255 and levels & (levels + 1) == 0
        check(fits, op, "levels", "2^n - 1 with n from 1 to 8 for a uniform quantizer", levels)
    if kind == 1:
        check(levels == 1, op, "levels", "1 for a binary quantizer", levels)
    if kind == 2:
        check(levels == 2, op, "levels", "2 for a ternary quantizer", levels)
    check(0 <= ste <= 2, op, "ste" + plural, "0 (identity), 1 (clip) or 2 (full)", ste)
    if kind != 0:
        check(ste == 0, op, "ste" + plural, "0 (identity) for a quantizer that is not uniform", ste)

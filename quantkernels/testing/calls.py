"""One small call of every op for each way in which its kernels are launched.

For checks that are about kernels and not about results: memory errors, races, captures, launches. A new op is one entry
of ``ARGUMENTS``, or of ``PRODUCTS`` with problems of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ops import Kind, Ste
from ..reference import encode, pack_bitplanes
from .inputs import DTYPES, Problem
from .lowbit import LowbitProblem

# How csrc/cuda/tile/walk.h cuts a tensor: one channel and many slices, long channels, short ones, runs that begin
# inside a pack, columns, columns that wrap.
_WALKS: tuple[tuple[tuple[int, ...], int | None], ...] = (
    ((9_001,), None),
    ((3, 5_000), 0),
    ((70, 27), 0),
    ((4, 9, 5, 7), 1),
    ((640, 64), 1),
    ((300, 5), 1),
)
_LOWBIT = LowbitProblem((5, 70), 9, x_quantizer=(Kind.UNIFORM, 3), w_quantizer=(Kind.UNIFORM, 15), special=False)
_WINDOW: dict[str, Any] = {"kernel": (3, 3), "padding": (1, 1, 1, 1)}
_LEARNED: dict[str, Any] = {"x_quantizer": (Kind.LEARNED, 3), "w_quantizer": (Kind.LEARNED, 7), "extras": "l"}
_TWO_BITS: dict[str, Any] = {"w_quantizer": (Kind.UNIFORM, 3)}
# One for each engine and tile of csrc/cuda/plan.h, and for every way of copying the activation; some split the depth.
_LINEAR: tuple[dict[str, Any], ...] = (
    {},
    {"shape": (9, 200), "out_channels": 130},
    {"shape": (9, 2100), "out_channels": 20},
    {"shape": (130, 130), "out_channels": 70},
    {"shape": (20, 1408), "out_channels": 20, **_TWO_BITS},
    {"shape": (1, 70), **_LEARNED},
    {"shape": (7, 70), **_LEARNED},
    {"shape": (20, 130), **_LEARNED},
)
_CONV: tuple[dict[str, Any], ...] = (
    {"shape": (2, 6, 9, 8)},
    {"shape": (2, 32, 6, 5), "layout": "channels_last"},
    {"shape": (2, 12, 6, 5), "out_channels": 12, "groups": 12},
    {"shape": (2, 6, 6, 5), "out_channels": 12, "groups": 6, "layout": "channels_last"},
    {"shape": (1, 32, 7, 6), **_TWO_BITS},
    {"shape": (1, 128, 7, 6), "out_channels": 80, **_TWO_BITS},
    {"shape": (2, 6, 9, 8), **_LEARNED},
    {"shape": (2, 12, 6, 5), "out_channels": 12, "groups": 12, **_LEARNED},
    {"shape": (2, 6, 6, 5), "out_channels": 12, "groups": 6, **_LEARNED},
    {"shape": (1, 128, 7, 6), "layout": "channels_last", **_LEARNED},
)


@dataclass(frozen=True)
class Call:
    """An op, and what makes its arguments on a device."""

    op: str
    name: str
    arguments: Callable[[str], tuple[Any, ...]]

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def _mixture(p: Problem, device: str, count: int = 3) -> tuple[Any, ...]:
    """attention, grids, kinds, levels: ``count`` members, the second binary."""
    grids = torch.stack([p.grid()] * count).to(device)
    kinds = [int(Kind.BINARY if k == 1 else Kind.UNIFORM) for k in range(count)]
    levels = [1 if k == 1 else 2 ** (k + 1) - 1 for k in range(count)]
    return torch.full((count,), 1 / count, device=device), grids, kinds, levels


def _stes(count: int = 3) -> list[int]:
    return [0 if k == 1 else int(Ste(k % 3)) for k in range(count)]


def _channels(p: Problem, device: str, *columns: int) -> Tensor:
    return torch.linspace(0.1, 2.0, p.channels * max(1, *columns, 1), device=device).view(p.channels, *columns)


def _rows(p: Problem) -> Problem:
    """The problem as rows, for the ops that pack."""
    shape = (1, *p.shape) if len(p.shape) == 1 else (p.shape[0], p.per_channel * p.channels // p.shape[0])
    return replace(p, shape=shape, axis=None if p.axis is None else 0)


def _codes(p: Problem) -> Tensor:
    rows = _rows(p)
    return encode(rows.x(), rows.grid(), p.kind, p.levels, rows.axis)


ARGUMENTS: dict[str, Callable[[Problem, str], tuple[Any, ...]]] = {
    "channel_stats": lambda p, d: (p.x(d), p.axis),
    "minmax_grids": lambda p, d: (p.x(d), [3, 255], p.axis),
    "conditional_abs_mean": lambda p, d: (p.x(d), _channels(p, d), p.axis),
    "range_errors": lambda p, d: (p.x(d), _channels(p, d, 11), 15, p.axis),
    "fake_quantize": lambda p, d: (p.x(d), p.grid(d), *p.quantizer),
    "fake_quantize_backward": lambda p, d: (p.grad(d), p.x(d), p.grid(d), *p.quantizer),
    "fake_quantize_masked": lambda p, d: (p.x(d), p.grid(d), p.levels, p.axis),
    "apply_mask": lambda p, d: (p.grad(d), torch.arange((p.per_channel * p.channels + 31) // 32, device=d).int()),
    "attention_quantize": lambda p, d: (p.x(d), *_mixture(p, d), _stes(), p.axis),
    "attention_quantize_backward": lambda p, d: (p.grad(d), p.x(d), *_mixture(p, d, 6), _stes(6), p.axis),
    "attention_gradient": lambda p, d: (p.grad(d), p.x(d), *_mixture(p, d), p.axis),
    "minmax_attention_quantize": lambda p, d: (p.x(d), torch.full((2,), 0.5, device=d), [3, 255], p.axis),
    "learned_basis_quantize": lambda p, d: (p.x(d), _channels(p, d, 4), int(p.ste > 0), int(p.ste > 0), p.axis),
    "learned_basis_quantize_backward": lambda p, d: (p.grad(d), p.x(d), _channels(p, d, 7), 1, p.axis),
    "learned_basis_encode": lambda p, d: (p.x(d), _channels(p, d, 4), p.axis),
    "encode": lambda p, d: (p.x(d), p.grid(d), int(p.kind), p.levels, p.axis),
    "pack_bitplanes": lambda p, d: (_codes(p).to(d), int(p.kind), p.levels),
    "unpack_bitplanes": lambda p, d: (
        pack_bitplanes(_codes(p), p.kind, p.levels).to(d),
        int(p.kind),
        _rows(p).shape[1],
    ),
    "prepack_weight": lambda p, d: (
        pack_bitplanes(_codes(p), p.kind, p.levels).to(d),
        int(p.kind),
        p.levels,
        _rows(p).shape[1],
        [1, 1],
        1,
    ),
    "quantize_pack": lambda p, d: (_rows(p).x(d), _rows(p).grid(d), int(p.kind), p.levels, _rows(p).axis),
}


def _products(op: str) -> Iterator[Call]:
    """Every engine, the types in turn."""
    for i, shape in enumerate(_LINEAR if op == "lowbit_linear" else _CONV):
        window: dict[str, Any] = {} if op == "lowbit_linear" else _WINDOW
        problem = replace(_LOWBIT, **window, **shape, dtype=(*DTYPES, torch.uint8)[i % 4])
        yield Call(op, f"{problem}", lambda device, p=problem: tuple(p.arguments(device)))  # type: ignore[misc]


PRODUCTS = ("lowbit_linear", "lowbit_conv2d")
OPS = (*ARGUMENTS, *PRODUCTS)


def calls(*ops: str) -> Iterator[Call]:
    """The calls of ``ops``, or of all: walks in turn with types and estimators, so that every walk meets every type."""
    for op in ops or OPS:
        if op in PRODUCTS:
            yield from _products(op)
            continue
        make = ARGUMENTS[op]
        for i, dtype in enumerate(DTYPES):
            for (shape, axis), ste in zip(_WALKS, (Ste.FULL, Ste.CLIP, Ste.IDENTITY) * 2, strict=True):
                ste = Ste((ste + i) % 3)
                problem = Problem(shape, dtype, axis=axis, levels=15, ste=ste)
                yield Call(op, f"{problem}", lambda device, make=make, p=problem: make(p, device))  # type: ignore[misc]

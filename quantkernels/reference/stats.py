"""Statistics of a tensor, per tensor (axis None) or per channel along `axis`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rows_of(x: Tensor, axis: int | None) -> Tensor:
    """View x as [C, everything else]: C = 1 per tensor, otherwise the size of `axis`."""
    if axis is None:
        return x.reshape(1, -1)
    moved = x.movedim(axis, 0)
    # -1 is ambiguous for an empty tensor, so the row length is counted.
    length = 1
    for size in moved.shape[1:]:
        length *= size
    return moved.reshape(moved.shape[0], length)


def channel_stats(x: Tensor, axis: int | None = None) -> Tensor:
    """float32 [C, 4]: min, max, sum |x|, sum x^2 of each channel. A channel without elements has zeros."""
    rows = rows_of(x, axis).double()
    if rows.shape[1] == 0:
        return torch.zeros(rows.shape[0], 4, device=x.device)
    columns = [rows.amin(1), rows.amax(1), rows.abs().sum(1), rows.square().sum(1)]
    return torch.stack(columns, 1).float()


def minmax_grids(x: Tensor, levels: Sequence[int], axis: int | None = None) -> Tensor:
    """float32 [K, C, 3]: (min, (max - min) / levels[k], 0) of each channel; DQA, equations 9 to 11."""
    low, high = channel_stats(x, axis)[:, :2].unbind(1)
    return torch.stack([torch.stack((low, (high - low) / n, torch.zeros_like(low)), 1) for n in levels])


def conditional_abs_mean(x: Tensor, threshold: Tensor, axis: int | None = None) -> Tensor:
    """float32 [C]: E[|x| : |x| > threshold] of each channel, 0 where nothing exceeds it. threshold: float32
    [C].

    Ternary weight networks, Li et al. 2016, equation 6 (the optimal scale for a given threshold).
    """
    magnitude = rows_of(x, axis).double().abs()
    chosen = magnitude > threshold.double()[:, None]
    total = torch.where(chosen, magnitude, 0.0).sum(1)
    count = chosen.sum(1)
    return torch.where(count > 0, total / count.clamp(min=1), 0.0).float()


def range_errors(x: Tensor, candidates: Tensor, levels: int, axis: int | None = None) -> Tensor:
    """float32 [C, J]: sum of (Q(x) - x)^2 where Q has `levels` steps on [-a, a], for each candidate a
    (float32 [C, J]).

    Q is evaluated in float32 exactly as `fake_quantize` does with offset = -a, step = 2a/levels; DQA,
    equation 12.
    """
    rows = rows_of(x, axis).float()
    errors = []
    for j in range(candidates.shape[1]):
        a = candidates[:, j : j + 1].float()
        step = (a + a) / levels
        inverse = torch.where((step > 0) & (1.0 / step).isfinite(), 1.0 / step, 0.0)
        code = ((rows - (-a)) * inverse).clamp(0, levels).round()
        q = -a + step * code
        errors.append((q.double() - rows.double()).square().sum(1))
    if not errors:
        return torch.zeros(rows.shape[0], 0, device=x.device)
    return torch.stack(errors, 1).float()

"""The plain formulations that a user would write with torch's own operators: the baselines of the benchmarks.

Each computes what the op beside it computes, in the shortest code that autograd and torch.compile take.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def over(x: Tensor, axis: int | None) -> list[int]:
    """The dimensions that a statistic per channel, or per tensor, runs over."""
    return [d for d in range(x.dim()) if axis is None or d != axis % x.dim()]


def minmax(x: Tensor, levels: int, axis: int | None = None) -> Tensor:
    """Min-max quantization with ``levels`` steps and a straight-through gradient (DQA, equation 9)."""
    dims = over(x, axis)
    low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    step = (high - low) / levels
    q = low + step * torch.round((x - low) / step)
    return x + (q - x).detach()


def attention(x: Tensor, logits: Tensor, levels: Sequence[int], axis: int | None = None) -> Tensor:
    """sum_k softmax(logits / 100)_k * minmax_k(x) (DQA, equation 3)."""
    weights = torch.softmax(logits / 100.0, 0)
    return sum(weights[k] * minmax(x, n, axis) for k, n in enumerate(levels))  # type: ignore[return-value]


def fake_quantize(x: Tensor, offset: float, step: float, levels: int) -> Tensor:
    """Uniform quantization whose gradient stops outside the range."""
    position = ((x - offset) / step).clamp(0, levels)
    code = position + (position.round() - position).detach()
    return offset + step * code


def learned_basis(x: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest level of digits {0, 1}, its clipped gradient, and B B^T and B x (LQ-Nets, algorithm 1)."""
    codes = torch.arange(2 ** len(basis))
    digits = ((codes[:, None] >> torch.arange(len(basis))) & 1).float()
    levels, order = (digits @ basis).sort()
    rank = torch.bucketize(x.detach(), (levels[:-1] + levels[1:]) / 2)
    b = digits[order[rank]].reshape(-1, len(basis))
    q = x.clamp(max=levels[-1])
    return q + (levels[rank] - q).detach(), b.t() @ b, b.t() @ x.detach().reshape(-1)


def channel_stats(x: Tensor, axis: int | None = None) -> Tensor:
    """[C, 4]: min, max, sum |x|, sum x^2."""
    dims = over(x, axis)
    columns = (x.amin(dims), x.amax(dims), x.abs().sum(dims), x.square().sum(dims))
    return torch.stack([column.reshape(-1).float() for column in columns], 1)


def quantize_pack(x: Tensor, offset: float, step: float, bits: int) -> Tensor:
    """[bits, rows, n / 32] int32 planes, most significant first; n is a multiple of 32."""
    codes = ((x - offset) / step).round().clamp(0, 2**bits - 1).to(torch.int32)
    shifts = torch.arange(32, dtype=torch.int32, device=x.device)
    planes = [(((codes >> b) & 1).unflatten(-1, (-1, 32)) << shifts).sum(-1, dtype=torch.int32) for b in range(bits)]
    return torch.stack(planes[::-1])


class AttentionWeight(nn.Module):
    """`attention` as a parametrization of a layer's weight."""

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.logits = nn.Parameter(torch.zeros(len(self.levels)))

    def forward(self, weight: Tensor) -> Tensor:
        """The mixture of the weight's quantizations."""
        return attention(weight, self.logits, self.levels)

"""The attention mixture of DQA: which precision a layer uses is learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .. import ops
from .base import Quantizer
from .mixture import Mixture


class Attention(Mixture):
    """q = sum_k a_k Q_k(x), a = softmax(logits / temperature); DQA, equations 3 to 6.

    quantizers: 1 to 8 of them, sorted by bits n_1 <= ... <= n_K; PACT members share one alpha.
    `logits` float32 parameter [K], initially sum_{j != k} n_j / sum_j n_j, so that low bits start ahead.
    `temperature` float32 buffer, initially 100: the training lowers it batch by batch until one quantizer is
    left.

    `select(k)` ends the mixture: from then on it is that quantizer and can be packed.
    """

    temperature: Tensor

    def __init__(self, quantizers: Iterable[Quantizer], temperature: float = 100.0) -> None:
        if not temperature > 0:
            raise ValueError(f"Attention: temperature must be positive, got {temperature}")
        super().__init__(quantizers)
        bits = torch.tensor([float(q.bits) for q in self.members], dtype=torch.float32)
        self.logits = nn.Parameter(1.0 - bits / bits.sum())
        self.register_buffer("temperature", torch.tensor(temperature, dtype=torch.float32))

    def attention(self) -> Tensor:
        """float32 [K]: softmax(logits / temperature), differentiable in the logits."""
        return torch.softmax(self.logits / self.temperature, 0)

    def weights(self) -> Tensor:
        """The attention."""
        return self.attention()

    def quantize(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """sum_k a_k Q_k(x), or Q_selected(x), in the shape and dtype of x; and a function that gives it again."""
        if self.choice >= 0 or not self._covers:
            return super().quantize(x)
        q, *made_with = ops.minmax_mixture(x, self.logits, self.temperature, self._levels, self.axis)
        return q, lambda x: self._mixed(x, *made_with)

    @torch.no_grad()
    def normalise_(self) -> None:
        """logits /= their population standard deviation, in place; as they are for K = 1 and where it is
        0."""
        if len(self.quantizers) == 1:
            return
        deviation = self.logits.std(correction=0)
        self.logits.div_(torch.where(deviation > 0, deviation, torch.ones_like(deviation)))

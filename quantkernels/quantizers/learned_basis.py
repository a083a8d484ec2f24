"""LQ-Nets: a quantizer whose levels are learned, in closed form, while the network trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from ..ops import Encoding, Kind, Ste
from .base import Quantizer, uniform_levels

# What keeps the normal equations solvable where a digit never changes; it pulls such a v_j towards its last value.
RIDGE = 1e-4
DECAY = 0.9
# E|x| <= this for half of a unit Gaussian: its quartiles.
QUARTILE = 0.6745


class LearnedBasis(Quantizer):
    """q = the nearest of the levels v^T e, v learned; Zhang et al. 2018 (LQ-Nets), equations 3 to 10.

    signed: e in {-1, +1}^bits (weights); unsigned: e in {0, 1}^bits, and no gradient above the top level (activations,
    which follow a ReLU). None, the default, is signed, until a layer takes the quantizer for its activation (`track`).
    bits: 1 to 8. axis: None, or 0 for a basis an output channel, as the paper has it for weights.

    Each training forward makes one alternation of QEM (algorithm 1): the codes B of x under the basis, in the same pass
    B B^T and B x, and from them v_new = (B B^T + eps I)^-1 (B x + eps v), eps = 1e-4, of all processes' x. The basis of
    the *next* training forward is the running average of the v_new, 0.9 to 0.1, each divided by 1 - 0.9^t after t of
    them. So a forward, its recomputation under gradient checkpointing, its codes and evaluation have one basis.

    Buffers: `basis` float32 [C, bits], in use; `upcoming` float32 [C, bits], of the next training forward; `batches`
    int64, t. None of them is trained by the optimizer. v_j starts at 2^j 0.6745 sqrt(2/n) / 2^(bits-1), n = numel /
    size of dimension 1 (weights), at 2^j 1.349 / (2^bits - 1) (activations). With an axis there is no basis before the
    first tensor, or the layer, tells how many channels there are.
    """

    basis: Tensor
    upcoming: Tensor
    batches: Tensor
    learned = True

    def __init__(self, bits: int, signed: bool | None = None, axis: int | None = None) -> None:
        levels = uniform_levels("LearnedBasis", bits)
        super().__init__(bits, Kind.LEARNED, levels, Ste.IDENTITY, axis)
        self.role_decides = signed is None
        self.shared = False
        self.register_buffer("basis", torch.zeros(0, bits))
        self.register_buffer("upcoming", torch.zeros(0, bits))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self._set_signed(signed is not False)

    def _set_signed(self, signed: bool) -> None:
        self.signed = signed
        self.encoding = Encoding.SIGNED if signed else Encoding.UNSIGNED
        self.ste = Ste.IDENTITY if signed else Ste.CLIP

    def track(self, momentum: float = 0.1) -> LearnedBasis:
        """Become unsigned, unless `signed` was given, and fit the x of all processes: a layer calls this on its
        activation quantizer. Returns self."""
        if self.role_decides:
            self._set_signed(False)
        self.shared = True
        return self

    @torch.no_grad()
    def bind(self, x: Tensor) -> None:
        """Give every channel of x its first basis, unless there is one. Raises ValueError for other channels."""
        channels = 1 if self.axis is None else x.shape[self.axis]
        if self.basis.shape[0] == channels and channels > 0:
            return
        if self.basis.shape[0] > 0:
            raise ValueError(f"LearnedBasis: x must have {self.basis.shape[0]} channels, got {channels}")
        powers = 2.0 ** torch.arange(self.bits, dtype=torch.float32, device=x.device)
        if self.signed:
            fan_out = max(x.numel() // max(x.shape[1], 1), 1) if x.dim() > 1 else max(x.numel(), 1)
            deviation = 1.0 if self.shared else (2 / fan_out) ** 0.5
            row = powers * (QUARTILE * deviation / 2 ** (self.bits - 1))
        else:
            row = powers * (2 * QUARTILE / (2**self.bits - 1))
        self.basis = row.expand(channels, -1).clone()
        self.upcoming = self.basis.clone()

    def grid(self, x: Tensor, stats: Tensor | None = None, update: bool = True) -> Tensor:
        """float32 [C, 1 + bits]: offset and the step of each bit of a code, of the basis in use."""
        self.bind(x)
        return ops.grid_of_basis(self.basis, self.encoding)

    def quantize(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """(q, a function that gives it again). In training the basis moves on first, and the next one is fitted."""
        self.bind(x)
        fits = self.updates(x)
        if fits:
            with torch.no_grad():
                self.basis.copy_(self.upcoming)
        # Kept for the backward; the buffer changes before that in some loops.
        basis = self.basis.clone() if self.training else self.basis
        options = self.encoding, self.ste, self.axis
        q, gram, product = ops.learned_basis_quantize(x, basis, *options, fits)
        if fits:
            self._fit(gram, product)
        return q, lambda x: ops.learned_basis_quantize(x, basis, *options, False)[0]

    @torch.no_grad()
    def _fit(self, gram: Tensor, product: Tensor) -> None:
        if self.shared and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            moments = torch.cat((gram.flatten(1), product), 1)
            dist.all_reduce(moments)
            gram, product = moments[:, : -self.bits].view_as(gram), moments[:, -self.bits :]
        self.batches += 1
        # The running mean m_t = 0.9 m_(t-1) + 0.1 v_new, divided by 1 - 0.9^t, is this step from its last value.
        share = (1 - DECAY) / (1 - DECAY ** self.batches.double())
        self.upcoming.lerp_(fitted_basis(gram, product, self.basis), share.float())

    def check_bits(self, bits: int) -> None:
        """Raises ValueError for another number of bits: the basis was learned for this one."""
        super().check_bits(bits)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name in ("basis", "upcoming"):
            stored, own = state_dict.get(prefix + name), getattr(self, name)
            if stored is not None and own.shape[0] == 0 and stored.dim() == 2 and stored.shape[1] == self.bits:
                setattr(self, name, own.new_zeros(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """The arguments, as they would be written."""
        return super().extra_repr() + f", signed={self.signed}"


def fitted_basis(gram: Tensor, product: Tensor, basis: Tensor) -> Tensor:
    """(B B^T + eps I)^-1 (B x + eps v), float32 [C, n], from gram [C, n, n], product [C, n] and basis v [C, n].

    Gauss-Jordan elimination in float64, in all channels at once. B B^T + eps I is positive definite, so no pivot has to
    be looked for, and the device is not waited for.
    """
    n = basis.shape[1]
    right = product.double() + RIDGE * basis.double()
    ridge = RIDGE * torch.eye(n, dtype=torch.float64, device=basis.device)
    rows = torch.cat((gram.double() + ridge, right[..., None]), 2)  # [C, n, n + 1]
    for k in range(n):
        pivot = rows[:, k : k + 1] / rows[:, k : k + 1, k : k + 1]
        rows = rows - rows[:, :, k : k + 1] * pivot
        rows[:, k : k + 1] = pivot
    return rows[:, :, n].float()

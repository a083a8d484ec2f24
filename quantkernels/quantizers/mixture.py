"""What the attention mixture and Binary-Relax share: K quantizers, one weight each, one op."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import Kind
from ..ops.planes import BitPlanes
from .base import Quantizer
from .identity import Identity
from .minmax import MinMax
from .pact import PACT

MAX_MEMBERS = 8  # what the op takes


def common_axis(name: str, members: Sequence[Quantizer]) -> int | None:
    """The axis that all members have, `Identity` excepted. Raises ValueError if they differ."""
    axes = {q.axis for q in members if not isinstance(q, Identity)}
    if len(axes) > 1:
        raise ValueError(f"{name}: all quantizers must have the same axis, got {sorted(map(str, axes))}")
    return axes.pop() if axes else None


def share_alpha(name: str, members: Sequence[Quantizer]) -> None:
    """Let all PACT members use the alpha of the first. Raises ValueError if they start from different
    values."""
    pacts = [q for q in members if isinstance(q, PACT)]
    for q in pacts[1:]:
        if not torch.equal(q.alpha.detach().cpu(), pacts[0].alpha.detach().cpu()):
            values = [p.alpha.tolist() for p in pacts]
            raise ValueError(f"{name}: PACT members share one alpha and must start from the same, got {values}")
        q.alpha = pacts[0].alpha


class Mixture(Quantizer):
    """q = sum_k w_k Q_k(x) over K <= 8 quantizers, computed by `ops.attention_quantize` in one pass.

    Statistics of x are computed once for all members. `select(k)` makes it the k-th quantizer alone, with
    its bits, kind and codes; until then it has no codes. `selected` is an int64 buffer, -1 for the mixture:
    set it through `select` only, which keeps a copy on the host so that no forward has to wait for the
    device to read it.
    """

    selected: Tensor

    def __init__(self, quantizers: Iterable[Quantizer]) -> None:
        name = type(self).__name__
        members = list(quantizers)
        if not 1 <= len(members) <= MAX_MEMBERS:
            raise ValueError(f"{name}: needs 1 to {MAX_MEMBERS} quantizers, got {len(members)}")
        for q in members:
            if not isinstance(q, Quantizer) or isinstance(q, Mixture):
                raise TypeError(f"{name}: members must be plain quantizers, got {type(q).__name__}")
            if q.kind == Kind.LEARNED:
                raise TypeError(f"{name}: members must have equal steps or thresholds, got {type(q).__name__}")
            if q.transforms:
                raise ValueError(
                    f"{name}: members must quantize one and the same tensor, got {type(q).__name__}, which transforms "
                    "it first; use it alone"
                )
        members.sort(key=lambda q: q.bits)
        axis = common_axis(name, members)
        share_alpha(name, members)
        first = members[0]
        super().__init__(first.bits, first.kind, first.levels, first.ste, axis)
        self.quantizers = nn.ModuleList(members)
        self.register_buffer("selected", torch.tensor(-1, dtype=torch.int64))
        self.choice = -1
        self.learned = all(q.learned for q in members)
        self.needs_statistics = any(q.needs_statistics for q in members)
        self._kinds = [int(q.kind) for q in members]
        self._levels = [q.levels for q in members]
        self._stes = [int(q.ste) for q in members]
        # The commonest mixture gets all its grids from the statistics in one go.
        self._all_minmax = all(type(q) is MinMax and not q.tracking for q in members)

    @property
    def _covers(self) -> bool:
        """Whether every grid reaches from the smallest to the largest element of the tensor at hand."""
        return self._all_minmax and not self.tracking

    @property
    def members(self) -> list[Quantizer]:
        """The K quantizers, by bits."""
        return list(self.quantizers)  # type: ignore[arg-type]

    @property
    def current(self) -> Quantizer | None:
        """The selected quantizer, or None while this is a mixture."""
        return None if self.choice < 0 else self.members[self.choice]

    def select(self, index: int = 0) -> Mixture:
        """Use only quantizer `index` (0: the lowest bits) from now on; -1 returns to the mixture. Returns
        self."""
        if not -1 <= index < len(self.quantizers):
            raise IndexError(f"select: index must be -1 to {len(self.quantizers) - 1}, got {index}")
        self.selected.fill_(index)
        self._choose(index)
        return self

    def _choose(self, index: int) -> None:
        self.choice = index
        member = self.members[max(index, 0)]
        self.bits, self.kind, self.levels, self.ste = member.bits, member.kind, member.levels, member.ste

    def check_bits(self, bits: int) -> None:
        """Raises ValueError unless one of the quantizers has that many bits."""
        if bits not in [q.bits for q in self.members]:
            available = sorted({q.bits for q in self.members})
            raise ValueError(f"set_bits: {type(self).__name__} has quantizers of {available} bits, not of {bits}")

    def set_bits(self, bits: int) -> None:
        """Select the first quantizer of that many bits."""
        self.check_bits(bits)
        self.select([q.bits for q in self.members].index(bits))

    def track(self, momentum: float = 0.1) -> Mixture:
        """Keep running averages in each statistics-based member."""
        for q in self.members:
            q.track(momentum)
        self.momentum = momentum
        return self

    def weights(self) -> Tensor:
        """float32 [K]: the weight of each quantizer."""
        raise TypeError(f"{type(self).__name__} must define weights()")

    def grids(self, x: Tensor) -> Tensor:
        """float32 [K, C, 3]: the grids of all members for this x."""
        if self._covers:
            return ops.minmax_grids(x.detach(), self._levels, self.axis)
        members = self.members
        stats = None
        if any(q.needs_statistics and q.reads_batch(x) for q in members):
            with torch.no_grad():
                stats = ops.channel_stats(x, self.axis)
        grids = [q.grid(x, stats) for q in members]
        channels = max(grid.shape[0] for grid in grids)
        return torch.stack([grid.expand(channels, 3) for grid in grids])

    def grid(self, x: Tensor, stats: Tensor | None = None, update: bool = True) -> Tensor:
        """The grid of the selected quantizer. Raises RuntimeError while this is a mixture."""
        return self._selected("grid").grid(x, stats, update)

    def quantize(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """sum_k w_k Q_k(x), or Q_selected(x), in the shape and dtype of x; and a function that gives it again."""
        current = self.current
        if current is not None:
            return current.quantize(x)
        weights, grids = self.weights(), self.grids(x)
        q = self._mixed(x, weights, grids)
        return q, lambda x: self._mixed(x, weights.detach(), grids.detach())

    def _mixed(self, x: Tensor, weights: Tensor, grids: Tensor) -> Tensor:
        options = self._kinds, self._levels, self._stes, self.axis
        return ops.attention_quantize(x, weights, grids, *options, convex=True, covered=self._covers)

    def encode(self, x: Tensor) -> BitPlanes:
        """The codes of the selected quantizer. Raises RuntimeError while this is a mixture."""
        return self._selected("encode").encode(x)

    def _selected(self, what: str) -> Quantizer:
        current = self.current
        if current is None:
            raise RuntimeError(
                f"{type(self).__name__} is still a mixture of {len(self.quantizers)} quantizers and has "
                f"no single {what}: call select() first"
            )
        return current

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if prefix + "selected" in state_dict:
            self._choose(int(self.selected))

    def extra_repr(self) -> str:
        """Which quantizer is selected, if one is."""
        return "mixture" if self.choice < 0 else f"selected={self.choice}"

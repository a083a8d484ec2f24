"""Batch-norm of adaptive networks: one for each bit-width, and its calibration."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..quantizers.base import check_widths


class SwitchableBatchNorm2d(nn.Module):
    """A batch-norm for each bit-width, with parameters and statistics of its own; the one of `bits` is in use.

    widths: different bit-widths from 1 to 8; `bits` is the highest at first. x [N, features, H, W]. `norms` has them
    by bits in decimal. A state dict of one nn.BatchNorm2d loads into all of them. Which is in use is no part of the
    state dict. Yu et al. 2019 (slimmable networks), as AdaBits and CoQuant use it.
    """

    def __init__(self, num_features: int, widths: Sequence[int], **options: Any) -> None:
        super().__init__()
        self.widths = check_widths("SwitchableBatchNorm2d", widths)
        self.num_features = num_features
        self.norms = nn.ModuleDict({str(bits): nn.BatchNorm2d(num_features, **options) for bits in self.widths})
        self.bits = self.widths[0]

    @classmethod
    def from_float(cls, norm: nn.Module, widths: Sequence[int]) -> SwitchableBatchNorm2d:
        """Copies of a batch-norm, one for each bit-width."""
        made = cls(0, widths)
        made.num_features = norm.num_features  # type: ignore[assignment]
        made.norms = nn.ModuleDict({str(bits): copy.deepcopy(norm) for bits in made.widths})
        return made.train(norm.training)

    @property
    def current(self) -> nn.Module:
        """The batch-norm in use."""
        return self.norms[str(self.bits)]

    def forward(self, x: Tensor) -> Tensor:
        """The batch-norm of `bits`."""
        return self.current(x)

    def check_bits(self, bits: int) -> None:
        """Raises ValueError unless there is a batch-norm for that many bits."""
        if bits not in self.widths:
            raise ValueError(f"set_bits: the batch-norms are for {self.widths} bits, not for {bits}")

    def set_bits(self, bits: int) -> None:
        """Use the batch-norm of that many bits."""
        self.check_bits(bits)
        self.bits = bits

    @torch.no_grad()
    def copy_bits(self, source: int, target: int) -> None:
        """Give the batch-norm of `target` bits the parameters and statistics of that of `source` bits."""
        self.norms[str(target)].load_state_dict(self.norms[str(source)].state_dict())

    def only(self, widths: Sequence[int]) -> SwitchableBatchNorm2d:
        """The same batch-norms, not copies, of those bit-widths alone; the highest is in use. ValueError if one is
        missing."""
        for bits in widths:
            self.check_bits(bits)
        made = SwitchableBatchNorm2d(0, widths)
        made.num_features = self.num_features
        made.norms = nn.ModuleDict({str(bits): self.norms[str(bits)] for bits in made.widths})
        return made.train(self.training)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        own = [key for key in state_dict if key.startswith(prefix)]
        if not any(key.startswith(prefix + "norms.") for key in own):
            for key in own:  # of a plain batch-norm: everyone's start
                value = state_dict.pop(key)
                state_dict |= {f"{prefix}norms.{bits}.{key[len(prefix) :]}": value for bits in self.widths}
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Which one is in use."""
        return f"{self.num_features}, widths={self.widths}, bits={self.bits}"


def norms_in_use(model: nn.Module) -> list[Any]:
    """Every batch-norm with running statistics, of switchable ones the one in use."""
    idle = {
        id(norm)
        for module in model.modules()
        if isinstance(module, SwitchableBatchNorm2d)
        for norm in module.norms.values()
        if norm is not module.current
    }
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and id(m) not in idle]
    return [norm for norm in norms if norm.running_mean is not None]


@torch.no_grad()
def calibrate_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Give the batch-norms in use the statistics of these inputs, from nothing, as their average over the batches.

    batches: what the model is called with, on its device, as in training (augmented, shuffled); at least one. While
    they run the batch-norms normalise by the batch, all else is as in eval; nothing gets a gradient. Parameters stay.
    For bit-widths that were not trained: `quantkernels.copy_bits` from the nearest that was, `set_bits`, then this.
    Returns the model, its modes as they were. Raises ValueError, with nothing changed, if there is no batch.
    """
    remaining = iter(batches)
    first = next(remaining, None)
    if first is None:
        raise ValueError("calibrate_batch_norm: batches must have at least one batch, got none")
    norms = norms_in_use(model)
    training = {module: module.training for module in model.modules()}
    momentum = {norm: norm.momentum for norm in norms}
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain average over batches
            norm.train()
        for x in itertools.chain((first,), remaining):
            model(x)
    finally:
        for module, mode in training.items():
            module.training = mode
        for norm in norms:
            norm.momentum = momentum[norm]
    return model

"""DiffQ (Defossez et al. 2021): bits of weights learned against the network's size."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import quantkernels as qk
from training.algorithms.base import Algorithm, Criterion, register
from training.config import choose, require
from training.search.accounting import MIB

GROUPS = ("layer", "channel")
FLOAT_BITS = 32


@register("diffq")
class DiffQ(Algorithm):
    """Weights with pseudo-noise of learned amplitude; loss + penalty * size in MB. Activations stay float.

        [algorithm]
        name = "diffq"
        penalty = 5.0            # of a MB, 2^20 bytes, of weights
        groups = "layer"         # bits for each "layer", or for each output "channel"
        min_bits = 2
        max_bits = 15            # 8: so that the network can be packed
        bits_lr = 1e-3           # of the bits' own Adam, without weight decay

    Bits start at 8 (with max_bits = 8: halfway). The noise is the same on all processes. The bits' optimizer reads
    their gradients as they are: train in float32 or bfloat16, whose gradients are not scaled.
    """

    def __init__(
        self,
        penalty: float = 5.0,
        groups: str = "layer",
        min_bits: int = 2,
        max_bits: int = 15,
        bits_lr: float = 1e-3,
    ) -> None:
        self.penalty, self.min_bits, self.max_bits, self.bits_lr = penalty, min_bits, max_bits, bits_lr
        self.groups = choose(groups, GROUPS, "algorithm.groups")
        require(penalty >= 0, "algorithm.penalty", "0 or positive", penalty)
        require(bits_lr > 0, "algorithm.bits_lr", "positive", bits_lr)
        valid = type(min_bits) is int and type(max_bits) is int and 2 <= min_bits < max_bits <= 15
        require(valid, "algorithm.min_bits and max_bits", "rising integers from 2 to 15", (min_bits, max_bits))
        self.layers: dict[str, tuple[qk.PseudoNoise, int]] = {}
        self.adam: torch.optim.Optimizer | None = None

    def prepare(self, model: nn.Module) -> nn.Module:
        """Swap every convolution and linear layer."""
        layers = {name: m for name, m in model.named_modules() if type(m) in (nn.Conv2d, nn.Linear)}
        start = 8.0 if self.max_bits > 8 else (self.min_bits + self.max_bits) / 2
        overrides = {}
        for name, layer in layers.items():
            groups = 1 if self.groups == "layer" else layer.weight.shape[0]
            overrides[name] = {"weight": qk.PseudoNoise(groups, start, self.min_bits, self.max_bits)}
        model = qk.prepare(model, overrides=overrides)
        for name in layers:
            layer = model.get_submodule(name)
            self.layers[name] = layer.weight_quantizer, layer.weight.numel()
        return model

    def own_parameters(self) -> list[nn.Parameter]:
        """The logits of the bits, which have an optimizer of their own."""
        return [quantizer.logits for quantizer, _ in self.layers.values()]

    def parameter_groups(self, model: nn.Module, base: dict[str, Any]) -> list[dict[str, Any]]:
        """All but the bits."""
        own = {id(parameter) for parameter in self.own_parameters()}
        return [{"params": [p for p in model.parameters() if id(p) not in own], **base}]

    def start(self, model: nn.Module, total_steps: int, steps_per_epoch: int, epochs: int) -> None:
        """Adam for the bits."""
        self.adam = torch.optim.Adam(self.own_parameters(), lr=self.bits_lr)

    def before_batch(self, model: nn.Module, step: int) -> None:
        """Noise that is the same on all processes: it is of weights, and those are the same."""
        for quantizer, _ in self.layers.values():
            quantizer.seed = random.getrandbits(62)

    def size_mb(self) -> torch.Tensor:
        """Size of all weights at the bits as they are, not rounded; differentiable."""
        bits = torch.stack([quantizer.size(weights) for quantizer, weights in self.layers.values()])
        return bits.sum() / (8 * MIB)

    def loss(
        self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, criterion: Criterion
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """criterion + penalty * size."""
        outputs = model(inputs)
        return criterion(outputs.float(), targets) + self.penalty * self.size_mb(), outputs

    def before_step(self, model: nn.Module) -> None:
        """The bits' own step."""
        assert self.adam is not None
        self.adam.step()
        self.adam.zero_grad()

    @torch.no_grad()
    def rounded(self) -> dict[str, float]:
        """Layer -> bits in eval, of a layer with several groups their mean."""
        return {name: float(quantizer.bit_widths().round().mean()) for name, (quantizer, _) in self.layers.items()}

    def _cost(self) -> dict[str, float]:
        rounded = self.rounded()
        total = sum(rounded[name] * weights for name, (_, weights) in self.layers.items())
        return {"size_mb": total / 8 / MIB, "weight_bits": sum(rounded.values()) / len(rounded)}

    def results(self, model: nn.Module, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Size and mean bits of the rounded network."""
        cost = self._cost()
        return {"size MB": cost["size_mb"], "weight bits": cost["weight_bits"], "activation bits": FLOAT_BITS}

    def metrics(self, model: nn.Module) -> dict[str, Any]:
        """Bits of every layer as evaluated (activations: 32), and the size."""
        bits = {name: [bits, FLOAT_BITS] for name, bits in self.rounded().items()}
        return {"bits": bits, "method": "diffq", **self._cost()}

    def state_dict(self) -> dict[str, Any]:
        """The bits' optimizer."""
        return {} if self.adam is None else {"adam": self.adam.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        assert self.adam is not None
        self.adam.load_state_dict(state["adam"])

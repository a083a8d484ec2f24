"""Float training, and quantized training with one quantizer for weights and one for activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

import quantkernels as qk
from training.algorithms.base import Algorithm, build_quantizer, register, skip_option, split_parameters
from training.config import ConfigError, choose, require


@register("float")
class Float(Algorithm):
    """No quantization: the baseline, and the start of fine-tuning."""


@register("vanilla")
class Vanilla(Algorithm):
    """Straight-through training with one quantizer each.

    [algorithm]
    name = "vanilla"
    weight = {kind = "MinMax", bits = 2}
    activation = {kind = "PACT", bits = 2}
    skip = "first_and_last"
    quantizer_lr = 0.01             # of learned ranges such as PACT's alpha; not given: optimizer.lr
    quantizer_weight_decay = 1e-4   # not given: optimizer.weight_decay
    """

    def __init__(
        self,
        weight: Mapping[str, Any] | None = None,
        activation: Mapping[str, Any] | None = None,
        skip: str = "none",
        quantizer_lr: float | None = None,
        quantizer_weight_decay: float | None = None,
    ) -> None:
        if weight is None and activation is None:
            raise ConfigError("'vanilla' needs algorithm.weight, algorithm.activation or both")
        self.weight = weight
        self.activation = activation
        self.skip = choose(skip, ("none", "first_and_last"), "algorithm.skip")
        self.own = {"lr": quantizer_lr, "weight_decay": quantizer_weight_decay}
        for key, value in self.own.items():
            rule = value is None or (isinstance(value, int | float) and value >= 0)
            require(rule, f"algorithm.quantizer_{key}", "0 or a positive number", value)
        if weight is not None:
            build_quantizer(weight, "algorithm.weight")
        if activation is not None:
            build_quantizer(activation, "algorithm.activation")

    def prepare(self, model: nn.Module) -> nn.Module:
        """Swap every conv and linear layer (but the skipped ones) for its quantized form."""
        return qk.prepare(
            model,
            weight=build_quantizer(self.weight, "algorithm.weight") if self.weight else None,
            activation=build_quantizer(self.activation, "algorithm.activation") if self.activation else None,
            skip=skip_option(self.skip),
        )

    def parameter_groups(self, model: nn.Module, base: dict[str, Any]) -> list[dict[str, Any]]:
        """The network's parameters, and the quantizers' with their own learning rate and weight decay."""
        network, quantizers = split_parameters(model)
        own = {key: value for key, value in self.own.items() if value is not None}
        groups = [{"params": network, **base}]
        return [*groups, {"params": quantizers, **base, **own}] if quantizers else groups

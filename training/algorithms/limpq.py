"""LIMPQ (Tang et al. 2022): one joint training of a step for each layer and bit-width, its importance indicator."""

from __future__ import annotations

import fnmatch
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

import quantkernels as qk
from quantkernels.nn import QuantizedLayer
from training.algorithms.base import Algorithm, register, split_parameters
from training.config import ConfigError
from training.options import bit_set
from training.search.accounting import FIXED_BITS, Bits, ends

STEP_RANGE = (1e-5, 1.0)
LARGEST_GRADIENT = 1.0


def layers_of(model: nn.Module) -> list[str]:
    """The names of the layers that `quantkernels.prepare` swaps, or has swapped, in order of registration."""
    kinds = (nn.Conv2d, nn.Linear)
    return [name for name, m in model.named_modules() if type(m) in kinds or isinstance(m, QuantizedLayer)]


def prepare_lsq(
    model: nn.Module,
    bits: Bits,
    signed_inputs: Sequence[str] = (),
    weight_set: Sequence[int] | None = None,
    activation_set: Sequence[int] | None = None,
) -> nn.Module:
    """LSQ in every layer, per tensor: (weight, activation) bits of `bits`, 8 in the first and the last layer.

    weight_set, activation_set: bit-widths with a step each, in all layers but the first and the last.
    signed_inputs: patterns of layers whose input can be negative; the first layer's, the image, always is.
    Steps of weights start from the spread of the weights, those of activations from the first batch.
    Raises ConfigError for a pattern without a layer.
    """
    names = layers_of(model)
    fixed = ends(names)
    signed = {names[0]}
    for pattern in signed_inputs:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise ConfigError(f"algorithm.signed_inputs: {pattern!r} matches no layer")
        signed |= set(found)
    overrides: dict[str, Any] = {}
    for name in names:
        w, a = (FIXED_BITS, FIXED_BITS) if name in fixed else bits[name]
        weight = qk.LSQ(w, per_bit=None if name in fixed else weight_set)
        activation = qk.LSQ(a, name in signed, per_bit=None if name in fixed else activation_set)
        overrides[name] = {"weight": weight, "activation": activation}
    model = qk.prepare(model, overrides=overrides)
    for name in names:
        layer = model.get_submodule(name)
        layer.weight_quantizer.set_step(three_sigma_steps(layer.weight, layer.weight_quantizer.widths))
    return model


def norms_between(model: nn.Module, one: str, other: str) -> dict[str, nn.Module]:
    """The batch-norms registered after layer `one` and before layer `other`."""
    names = [name for name, _ in model.named_modules()]
    between = names[names.index(one) : names.index(other)]
    return {name: m for name in between if isinstance(m := model.get_submodule(name), nn.BatchNorm2d)}


def three_sigma_steps(weight: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """float32 [len(widths)]: max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(bits-1), the start of a weight's steps."""
    deviation, mean = torch.std_mean(weight.detach().float(), correction=0)
    bound = torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs())
    return torch.stack([bound / 2 ** (bits - 1) for bits in widths])


def importance(model: nn.Module) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]:
    """(weights, activations): layer -> bits -> step, for the quantizers with a step for each bit-width."""
    found: tuple[dict[str, dict[int, float]], ...] = ({}, {})
    for name in layers_of(model):
        layer = model.get_submodule(name)
        for steps, quantizer in zip(found, (layer.weight_quantizer, layer.activation_quantizer), strict=True):
            if isinstance(quantizer, qk.LSQ) and quantizer.per_bit is not None:
                steps[name] = dict(zip(quantizer.per_bit, quantizer.step.tolist(), strict=True))
    return found[0], found[1]


@register("limpq")
class Indicators(Algorithm):
    """The importance of every layer at every bit-width, learned in one training (LIMPQ's Algorithm 1).

        [algorithm]
        name = "limpq"
        bits = [6, 5, 4, 3, 2]
        weight_only = false          # activations at 8 bits
        signed_inputs = []           # patterns of layers whose input can be negative; the first layer's always is

    Each step adds the gradients of len(bits) + 1 passes: the whole network at each of the bits, then with bits drawn
    for every layer. Gradients are clipped to [-1, 1] by value, steps to [1e-5, 1]. The first and the last layer have 8
    bits. Evaluated at the highest bits. The steps are read by `python -m training search`.

    An indicator whose gradient is zero does not decay: the rule of the published code for parameters that a step did
    not use, written so that the device need not be asked. There its momentum rests too; here it runs on, which only
    layers that give nothing but zeros can notice, since a step uses all indicators.
    """

    def __init__(
        self, bits: Sequence[int] = (6, 5, 4, 3, 2), weight_only: bool = False, signed_inputs: Sequence[str] = ()
    ) -> None:
        self.bits = bit_set(bits, "algorithm.bits")
        self.weight_only = weight_only
        self.signed_inputs = signed_inputs
        self.passes = len(self.bits) + 1
        self.searched: list[str] = []
        self.policy: dict[str, int] = {}
        self.steps: list[nn.Parameter] = []
        self.weight_decay = 0.0

    def prepare(self, model: nn.Module) -> nn.Module:
        """LSQ with a step, and batch-norms with a copy, for each of the bits."""
        highest = (self.bits[0], FIXED_BITS if self.weight_only else self.bits[0])
        activations = None if self.weight_only else self.bits
        names = layers_of(model)
        self.searched = names[1:-1]
        if not self.searched:
            raise ConfigError("'limpq' needs a network with a layer between its first and its last one")
        first = norms_between(model, *names[:2])  # they go with the first layer, whose bits are fixed
        model = prepare_lsq(model, dict.fromkeys(names, highest), self.signed_inputs, self.bits, activations)
        qk.switch_batch_norms(model, self.bits)
        for name, norm in first.items():
            model.set_submodule(name, norm)
        return model

    def parameter_groups(self, model: nn.Module, base: dict[str, Any]) -> list[dict[str, Any]]:
        """The network's parameters; the steps, whose weight decay `before_step` adds."""
        network, self.steps = split_parameters(model)
        self.weight_decay = base["weight_decay"]
        return [{"params": network, **base}, {"params": self.steps, **base, "weight_decay": 0.0}]

    def before_batch(self, model: nn.Module, step: int) -> None:
        """Clamp the steps, and draw the policy of the last pass, the same on all processes."""
        self.clamp_steps()
        self.policy = {name: random.choice(self.bits) for name in self.searched}

    def before_pass(self, model: nn.Module, index: int) -> None:
        """The whole network at bits[index]; in the last pass the policy that was drawn."""
        self.use(model, self.policy if index == len(self.bits) else dict.fromkeys(self.policy, self.bits[index]))

    @torch.no_grad()
    def clamp_steps(self) -> None:
        """Keep the steps in [1e-5, 1]."""
        for steps in self.steps:
            steps.clamp_(*STEP_RANGE)

    def use(self, model: nn.Module, policy: Mapping[str, int]) -> None:
        """Give every layer the bits of a policy, its activation too."""
        qk.set_bits(model, {name: (b, None if self.weight_only else b) for name, b in policy.items()})

    def before_step(self, model: nn.Module) -> None:
        """Clip the gradients; add the weight decay of the indicators that have one."""
        nn.utils.clip_grad_value_(model.parameters(), LARGEST_GRADIENT)
        with torch.no_grad():
            for steps in self.steps:
                if steps.grad is not None:
                    steps.grad.addcmul_(steps, steps.grad.ne(0), value=self.weight_decay)

    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        """Evaluate at the highest bits."""
        self.clamp_steps()
        self.use(model, dict.fromkeys(self.searched, self.bits[0]))

    def metrics(self, model: nn.Module) -> dict[str, Any]:
        """The indicators: layer -> bits -> step."""
        weight, activation = importance(model)
        return {"indicators": {"weight": weight, "activation": activation}}

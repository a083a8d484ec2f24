"""LQ-Nets: quantizers whose levels are learned while the network trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import quantkernels as qk
from training.algorithms.base import Algorithm, register, skip_option
from training.config import ConfigError, choose, require

HISTOGRAM_BINS = 60
HISTOGRAM_IMAGES = 64
FLOAT = 32


@register("lqnets")
class LQNets(Algorithm):
    """Learned bases: one an output channel for weights, one a layer for activations (Zhang et al. 2018).

        [algorithm]
        name = "lqnets"
        weight_bits = 2            # 1 to 8
        activation_bits = 2        # 1 to 8, or 32: activations stay float
        skip = "first_and_last"    # as in the paper; or "none"
        histograms = true          # of three layers, at the end, for the report (figure I of the paper)

    The quantizers fit themselves in the training forward, so the optimizer sees the network's parameters alone. The
    network should have its ReLU right before each convolution (the `preact_` ones, VGG, AlexNet and GoogLeNet have).
    """

    def __init__(
        self, weight_bits: int, activation_bits: int = FLOAT, skip: str = "first_and_last", histograms: bool = True
    ) -> None:
        for key, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
            fits = type(bits) is int and (1 <= bits <= 8 or (bits == FLOAT and key == "activation_bits"))
            also = f", or {FLOAT} for float" if key == "activation_bits" else ""
            require(fits, f"algorithm.{key}", f"an integer from 1 to 8{also}", bits)
        self.weight_bits, self.activation_bits = weight_bits, activation_bits
        self.skip = choose(skip, ("none", "first_and_last"), "algorithm.skip")
        self.histograms = histograms
        self._inputs: dict[str, torch.Tensor] = {}

    def prepare(self, model: nn.Module) -> nn.Module:
        """Swap every conv and linear layer (but the skipped ones) for its quantized form."""
        activation = None if self.activation_bits == FLOAT else qk.LearnedBasis(self.activation_bits)
        weight = qk.LearnedBasis(self.weight_bits, axis=0)
        try:
            return qk.prepare(model, weight=weight, activation=activation, skip=skip_option(self.skip))
        except ValueError as error:
            raise ConfigError(f"'lqnets': {error}") from error

    def finish(self, model: nn.Module) -> None:
        """Let three layers keep what reaches them first in the final evaluation, for `histograms`."""
        layers = learned_layers(model)
        for name in chosen(list(layers)) if self.histograms else []:
            keep_first_input(layers[name], name, self._inputs)

    def metrics(self, model: nn.Module) -> dict[str, Any]:
        """The relative error of every quantized weight, |q - w|^2 / |w|^2; at the end `histograms` too."""
        found: dict[str, Any] = {"weight_error": weight_errors(model)}
        if self._inputs:
            found["histograms"] = histograms(model, self._inputs)
        return found


def learned_layers(model: nn.Module) -> dict[str, qk.nn.QuantizedLayer]:
    """Name -> layer, of those whose weight has a learned basis."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, qk.nn.QuantizedLayer) and isinstance(module.weight_quantizer, qk.LearnedBasis)
    }


@torch.no_grad()
def quantized(quantizer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """q of x, with the quantizer as it is in evaluation."""
    training = quantizer.training
    try:
        return quantizer.eval()(x)
    finally:
        quantizer.train(training)


@torch.no_grad()
def weight_errors(model: nn.Module) -> dict[str, float]:
    """Name -> |q - w|^2 / |w|^2."""
    found = {}
    for name, layer in learned_layers(model).items():
        weight = layer.weight.detach()
        q = quantized(layer.weight_quantizer, weight)  # type: ignore[arg-type]
        found[name] = ((q - weight).square().sum() / weight.square().sum()).item()
    return found


def chosen(names: list[str]) -> list[str]:
    """The first, the middle and the last."""
    return sorted({names[0], names[len(names) // 2], names[-1]}, key=names.index) if names else []


def keep_first_input(layer: nn.Module, name: str, inputs: dict[str, torch.Tensor]) -> None:
    """inputs[name] = the first images of what the layer is called with next."""

    def keep(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs[name] = args[0][:HISTOGRAM_IMAGES].detach().clone()
        handle.remove()

    handle = layer.register_forward_pre_hook(keep)


def histograms(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """Figure I of the paper: what reaches the quantizers of some layers, and how it is spread over the levels.

    Returns {layer: {"weight": h, "activation": h}}, h = {"low", "high", "counts" (of equal bins from low to high),
    "levels", "shares" (of the values that have each level)}; of the weight the first output channel, which has a basis
    of its own; no "activation" where it stays float.
    """
    layers = learned_layers(model)
    found: dict[str, dict[str, Any]] = {}
    for name, x in inputs.items():
        layer = layers[name]
        weight, quantizer = layer.weight.detach(), layer.activation_quantizer
        q = quantized(layer.weight_quantizer, weight)  # type: ignore[arg-type]
        found[name] = {"weight": histogram(weight[0], q[0])}
        if quantizer is not None:
            found[name]["activation"] = histogram(x, quantized(quantizer, x))
    return found


def histogram(x: torch.Tensor, q: torch.Tensor) -> dict[str, Any]:
    """Plain values: the distribution of x over equal bins, and of q over the levels that it has."""
    values = x.detach().float().cpu()
    low, high = values.min().item(), values.max().item()
    counts = torch.histc(values, HISTOGRAM_BINS, low, high)
    levels, occurrences = q.detach().float().cpu().unique(return_counts=True)
    shares = occurrences / occurrences.sum()
    return {
        "low": low, "high": high, "counts": [int(n) for n in counts],
        "levels": levels.tolist(), "shares": [round(share, 6) for share in shares.tolist()],
    }  # fmt: skip

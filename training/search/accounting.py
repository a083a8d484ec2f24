"""What a network costs at given bits: size, BitOps, average bits."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

MIB = 2**20  # bytes of an MB, as in the papers' tables of model sizes
FIXED_BITS = 8  # of the first and the last layer

Bits = Mapping[str, tuple[int, int]]
"""Layer name -> (weight bits, activation bits)."""


@dataclass(frozen=True)
class LayerSize:
    """A convolution or linear layer: elements of its weight, multiply-adds for one image."""

    weights: int
    macs: int


def measure(model: nn.Module, image: torch.Tensor) -> dict[str, LayerSize]:
    """The size of every nn.Conv2d and nn.Linear, in order of registration.

    model: a float network. image: [1, C, H, W]; only its shape counts, nothing is computed.
    """
    shapes = copy.deepcopy(model).to("meta").eval()
    layers = {name: m for name, m in shapes.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    macs = dict.fromkeys(layers, 0)

    def count(name: str) -> Any:
        def hook(layer: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            macs[name] += output[0].numel() * layer.weight[0].numel()

        return hook

    for name, layer in layers.items():
        layer.register_forward_hook(count(name))
    shapes(image.to("meta"))
    return {name: LayerSize(layer.weight.numel(), macs[name]) for name, layer in layers.items()}


def ends(layers: Iterable[str]) -> set[str]:
    """The names of the first and the last layer, which no search changes."""
    names = list(layers)
    return {names[0], names[-1]}


def size_mb(sizes: Mapping[str, LayerSize], bits: Bits) -> float:
    """MB of all weights, without biases and norms. Layers not in `bits`, the first and the last, have 8 bits."""
    total = sum(size.weights * (bits[name][0] if name in bits else FIXED_BITS) for name, size in sizes.items())
    return total / 8 / MIB


def gbitops(sizes: Mapping[str, LayerSize], bits: Bits) -> float:
    """10^9 bit operations an image: multiply-adds * weight bits * activation bits, over the layers in `bits`."""
    return sum(sizes[name].macs * w * a for name, (w, a) in bits.items()) / 1e9


def average_bits(bits: Bits) -> tuple[float, float]:
    """Mean over layers of the weight bits and of the activation bits."""
    return sum(w for w, _ in bits.values()) / len(bits), sum(a for _, a in bits.values()) / len(bits)

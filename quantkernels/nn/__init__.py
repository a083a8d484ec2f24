"""Layers: quantized for training and evaluation, packed for running."""

from .batch_norm import SwitchableBatchNorm2d, calibrate_batch_norm
from .conv import PackedConv2d, QConv2d
from .layer import QuantizedLayer
from .linear import PackedLinear, QLinear
from .packed import PackedLayer

__all__ = [
    "PackedConv2d",
    "PackedLayer",
    "PackedLinear",
    "QConv2d",
    "QLinear",
    "QuantizedLayer",
    "SwitchableBatchNorm2d",
    "calibrate_batch_norm",
]

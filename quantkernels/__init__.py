"""Train and deploy neural networks with 1 to 8 bits."""

from . import nn, ops
from ._library import build_info
from .ops import backend
from .quantizers import BWN, PACT, SAWB, TWN, Attention, BinaryRelax, Identity, MinMax, Quantizer

__all__ = [
    "BWN",
    "PACT",
    "SAWB",
    "TWN",
    "Attention",
    "BinaryRelax",
    "Identity",
    "MinMax",
    "Quantizer",
    "backend",
    "build_info",
    "nn",
    "ops",
]

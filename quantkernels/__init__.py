"""Train and deploy neural networks with 1 to 8 bits."""

from . import ops
from ._library import build_info
from .ops import backend

__all__ = ["backend", "build_info", "ops"]

"""Typed functions over the native ops; each family's file also holds its fake kernels and gradients."""

from .. import _library  # noqa: F401  (registers the schemas that the rules below attach to)
from ._dispatch import backend
from .conv import lowbit_conv2d
from .fake_quantize import Kind, Ste, fake_quantize, grid_gradient
from .matmul import lowbit_linear

__all__ = ["Kind", "Ste", "backend", "fake_quantize", "grid_gradient", "lowbit_conv2d", "lowbit_linear"]

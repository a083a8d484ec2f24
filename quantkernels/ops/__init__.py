"""Typed functions over the native ops; each family's file also holds its fake kernels and gradients."""

from .. import _library  # noqa: F401  (registers the schemas that the rules below attach to)
from ._dispatch import backend
from .attention import attention_gradient, attention_quantize
from .bitplanes import encode, pack_bitplanes, quantize_pack, unpack_bitplanes
from .conv import lowbit_conv2d
from .fake_quantize import Kind, Ste, fake_quantize, grid_gradient
from .learned_basis import Encoding, grid_of_basis, learned_basis_encode, learned_basis_quantize, level_table
from .matmul import lowbit_linear
from .minmax_mixture import minmax_mixture
from .plan import plan
from .prepack import prepack_weight
from .stats import channel_stats, conditional_abs_mean, minmax_grids, range_errors

__all__ = [
    "Encoding",
    "Kind",
    "Ste",
    "attention_gradient",
    "attention_quantize",
    "backend",
    "channel_stats",
    "conditional_abs_mean",
    "encode",
    "fake_quantize",
    "grid_gradient",
    "grid_of_basis",
    "learned_basis_encode",
    "learned_basis_quantize",
    "level_table",
    "lowbit_conv2d",
    "lowbit_linear",
    "minmax_grids",
    "minmax_mixture",
    "pack_bitplanes",
    "plan",
    "prepack_weight",
    "quantize_pack",
    "range_errors",
    "unpack_bitplanes",
]

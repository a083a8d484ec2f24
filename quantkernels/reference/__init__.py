"""The oracle: every op written again in eager PyTorch, straight from its formula.

Nothing here shares code with the kernels or with `quantkernels.ops`; this package imports torch and nothing
else. It is slow on purpose: one line a formula, a temporary tensor a term. Names and signatures are those of
the ops, and the float32 operations happen in the order that docs/numerics.md fixes, so element-wise results
can be compared bit for bit. Sums are accumulated in float64 and rounded once; a kernel's float32 reduction
agrees with them to a tolerance.

`differentiable_fake_quantize` and `differentiable_attention_quantize` are the same functions written for
autograd, so that the explicit backward formulas are themselves checked against something that was not
derived by hand.
"""

from .attention import (
    attention_gradient,
    attention_quantize,
    attention_quantize_backward,
    differentiable_attention_quantize,
)
from .bitplanes import encode, pack_bitplanes, plane_count, quantize_pack, unpack_bitplanes
from .conv import lowbit_conv2d
from .fake_quantize import (
    apply_mask,
    differentiable_fake_quantize,
    fake_quantize,
    fake_quantize_backward,
    fake_quantize_masked,
)
from .learned_basis import (
    differentiable_learned_basis_quantize,
    learned_basis_encode,
    learned_basis_quantize,
    learned_basis_quantize_backward,
    qem_basis,
)
from .matmul import lowbit_linear
from .stats import channel_stats, conditional_abs_mean, minmax_grids, range_errors

__all__ = [
    "apply_mask",
    "attention_gradient",
    "attention_quantize",
    "attention_quantize_backward",
    "channel_stats",
    "conditional_abs_mean",
    "differentiable_attention_quantize",
    "differentiable_fake_quantize",
    "differentiable_learned_basis_quantize",
    "encode",
    "fake_quantize",
    "fake_quantize_backward",
    "fake_quantize_masked",
    "learned_basis_encode",
    "learned_basis_quantize",
    "learned_basis_quantize_backward",
    "lowbit_conv2d",
    "lowbit_linear",
    "minmax_grids",
    "pack_bitplanes",
    "plane_count",
    "qem_basis",
    "quantize_pack",
    "range_errors",
    "unpack_bitplanes",
]

"""The ops as Triton kernels, in the namespace ``quantkernels_triton``, imported by ``quantkernels.backend("triton")``.

Kernels run on CUDA tensors, and on CPU tensors in Triton's interpreter (``TRITON_INTERPRET=1`` in the environment
before the first import): that is how machines without a GPU test them. Schemas are read from the native ops, and fake
kernels and gradients are those of ``quantkernels.ops``, so nothing is said twice.
"""

from __future__ import annotations

from . import attention, fake_quantize, learned_basis, matmul, stats
from ._library import OPS, define
from ._tiles import INTERPRETED

for _family in (stats, fake_quantize, attention, learned_basis, matmul):
    for _op, _kernel in _family.OPS.items():
        define(_op, _kernel)

__all__ = ["INTERPRETED", "OPS"]

"""The CUDA kernels run by an emulator on CPU tensors, in the namespace ``quantkernels_emu``.

For tests on machines without a GPU: thousands of times slower than any other backend. Built with ``QK_EMU=1``;
``quantkernels.backend("emu")`` imports this module. The environment variable QK_EMU_SEED, read once, chooses the order
in which the threads of a block run.
"""

from __future__ import annotations

import torch

from ._library import LIBRARIES
from .ops._register import RULES, register

NAMESPACE = "quantkernels_emu"

_path = LIBRARIES / "quantkernels_emu.so"
if not _path.exists():
    raise ImportError(f"{_path} is missing; rebuild with: QK_EMU=1 pip install --no-build-isolation -e .")
torch.ops.load_library(str(_path))
for _op in RULES:
    register(_op, NAMESPACE)

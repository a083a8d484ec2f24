"""Freshly allocated memory is filled with NaN (integers: their largest value), so an element that a kernel leaves out
shows. The native kernels allocate through torch's dispatcher, so this holds for them too (tests/test_backend.py); on
the CPU for results below 64 KiB alone, since larger ones lie in blocks that are used again (csrc/cpu/blocks.h)."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)

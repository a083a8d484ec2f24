"""Quantization by a learned basis with the statistics of QEM, forward and backward (benchmarks/workloads.py)."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.workloads import Workload

FAMILY = "learned_basis"


def test_learned_basis(workload: Workload, measure: Callable[[Workload], None]) -> None:
    """Measure one workload against its rivals."""
    measure(workload)

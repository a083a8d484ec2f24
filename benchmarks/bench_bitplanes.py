"""Quantize and pack into bit-planes (benchmarks/workloads.py lists shapes and rivals)."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.workloads import Workload

FAMILY = "bitplanes"


def test_bitplanes(workload: Workload, measure: Callable[[Workload], None]) -> None:
    """Measure one workload against its rivals."""
    measure(workload)

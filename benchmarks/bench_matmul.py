"""Low-bit linear layers from codes to codes (benchmarks/workloads.py lists shapes and rivals)."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.workloads import Workload

FAMILY = "matmul"


def test_matmul(workload: Workload, measure: Callable[[Workload], None]) -> None:
    """Measure one workload against its rivals."""
    measure(workload)

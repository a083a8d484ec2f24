"""One pass for min, max, sum |x| and sum x^2 (benchmarks/workloads.py lists shapes and rivals)."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.workloads import Workload

FAMILY = "stats"


def test_stats(workload: Workload, measure: Callable[[Workload], None]) -> None:
    """Measure one workload against its rivals."""
    measure(workload)

"""A DQA step: statistics, mixture and gradient (benchmarks/workloads.py lists shapes and rivals)."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.workloads import Workload

FAMILY = "attention"


def test_attention(workload: Workload, measure: Callable[[Workload], None]) -> None:
    """Measure one workload against its rivals."""
    measure(workload)

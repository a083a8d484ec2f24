"""A training step of ResNet-18, and a packed one on an image (benchmarks/workloads.py lists shapes and rivals)."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.workloads import Workload

FAMILY = "end_to_end"


def test_end_to_end(workload: Workload, measure: Callable[[Workload], None]) -> None:
    """Measure one workload against its rivals."""
    measure(workload)

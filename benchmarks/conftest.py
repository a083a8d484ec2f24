"""Runs the workloads under pytest-benchmark and keeps their results.

    pytest benchmarks --benchmark-only                      measure everything, into benchmarks/results/<machine>.json
    pytest benchmarks --benchmark-only -k attention         some of it, merged into the same file
    pytest benchmarks --benchmark-only --again              once more: of each workload the run that was disturbed less
    pytest benchmarks --benchmark-only --quick              tiny shapes: tries the code, keeps nothing

pytest-benchmark's own options work too (``--benchmark-json FILE`` for its raw data).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import limits as limits_of
from benchmarks import store
from benchmarks.compare import compare
from benchmarks.workloads import Workload, workloads

BUDGETS = {"matmul": 1.2, "conv": 0.8, "end_to_end": 12.0}  # seconds a workload; element-wise ones: the default
DEFAULT_BUDGET = 1.0


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the benchmarks."""
    group = parser.getgroup("quantkernels benchmarks")
    group.addoption("--quick", action="store_true", help="tiny shapes, no torch.compile, results are not kept")
    group.addoption("--again", action="store_true", help="replace results where this run is disturbed less")
    group.addoption("--results", type=Path, help="folder of the result files (default: benchmarks/results)")
    group.addoption("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))), help="default: 2")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """The files bench_<family>.py hold the tests here."""
    if file_path.name.startswith("bench_") and file_path.suffix == ".py":
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a workload of the file's family."""
    if "workload" in metafunc.fixturenames:
        mine = [w for w in workloads(metafunc.config.getoption("quick")) if w.family == metafunc.module.FAMILY]
        metafunc.parametrize("workload", mine, ids=[w.name for w in mine])


class Session:
    """What one run has measured so far."""

    def __init__(self, config: pytest.Config) -> None:
        self.quick: bool = config.getoption("quick")
        self.again: bool = config.getoption("again")
        self.threads: int = config.getoption("threads")
        self.folder: Path | None = config.getoption("results") or (None if self.quick else store.RESULTS)
        self.entries: dict[str, dict[str, Any]] = {}
        self.limits: dict[str, float] = {}

    def start(self) -> None:
        """Set the threads, and measure the limits before anything else warms the machine."""
        torch.set_num_threads(self.threads)
        self.limits = {"threads": self.threads, **limits_of.measure(self.threads, self.quick)}

    def save(self) -> Path | None:
        """Merge into the machine's file; its path, or None if nothing is kept."""
        if self.folder is None or not self.entries:
            return None
        facts = store.machine()
        path = self.folder / f"{store.machine_name(facts)}.json"
        before = store.read(path) if path.exists() else None
        known = {w.name: w for w in workloads(self.quick)}
        run = store.run_facts(self.limits)
        entries = store.less_disturbed(before, run, self.entries) if self.again else self.entries
        data = store.merge(before, facts, run, entries, known)
        if self.again:
            store.judge_by_highest_limits(data, run, known)
        store.write(path, data)
        return path


SESSION = pytest.StashKey[Session]()


def pytest_configure(config: pytest.Config) -> None:
    """Begin the run's record."""
    # Said inside torch.compile, and by torch of each int8 tensor; there is no other int8 convolution on its CPU to use.
    for text in (".*torch.jit.script:DeprecationWarning", ".*quantized tensor creation functions:UserWarning"):
        config.addinivalue_line("filterwarnings", f"ignore:{text}")
    config.stash[SESSION] = Session(config)


@pytest.fixture(scope="session")
def session(pytestconfig: pytest.Config) -> Session:
    """The run's record, with the limits measured."""
    found = pytestconfig.stash[SESSION]
    found.start()
    return found


@pytest.fixture
def measure(benchmark: Any, session: Session) -> Iterator[Callable[[Workload], None]]:
    """Measures a workload against its rivals and records it."""

    def run(workload: Workload) -> None:
        budget = 0.02 if session.quick else BUDGETS.get(workload.family, DEFAULT_BUDGET)
        times = compare(benchmark, workload.build(), budget)
        if benchmark.enabled:
            session.entries[workload.name] = store.entry(workload, times, session.limits)

    yield run
    torch.compiler.reset()  # compiled rivals of one workload must not count against the next one's


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Keep what was measured, also of a run that was interrupted."""
    record = session.config.stash[SESSION]
    record.path = record.save()  # type: ignore[attr-defined]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The medians, the ratios and the goals."""
    record = config.stash[SESSION]
    if not record.entries:
        return
    terminalreporter.section("medians, and how many times faster than each rival")
    for line in store.summary(record.entries):
        terminalreporter.write_line(line)
    path = getattr(record, "path", None)
    terminalreporter.write_line(f"kept in {path}" if path else "not kept (--quick)")

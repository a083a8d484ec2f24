"""Backends as a test parameter.

A test that takes ``backend`` runs on every backend that can run here and has kernels for all of the ops named by the
marker ``ops`` (of the test, or ``pytestmark`` of its module). tests/test_backend.py has one test a backend: for one
that cannot run, or that lacks ops, that test is the single skip with the reason. The summary at the end counts the
tests that passed on each.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

from quantkernels.testing import BACKENDS, Backend


def pytest_addoption(parser: pytest.Parser) -> None:
    names = [b.name for b in BACKENDS]
    parser.addoption("--backend", action="append", choices=names, help="run on this one alone (may be repeated)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ops(*names): the ops that a test's backend must have")
    for b in chosen(config):
        if config.getoption("backend") and b.missing:
            raise pytest.UsageError(f"--backend {b}: {b.missing}")


def chosen(config: pytest.Config) -> list[Backend]:
    wanted = config.getoption("backend")
    return [b for b in BACKENDS if not wanted or b.name in wanted]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("ops")
        ops = marker.args if marker else ()
        # The CPU runs every op: one that is missing there fails.
        usable = [b for b in chosen(metafunc.config) if b.missing is None and (b.name == "cpu" or b.has(*ops))]
        metafunc.parametrize("backend", usable, ids=str)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    outcome = yield
    callspec = getattr(item, "callspec", None)
    backend = callspec.params.get("backend") if callspec else None
    if isinstance(backend, Backend):
        outcome.get_result().user_properties.append(("backend", backend.name))


def pytest_terminal_summary(terminalreporter) -> None:
    passed = Counter(
        value
        for report in terminalreporter.stats.get("passed", [])
        for name, value in report.user_properties
        if name == "backend" and report.when == "call"
    )
    if passed:
        counts = ", ".join(f"{b.name} {passed[b.name]}" + (f" ({b.missing})" if b.missing else "") for b in BACKENDS)
        terminalreporter.write_line(f"passed on each backend: {counts}")

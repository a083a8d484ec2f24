"""The benchmarks run, judge and render what they measure; how fast anything is is not tested here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import limits, render, store
from benchmarks.compare import MOST_IN_A_ROW, MOST_SETTLING, OURS, SLOW, Times, block, compare, settling
from benchmarks.goals import Faster, OfPeak, PerCore, Within, figure
from benchmarks.workloads import Workload, unit_of, workloads
from quantkernels._lib import _host

ROOT = Path(__file__).parent.parent
FAMILIES = {"stats", "fake_quantize", "attention", "learned_basis", "bitplanes", "matmul", "conv", "end_to_end"}
ONE_OF_EACH = "float32-tensor or linear-w2a2 or conv-tiny-w4a8 or resnet18"


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a quick run of one workload of each family, in a process of its own."""
    folder = tmp_path_factory.mktemp("results")
    options = ["--benchmark-only", "--quick", f"--results={folder}", "-q", "-k", ONE_OF_EACH, "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "benchmarks", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = folder.glob("*.json")
    return path


def test_quick_run_measures_one_workload_of_each_family(quick_run: Path) -> None:
    data = store.read(quick_run)
    assert {entry["family"] for entry in data["results"].values()} == FAMILIES
    for entry in data["results"].values():
        assert len(entry["seconds"]) >= 2 and all(s > 0 for s in entry["seconds"].values())
    (run,) = data["runs"].values()
    assert run["limits"]["int8_gops"] > 0 and run["versions"]["torch"]


def test_what_a_run_measured_is_rendered(quick_run: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{render.BEGIN}\nold\n{render.END}\nafter\n")
    results = tmp_path / "machine.json"
    results.write_text(quick_run.read_text())
    for _ in range(2):  # a second rendering replaces the first
        render.main([str(results), "--readme", str(readme)])
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    for expected in ("dqa_2_4_8", "W2A2, M = 2", "W4A8, batch 1", "ResNet-18 inference", "![", "machine.png"):
        assert text.count(expected) >= 1, expected
    assert (tmp_path / "machine.png").stat().st_size > 10_000


def test_readme_without_markers_is_refused(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing here")
    with pytest.raises(ValueError, match="must have one"):
        render.replace_between(readme, "text")
    assert readme.read_text() == "nothing here"


def test_each_family_has_its_file_and_names_are_unique() -> None:
    for quick in (False, True):
        found = workloads(quick)
        assert {w.family for w in found} == FAMILIES
        assert len({w.name for w in found}) == len(found)
    assert {p.stem.removeprefix("bench_") for p in (ROOT / "benchmarks").glob("bench_*.py")} == FAMILIES


class PedanticStub:
    """As much of pytest-benchmark's fixture as `compare` uses."""

    stats: Any = None

    def pedantic(self, target: Callable[[], None], setup: Callable[[], None], rounds: int) -> None:
        for _ in range(rounds):
            setup()
            target()
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[1.0] * rounds))


def test_contestants_take_turns() -> None:
    calls: list[str] = []
    names = (OURS, "first", "second")
    contestants = {name: lambda name=name: calls.append(name) for name in names}
    times = compare(PedanticStub(), contestants, budget=1e-9)
    assert {name: len(t.seconds) for name, t in times.items()} == dict.fromkeys(names, 5 * MOST_IN_A_ROW)
    turn = MOST_SETTLING + MOST_IN_A_ROW  # untimed calls, and timed ones
    turns = calls[-5 * 3 * turn :]  # after warm-up: five times a block of each
    for i in range(5):
        one_round = turns[3 * turn * i : 3 * turn * (i + 1)]
        assert one_round == [name for name in one_round[::turn] for _ in range(turn)]
        assert set(one_round) == set(names) and one_round[-1] == OURS
    assert turns[0] != turns[3 * turn]  # the rivals' order rotates


def test_short_calls_are_timed_in_a_row_after_untimed_ones() -> None:
    assert [settling(cost) for cost in (1e-6, 0.002, 0.004, SLOW)] == [MOST_SETTLING, 3, 2, 0]
    assert [block(cost) for cost in (1e-6, 0.002, 0.004, 1.0)] == [MOST_IN_A_ROW, 5, 2, 1]


def test_goals() -> None:
    entry = {"seconds": {OURS: 2.0, "rival": 5.0}, "limit_seconds": 1.8, "operations": 8e12}
    bounds = {"threads": 2}
    assert Faster("rival", 2.5).judge(entry, bounds) == (2.5, True)
    assert Faster("rival", 2.6).judge(entry, bounds) == (2.5, False)
    assert Within("rival", 0.4).judge(entry, bounds) == (0.4, True)
    assert Within("rival", 0.3).judge(entry, bounds) == (0.4, False)
    assert OfPeak(0.9).judge(entry, bounds) == (90.0, True)
    assert PerCore(2.1).judge(entry, bounds) == (2.0, False)
    assert Faster("absent", 1).judge(entry, bounds) is None


def test_entry_keeps_what_was_measured_and_its_limit() -> None:
    (workload,) = [w for w in workloads() if w.name == "dqa_2_4_8-1Mi-float32-tensor"]
    times = {name: Times([s]) for name, s in ((OURS, 1e-3), ("copy_", 1e-4), ("eager", 2e-2))}
    found = store.entry(workload, times, {"threads": 2})
    assert found["limit_seconds"] == pytest.approx(3e-4)  # six passes, a copy makes two
    assert found["goals"] == [{"goal": "≥ 30 x eager", "value": 20.0, "met": False}]


def test_runs_are_merged() -> None:
    known = ["a", "b"]
    old = store.merge(None, {}, {"date": "day 1"}, {"a": {"value": 1}, "b": {"value": 1}, "gone": {}}, known)
    assert list(old["results"]) == known
    new = store.merge(old, {}, {"date": "day 2"}, {"b": {"value": 2}}, known)
    assert new["results"] == {"a": {"value": 1, "run": "day 1"}, "b": {"value": 2, "run": "day 2"}}
    assert set(new["runs"]) == {"day 1", "day 2"}
    last = store.merge(new, {}, {"date": "day 3"}, {"a": {}, "b": {}}, known)
    assert set(last["runs"]) == {"day 3"}


def test_of_two_runs_the_less_disturbed_is_kept() -> None:
    def entry(ours: float, first: float, second: float) -> dict[str, Any]:
        return {"seconds": {OURS: ours, "first": first, "second": second}}

    known = ["slower", "quicker", "other commit", "new"]
    before = store.merge(None, {}, {"date": "day 1", "commit": "a"}, {n: entry(2, 2, 2) for n in known[:2]}, known)
    before = store.merge(before, {}, {"date": "day 2", "commit": "b"}, {known[2]: entry(2, 2, 2)}, known)
    found = {
        "slower": entry(1, 2.1, 2.1),  # it does not count that ours was quicker
        "quicker": entry(4, 1.9, 1.9),  # nor that it was slower
        "other commit": entry(9, 9, 9),
        "new": entry(9, 9, 9),
    }
    assert store.less_disturbed(before, {"commit": "a"}, found).keys() == {"quicker", "other commit", "new"}
    assert store.less_disturbed(None, {"commit": "a"}, found) == found


def test_a_limit_that_was_disturbed_flatters_nobody() -> None:
    product = Workload("product", "matmul", (1,), dict, goals=[OfPeak(0.5)], operations=10**9, unit="int8")
    known = {name: replace(product, name=name) for name in ("kept", "other commit", "new")}

    def merged(before: dict[str, Any] | None, date: str, commit: str, names: list[str], gops: float) -> dict[str, Any]:
        run = {"date": date, "commit": commit, "limits": {"int8_gops": gops}}
        entries: dict[str, dict[str, Any]] = {name: {"seconds": {OURS: 0.003}} for name in names}
        for name, entry in entries.items():
            store.judge(entry, known[name], run["limits"])
        data = store.merge(before, {}, run, entries, known)
        store.judge_by_highest_limits(data, run, known)
        return data

    data = merged(None, "day 1", "a", ["kept"], 400)
    assert data["results"]["kept"]["goals"] == [{"goal": "≥ 50 % of peak", "value": 83.33, "met": True}]
    data = merged(data, "day 2", "b", ["other commit"], 300)
    data = merged(data, "day 3", "a", ["new"], 1000)  # the first of its two runs was disturbed
    data = merged(data, "day 4", "a", [], 500)  # and so is a third, of which nothing is kept
    found = {name: (value["limit_seconds"], value["goals"][0]["met"]) for name, value in data["results"].items()}
    assert found == {"kept": (0.001, False), "other commit": (figure(1 / 300), True), "new": (0.001, False)}
    assert {label: run["limits"]["int8_gops"] for label, run in data["runs"].items()} == {
        "day 1": 1000,
        "day 2": 300,
        "day 3": 1000,
    }


def test_results_survive_writing_and_reading(tmp_path: Path) -> None:
    data = store.merge(None, {"cpu": "x"}, {"date": "day 1"}, {"a": {"goal": "≥ 1"}}, ["a"])
    path = tmp_path / "deeper" / "machine.json"
    store.write(path, data)
    assert store.read(path) == data
    assert json.loads(path.read_text()) == data


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 99}'])
def test_unreadable_results_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"machine\.json.*move it away"):
        store.read(path)


@pytest.mark.parametrize("isa", ["avx512", "zen4", "avx2", "portable"])
def test_limits_are_measured_with_each_instruction_set(isa: str) -> None:
    code = "from benchmarks import limits; print(min(limits.measure(threads=2, quick=True).values()))"
    environment = {**os.environ, "QK_CPU_ISA": isa}  # one that this processor lacks falls back to what it has
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) > 0


@pytest.mark.parametrize(
    "w_bits, a_bits, expected",
    [(1, 1, ("popcount", 1)), (2, 2, ("lookup", 2)), (1, 4, ("lookup", 1)), (1, 8, ("lookup", 2)), (2, 8, ("int8", 1))],
)
def test_products_are_held_against_the_highest_peak(w_bits: int, a_bits: int, expected: tuple[str, int]) -> None:
    assert unit_of(w_bits, a_bits) == expected


def test_peak_loops_refuse_what_they_cannot_measure() -> None:
    with pytest.raises(ValueError, match="unit must be fp32, int8, popcount or lookup, got int4"):
        _host.peak("int4", 1)
    buffer = limits.aligned(4096)
    with pytest.raises(ValueError, match="aligned to 64 bytes"):
        _host.read_stream(buffer[1:65], 1)
    with pytest.raises(ValueError, match="size of source"):
        _host.copy_stream(buffer, limits.aligned(64), 1, False)


@pytest.mark.parametrize("bypass", [False, True])
def test_copying_copies(bypass: bool) -> None:
    source, target = limits.aligned(4096 + 192), limits.aligned(4096 + 192)
    source[:] = np.arange(len(source)) % 251
    _, _, moved = _host.copy_stream(target, source, 1, bypass)
    assert np.array_equal(source, target) and moved == 2 * len(source)

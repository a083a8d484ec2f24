"""`make gpu-check`, as far as it goes without a GPU: the same motions on the CPU backend, and its complaints."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import render_gpu
from quantkernels.testing import OPS, calls

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tests/gpu/check.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


CHECK = load()


def run(part: str, folder: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    command = [sys.executable, SCRIPT, "--part", part, "--out", folder, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    (report,) = folder.glob("gpu-check-*.json")
    assert report.with_suffix(".log").stat().st_size > 0
    return done.returncode, json.loads(report.read_text()), done.stdout + done.stderr


def statuses(report: dict[str, Any]) -> dict[str, str]:
    return {step["name"]: step["status"] for step in report["steps"]}


def test_every_op_has_a_small_call() -> None:
    names = torch._C._dispatch_get_all_op_names()
    assert set(OPS) == {n.removeprefix("quantkernels::") for n in names if n.startswith("quantkernels::")}
    assert all(len({str(call) for call in calls(op)}) > 2 for op in OPS)


def test_dry_run_of_build_and_tests(tmp_path: Path) -> None:
    code, report, output = run("build+tests", tmp_path, "--dry-run")
    assert code == 0, output
    assert report["format"] == CHECK.FORMAT and report["passed"] and report["dry_run"]
    assert report["machine"]["torch"] == torch.__version__
    found = statuses(report)
    assert found["conformance"] == "passed" and found["build"] == "skipped"
    (trained,) = [s for s in report["steps"] if s["name"] == "tests/nn/test_backends.py on cpu"]
    assert trained["status"] == "passed" and trained["detail"]["tests"] >= 2 and trained["detail"]["failures"] == 0


def test_dry_run_of_the_sanitizers(tmp_path: Path) -> None:
    code, report, output = run("sanitize", tmp_path, "--dry-run")
    assert code == 0, output
    found = statuses(report)
    assert found["every kernel, without a sanitizer"] == "passed"
    assert {found[name] for name in CHECK.TOOLS} == {"skipped"}


def test_dry_run_of_the_benchmarks(tmp_path: Path) -> None:
    """All three of them; tests/test_gpu_benchmarks.py looks closer."""
    code, report, output = run("bench", tmp_path, "--dry-run")
    assert code == 0, output
    found = {step["name"]: step for step in report["steps"]}
    for name in CHECK.BENCHMARKS:
        assert found[f"bench {name}"]["status"] == "passed"
        assert found[f"bench {name}"]["detail"]["results"]
    detail = found["bench elementwise"]["detail"]
    assert detail["device"] == "cpu" and detail["copy_gbs"]
    for entry in detail["results"].values():
        assert entry["seconds"] > 0 and entry["of_copy"] > 0
    assert any(entry.get("eager") and entry["step"]["eager"] for entry in detail["results"].values() if "step" in entry)

    (report_path,), page = tmp_path.glob("gpu-check-*.json"), tmp_path / "page.md"
    render_gpu.main([str(report_path), "--out", str(page)])
    text = page.read_text()
    for expected in ("a dry run", "W2A2, M = 20", "resnet18, batch 2, W4A8", "DQA weights, 4 images", "encode-65536-"):
        assert expected in text, expected
    other = {**report, "machine": {"gpu": "another"}}
    with pytest.raises(ValueError, match="must be of one machine"):
        render_gpu.page([report, other])
    with pytest.raises(ValueError, match="none with results"):
        render_gpu.page([{"machine": {}, "steps": []}])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_is_missing_is_named(tmp_path: Path) -> None:
    code, report, output = run("bench", tmp_path)
    assert code == 2 and not report["passed"]
    assert report["steps"][0]["status"] == "missing"
    assert "gpu-check: missing: a torch with CUDA" in output or "missing: a GPU that torch can use" in output
    assert "Traceback" not in output


def test_a_failing_step_fails_the_report_and_shows_its_end(tmp_path: Path) -> None:
    check = CHECK.Check("bench", tmp_path, 60.0, True)
    step = check.record(check.command("broken", [sys.executable, "-c", "print('why'); raise SystemExit(3)"]))
    assert step.status == "failed" and step.detail["tail"] == ["why"]
    slow = check.record(check.command("slow", [sys.executable, "-c", "import time; time.sleep(60)"], limit=1.0))
    assert slow.status == "timed out" and slow.seconds < 30
    grandchild = "import subprocess as s, time; s.Popen(['sleep', '60']); time.sleep(60)"
    slow = check.record(check.command("grandchild", [sys.executable, "-c", grandchild], limit=2.0))
    assert slow.status == "timed out" and slow.seconds < 30
    assert check.record(check.command("absent", [tmp_path / "no-such-program"])).status == "missing"
    assert not check.report()["passed"]
    assert statuses(json.loads(check.path.read_text())) == {
        "broken": "failed",
        "slow": "timed out",
        "grandchild": "timed out",
        "absent": "missing",
    }


def test_outcome_of_a_junit_file(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    path.write_text(
        '<testsuites><testsuite name="pytest" errors="0" failures="1" skipped="1" tests="3"><testcase name="a"/>'
        '<testcase name="b"><failure message="m"/></testcase>'
        '<testcase name="c"><skipped/></testcase></testsuite></testsuites>'
    )
    assert CHECK.outcome(path) == {"tests": 3, "failures": 1, "errors": 0, "skipped": 1, "failed": ["b"]}
    assert CHECK.outcome(tmp_path / "none.xml") == {}


def test_property_tests_are_skipped_without_hypothesis(tmp_path: Path) -> None:
    """And nothing else: the files that hold them are collected and run."""
    (tmp_path / "hypothesis.py").write_text("raise ImportError('not here')\n")
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    files = ["tests/ops/test_bitplanes.py", "tests/quantizers/test_encode.py"]
    chosen = ["-k", "nothing or size_is_bits or first_planes or decode_of_encode", "--backend", "cpu"]
    path = f"{tmp_path}:{ROOT}"
    done = subprocess.run(
        [*command, *files, *chosen],
        cwd=ROOT,
        env={"PATH": "/usr/bin", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hypothesis is not installed" in done.stdout and "1 passed, 3 skipped" in done.stdout

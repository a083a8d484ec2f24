"""Results on disk: one JSON file a machine, one line a workload, each with the run that it comes from."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Collection, Mapping
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

import quantkernels as qk
from benchmarks.compare import OURS, Times
from benchmarks.goals import figure, judged
from benchmarks.limits import level2_bytes
from benchmarks.workloads import Workload

FORMAT = 1
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def machine() -> dict[str, Any]:
    """The processor, in words that two machines of a kind share."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "isa": qk.build_info()["cpu_isa"],
        "l2_kib": level2_bytes() // 1024,
        "memory_gib": round(memory / 2**30),
    }


def cpu_model() -> str:
    """The model name that the system gives, or the architecture."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found.group(1).strip() if found else platform.machine()


def machine_name(facts: Mapping[str, Any]) -> str:
    """The stem of the machine's file: a kernel set below the processor's own is another machine."""
    slug = re.sub(r"[^a-z0-9]+", "-", facts["cpu"].lower()).strip("-")
    return f"{slug}-{facts['cores']}-cores-{facts['isa']}"


def run_facts(limits: Mapping[str, float]) -> dict[str, Any]:
    """When a run was, of which commit and with what. limits: what `limits.measure` gives, and ``threads``."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "quantkernels": qk.build_info()["version"],
            "compiler": qk.build_info()["compiler"],
            "pytest-benchmark": metadata.version("pytest-benchmark"),
        },
        "limits": {name: figure(value) for name, value in limits.items()},
    }


def commit() -> dict[str, Any]:
    """The commit that is checked out, and whether files differ from it; unknown outside a clone."""

    def git(*arguments: str) -> str:
        call = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
        return {"commit": git("rev-parse", "--short=12", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "dirty": False}


def entry(workload: Workload, times: Mapping[str, Times], limits: Mapping[str, float]) -> dict[str, Any]:
    """What is kept of one workload: medians, the limit, and each goal with its figure."""
    seconds = {name: figure(t.median) for name, t in times.items()}
    found: dict[str, Any] = {
        "family": workload.family,
        "shape": list(workload.shape),
        "dtype": workload.dtype,
        **workload.tags,
        "seconds": seconds,
        "rounds": len(times[OURS].seconds),
        "spread": figure(times[OURS].spread),
    }
    if workload.operations:
        found["operations"] = workload.operations
    if workload.bytes:
        found["bytes"] = workload.bytes
    judge(found, workload, limits)
    return found


def judge(entry: dict[str, Any], workload: Workload, limits: Mapping[str, float]) -> None:
    """Set the entry's limit and its goals with their figures, by these limits of the machine."""
    limit = workload.limit_seconds(entry["seconds"], dict(limits))
    if limit is not None:
        entry["limit_seconds"] = figure(limit)
    entry["goals"] = judged(workload.goals, entry, limits)


def read(path: Path) -> dict[str, Any]:
    """A file of results. Raises ValueError, naming the file, if it is not one that this version reads."""
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); move it away and measure again") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{path} is not a results file of format {FORMAT}; move it away and measure again")
    return data


def merge(
    before: dict[str, Any] | None,
    facts: dict[str, Any],
    run: dict[str, Any],
    entries: Mapping[str, dict[str, Any]],
    known: Collection[str],
) -> dict[str, Any]:
    """The new entries over the old ones. Workloads that no longer exist go, and runs that nothing comes from."""
    old = before or {"runs": {}, "results": {}}
    label = run["date"]
    results = {**old["results"], **{name: {**value, "run": label} for name, value in entries.items()}}
    results = {name: results[name] for name in known if name in results}
    used = {value["run"] for value in results.values()}
    runs = {key: value for key, value in {**old["runs"], label: run}.items() if key in used}
    return {"format": FORMAT, "machine": facts, "runs": runs, "results": results}


def judge_by_highest_limits(data: dict[str, Any], run: Mapping[str, Any], known: Mapping[str, Workload]) -> None:
    """Give all runs of this commit the highest limits that one of them measured, and judge their entries by those.

    A disturbance lowers a limit and never raises it; held against a lowered one, a time would look better than it is.
    """
    alike = {label: r for label, r in data["runs"].items() if r["commit"] == run["commit"]}
    measured = [run["limits"], *(r["limits"] for r in alike.values())]
    highest = {name: max(limits.get(name, 0) for limits in measured) for name in run["limits"]}
    for r in alike.values():
        r["limits"] = highest
    for name, value in data["results"].items():
        if value["run"] in alike and name in known:
            judge(value, known[name], highest)


def less_disturbed(
    before: dict[str, Any] | None, run: Mapping[str, Any], entries: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Those of the new entries in which most contestants took less time than in the old ones of the same commit.

    Ours is one of several, and ratios are not looked at: this tells a machine that was left alone from one that had
    other work to do.
    """
    if before is None:
        return dict(entries)

    def wins(name: str, new: dict[str, Any]) -> bool:
        old = before["results"].get(name)
        if old is None or before["runs"][old["run"]]["commit"] != run["commit"]:
            return True
        shared = new["seconds"].keys() & old["seconds"].keys()
        return median(new["seconds"][key] / old["seconds"][key] for key in shared) < 1

    return {name: entry for name, entry in entries.items() if wins(name, entry)}


def write(path: Path, data: Mapping[str, Any]) -> None:
    """One line a run and a workload, so that a diff shows what changed; whole or not at all."""
    text = partial(json.dumps, ensure_ascii=False)
    lines = ["{", f' "format": {data["format"]},', f' "machine": {text(data["machine"])},']
    for part, end in (("runs", ","), ("results", "")):
        rows = [f"  {text(key)}: {text(value)}" for key, value in data[part].items()]
        lines += [f' "{part}": {{', ",\n".join(rows), f" }}{end}"]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join([*lines, "}", ""]))
    temporary.replace(path)


def summary(entries: Mapping[str, dict[str, Any]]) -> list[str]:
    """One line a workload for the terminal: time, how many times faster than each rival, goals."""
    lines = []
    for name, value in entries.items():
        ours = value["seconds"][OURS]
        ratios = "  ".join(f"{rival} {s / ours:.2f}x" for rival, s in value["seconds"].items() if rival != OURS)
        goals = "; ".join(f"{g['goal']}: {g['value']:.3g} {'met' if g['met'] else 'NOT MET'}" for g in value["goals"])
        lines.append(f"{name:<36}{1e3 * ours:>10.3f} ms  {ratios}" + (f"  [{goals}]" if goals else ""))
    return lines

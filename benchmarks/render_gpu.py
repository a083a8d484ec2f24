"""Renders what `make gpu-check PART=bench` measured: one page of tables. Nothing in them is typed by hand.

``python -m benchmarks.render_gpu gpu-check-bench.json [...] --out docs/gpu-results.md``; of several reports (of the
parts, say) a later one's figures replace an earlier one's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare import OURS
from benchmarks.contestants import INT_MM
from benchmarks.gpu_problems import CODES, CUBLAS, CUDNN, FLOATS
from benchmarks.render import milliseconds, table, times_as_fast

Entry = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Render the reports given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.render_gpu", description=__doc__)
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    options.out.write_text(page([json.loads(path.read_text()) for path in options.reports]))
    print(f"rendered {', '.join(map(str, options.reports))} into {options.out}")


def page(reports: Sequence[Mapping[str, Any]]) -> str:
    """All that is said of one machine. Raises ValueError if there is more than one, or nothing was measured."""
    gpus = {report["machine"].get("gpu", "no GPU: a dry run") for report in reports}
    if len(gpus) > 1:
        raise ValueError(f"render_gpu: reports must be of one machine, got {', '.join(sorted(gpus))}")
    details = [step["detail"] for report in reports for step in report["steps"] if "results" in step["detail"]]
    if not details:
        raise ValueError("render_gpu: reports must be of PART=bench, got none with results")
    found: dict[str, dict[str, Any]] = {"limits": {}, "groups": {}, "results": {}}
    for detail in details:
        for part, held in found.items():
            held.update(detail.get(part, {}))
    goals = {(goal["of"], goal["goal"]): goal for detail in details for goal in detail.get("goals", [])}
    parts = [
        headline(gpus.pop(), reports[-1]["machine"], found["limits"]),
        goal_table(list(goals.values())),
        linear_table(found["results"]),
        group_table(found["groups"]),
        network_table(found["results"]),
        element_wise_table(found["results"]),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def headline(gpu: str, machine: Mapping[str, Any], limits: Mapping[str, float]) -> str:
    """The machine and what it can do at most."""
    versions = f"torch {machine.get('torch')}, CUDA {machine.get('cuda')}, driver {machine.get('driver')}"
    peaks = ", ".join(f"{name} {value:g}" for name, value in limits.items())
    return (
        f"# Measured on a GPU\n\n**{gpu}**, {versions}, commit {machine.get('commit')}. Limits measured in the same "
        f"run: {peaks}. How: [performance-notes.md](performance-notes.md). Ratios are "
        "rivals' times as multiples of ours."
    )


def goal_table(goals: Sequence[Entry]) -> str:
    """Each goal with its figure."""
    rows = [[g["of"], g["goal"], f"{g['value']:.4g}", "met" if g["met"] else "**not met**"] for g in goals]
    return table(["of", "goal", "figure", ""], rows)


def linear_table(results: Mapping[str, Entry]) -> str:
    """lowbit_linear: a row a pair of bit-widths and M."""
    rows = [
        [
            f"W{e['w_bits']}A{e['a_bits']}, M = {e['shape'][0]}",
            f"{1e6 * e['seconds'][OURS]:.4g} us",
            f"{e['tops']:.4g}",
            f"{e['of_int8_mma']:.0%}" if "of_int8_mma" in e else "",
            *(times_as_fast(e, rival) for rival in (CUBLAS, INT_MM)),
            *(f"{1e6 * e['seconds'][form]:.4g} us" if form in e["seconds"] else "" for form in (CODES, FLOATS)),
        ]
        for e in measured(results, "lowbit_linear")
    ]
    features = next((f"K = N = {e['shape'][1]}" for e in measured(results, "lowbit_linear")), "")
    header = [f"linear, {features}", "codes to bf16", "TOPS", "of the int8 mma.sync peak"]
    return table([*header, *(f"against {rival}" for rival in (CUBLAS, INT_MM)), CODES, FLOATS], rows)


def group_table(groups: Mapping[str, Entry]) -> str:
    """Convolutions by network: geometric means, the extremes, and the sums."""
    rows = [
        [
            f"{name} ({s['layers']} of {s['of']} layers)",
            f"{s['mean']:.2f} x",
            f"{s['least']:.2f} ({s['least_at']})",
            f"{s['most']:.2f} ({s['most_at']})",
            milliseconds(s["seconds"][OURS]),
            milliseconds(s["seconds"][CUDNN]),
        ]
        for name, s in groups.items()
    ]
    return table(["convolutions", f"against {CUDNN}", "least", "most", "all layers", f"{CUDNN}, all layers"], rows)


def network_table(results: Mapping[str, Entry]) -> str:
    """Whole networks: every contestant's time."""
    entries = [e for e in results.values() if e.get("family") == "end_to_end" and OURS in e.get("seconds", {})]
    names = list(dict.fromkeys(name for e in entries for name in e["seconds"]))
    rows = [
        [
            e["job"] + (f", W{e['w_bits']}A{e['a_bits']}" if "w_bits" in e else "") + f", {e['shape'][0]} images",
            *(milliseconds(e["seconds"][name]) if name in e["seconds"] else "" for name in names),
        ]
        for e in entries
    ]
    return table(["whole networks", *names], rows)


def element_wise_table(results: Mapping[str, Entry]) -> str:
    """Element-wise ops: time and share of the copy bandwidth."""
    rows = [
        [name, f"{1e6 * e['seconds']:.4g} us", f"{e['of_copy']:.0%}"]
        for name, e in results.items()
        if isinstance(e.get("seconds"), float)
    ]
    return table(["element-wise, elements, type, channels", "time", "of the copy bandwidth"], rows)


def measured(results: Mapping[str, Entry], job: str) -> list[Entry]:
    """The entries of a job that have our time."""
    return [e for e in results.values() if e.get("job") == job and OURS in e["seconds"]]


if __name__ == "__main__":
    main()

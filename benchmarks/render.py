"""Renders what was measured: the README's tables and a plot a machine. Nothing in them is typed by hand.

``python -m benchmarks.render [RESULTS.json ...] [--readme FILE]``; without files, all of benchmarks/results.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from math import exp, log
from pathlib import Path
from typing import Any

from benchmarks import store
from benchmarks.compare import OURS
from benchmarks.contestants import (
    AS_FLOAT32,
    COMPILE,
    COPY,
    EAGER,
    FAKE_QUANTIZE,
    FP32,
    FP32_COMPILED,
    INT8,
    INT_MM,
    OURS_COMPILED,
    PER_TENSOR,
    PLANES,
    SUM,
)

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
Entry = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Render the files given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.render", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--readme", type=Path, default=store.ROOT / "README.md")
    options = parser.parse_args(arguments)
    files = options.files or sorted(store.RESULTS.glob("*.json"))
    if not files:
        raise SystemExit(f"no results in {store.RESULTS}: run pytest benchmarks --benchmark-only first")
    parts = []
    for path in files:
        data = store.read(path)
        picture = path.with_suffix(".png")
        plot(data, picture)
        parts.append(section(data, relative(picture, options.readme.parent)))
    replace_between(options.readme, "\n".join(parts))
    print(f"rendered {', '.join(map(str, files))} into {options.readme}")


def relative(path: Path, folder: Path) -> str:
    """The path as a link from folder, or in full if it lies elsewhere."""
    resolved = path.resolve()
    return str(resolved.relative_to(folder.resolve()) if resolved.is_relative_to(folder.resolve()) else resolved)


def replace_between(path: Path, text: str) -> None:
    """Put text between the two markers of a file. Raises ValueError if they are not there."""
    before = path.read_text()
    if before.count(BEGIN) != 1 or before.count(END) != 1:
        raise ValueError(f"{path} must have one {BEGIN} and one {END}")
    head, rest = before.split(BEGIN)
    path.write_text(f"{head}{BEGIN}\n{text.strip()}\n{END}{rest.split(END)[1]}")


# Tables


def section(data: Mapping[str, Any], picture: str) -> str:
    """All that the README says of one machine."""
    results = data["results"]
    tables = [element_wise_table(results), variant_table(results), linear_table(results), conv_table(results)]
    parts = [headline(data), *filter(None, [*tables, network_table(results)]), f"![Speed against rivals]({picture})"]
    return "\n\n".join(parts) + "\n"


def headline(data: Mapping[str, Any]) -> str:
    """The machine, the limits, and how many goals are met."""
    machine = data["machine"]
    label, run = max(data["runs"].items())
    limits, others = run["limits"], len(data["runs"]) - 1
    goals = [goal["met"] for entry in data["results"].values() for goal in entry["goals"]]
    earlier = f" (some figures from {others} earlier run{'s' * (others > 1)})" if others else ""
    return (
        f"**{machine['cpu']}, {machine['isa']}**, {limits['threads']:g} of {machine['cores']} cores, torch "
        f"{run['versions']['torch']}, commit {run['commit']}{' with changes' if run['dirty'] else ''}, "
        f"{label[:10]}{earlier}. Limits measured: "
        f"multiply-add {limits['fp32_gflops']:.0f} GFLOPS in float32 and {limits['int8_gops']:.0f} GOPS in int8, "
        f"AND and popcount {limits['popcount_gops']:.0f} GOPS, sums found in tables {limits['lookup_gops']:.0f} GOPS, "
        f"reading {limits['read_l2_gbs']:.0f} GB/s from L2 and "
        f"{limits['read_memory_gbs']:.0f} from memory, copying {limits['copy_l2_gbs']:.0f} and "
        f"{limits['copy_memory_gbs']:.0f} GB/s. Against a rival: its time as a multiple of ours, so more than 1 is "
        f"faster than it. Eager: the plain PyTorch formulation. **{sum(goals)} of {len(goals)} goals met.**"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; empty without rows."""
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def element_wise_table(results: Mapping[str, Entry]) -> str:
    """float32 per tensor: time, how many times as fast as each rival, the share of the limit, goals."""
    rivals = (EAGER, COMPILE, FAKE_QUANTIZE, SUM, COPY)
    rows = [
        [
            f"{e['job']}, {power(e['size'])}",
            milliseconds(e["seconds"][OURS]),
            *(times_as_fast(e, rival) for rival in rivals),
            f"{e['limit_seconds'] / e['seconds'][OURS]:.0%}",
            goals_of(e),
        ]
        for e in results.values()
        if e.get("layout") == "tensor" and e["dtype"] == "float32"
    ]
    header = ["float32, per tensor", "time", *(f"against {r}" for r in rivals), "of the copy limit", "goals"]
    return table(header, rows)


def variant_table(results: Mapping[str, Entry]) -> str:
    """Channels against per tensor, over all types, and half types against float32, over all layouts."""
    columns = {"outer": "channels outside", "inner": "channels inside", "float16": "float16", "bfloat16": "bfloat16"}
    cells: dict[tuple[str, str], dict[str, list[tuple[float, bool]]]] = {}
    for e in results.values():
        for key, rival in ((e.get("layout"), PER_TENSOR), (e["dtype"], AS_FLOAT32)):
            if key in columns and rival in e["seconds"]:
                value = e["seconds"][OURS] / e["seconds"][rival]
                met = all(goal["met"] for goal in e["goals"] if goal["goal"].endswith(rival))
                cells.setdefault((e["job"], e["size"]), {}).setdefault(key, []).append((value, met))
    lines = [
        [f"{job}, {power(size)}", *(extremes(row[key]) if key in row else "" for key in columns)]
        for (job, size), row in cells.items()
    ]
    header = "time as a multiple of per tensor (goal 1.2), and of float32 (goal 1): least to most"
    return table([header, *columns.values()], lines)


def extremes(judged: Sequence[tuple[float, bool]]) -> str:
    """Least to most, and how many miss their goal."""
    values, missed = [value for value, _ in judged], sum(not met for _, met in judged)
    return f"{min(values):.2f} to {max(values):.2f}" + (f" (**{missed} of {len(judged)} not met**)" if missed else "")


def linear_table(results: Mapping[str, Entry]) -> str:
    """lowbit_linear: a row a pair of bit-widths and M."""
    rows = [
        [
            f"W{e['w_bits']}A{e['a_bits']}, M = {e['m']}",
            milliseconds(e["seconds"][OURS]),
            f"{e['operations'] / e['seconds'][OURS] / 1e9:.0f}",
            *(times_as_fast(e, rival) for rival in (INT8, INT_MM, FP32, PLANES)),
            f"{e['limit_seconds'] / e['seconds'][OURS]:.0%}" if "limit_seconds" in e else "",
            goals_of(e),
        ]
        for e in results.values()
        if e.get("job") == "lowbit_linear"
    ]
    header = [f"linear, {features(results)}", "time", "GOPS", *(f"against {r}" for r in (INT8, INT_MM, FP32, PLANES))]
    return table([*header, "of the peak", "goals"], rows)


def features(results: Mapping[str, Entry]) -> str:
    """K = N = 4096, from the first linear layer."""
    return next((f"K = N = {e['shape'][1]}" for e in results.values() if e.get("job") == "lowbit_linear"), "")


def conv_table(results: Mapping[str, Entry]) -> str:
    """ResNet-18's convolutions: geometric means over its layers, with the extremes."""
    groups: dict[tuple[int, int, int], list[Entry]] = {}
    for e in results.values():
        if e.get("job") == "lowbit_conv2d":
            groups.setdefault((e["w_bits"], e["a_bits"], e["batch"]), []).append(e)
    rows = []
    for (w_bits, a_bits, batch), entries in sorted(
        groups.items(), key=lambda item: (-item[0][0], -item[0][1], item[0][2])
    ):
        goals: dict[str, list[bool]] = {}
        for goal in (goal for e in entries for goal in e["goals"]):
            goals.setdefault(goal["goal"], []).append(goal["met"])
        spans = [span([e["seconds"][rival] / e["seconds"][OURS] for e in entries]) for rival in (INT8, FP32, PLANES)]
        texts = "; ".join(f"{goal}: met by {sum(met)} of {len(met)}" for goal, met in goals.items())
        rows.append([f"W{w_bits}A{a_bits}, batch {batch}", *spans, texts])
    header = ["ResNet-18's convolutions", *(f"against {r}" for r in (INT8, FP32, PLANES)), "goals"]
    return table(header, rows)


def network_table(results: Mapping[str, Entry]) -> str:
    """Whole networks."""
    rivals = (FP32, FP32_COMPILED, INT8, EAGER, OURS_COMPILED)
    rows = [
        [
            f"{e['job']}, {' x '.join(map(str, e['shape']))}",
            milliseconds(e["seconds"][OURS]),
            *(times_as_fast(e, rival) for rival in rivals),
            goals_of(e),
        ]
        for e in results.values()
        if e["family"] == "end_to_end"
    ]
    return table(["whole networks", "time", *(f"against {r}" for r in rivals), "goals"], rows)


def power(size: str) -> str:
    """2^20 as HTML."""
    base, exponent = size.split("^")
    return f"{base}<sup>{exponent}</sup>"


def milliseconds(seconds: float) -> str:
    """Three digits."""
    return f"{1e3 * seconds:.3g} ms"


def times_as_fast(entry: Entry, rival: str) -> str:
    """The rival's time as a multiple of ours, or nothing if it was not measured."""
    seconds = entry["seconds"]
    return f"{seconds[rival] / seconds[OURS]:.3g} x" if rival in seconds else ""


def goals_of(entry: Entry) -> str:
    """Each goal with its figure and whether it is met."""
    return "; ".join(f"{g['goal']}: {g['value']:.3g}, {'met' if g['met'] else '**not met**'}" for g in entry["goals"])


def span(values: Sequence[float]) -> str:
    """Geometric mean (least to most)."""
    mean = exp(sum(map(log, values)) / len(values))
    return f"{mean:.2f} x ({min(values):.2f} to {max(values):.2f})"


# Plot

COLOURS = {
    EAGER: "#0072b2",
    COMPILE: "#d55e00",
    FAKE_QUANTIZE: "#009e73",
    SUM: "#cc79a7",
    COPY: "#7f7f7f",
    INT8: "#e69f00",
    FP32: "#56b4e9",
    FP32_COMPILED: "#5e3c99",
}
Row = tuple[str, dict[str, list[float]], dict[str, float]]
"""A label, the ratios to draw for each rival, and the goal for each rival."""


def plot(data: Mapping[str, Any], path: Path) -> None:
    """How many times as fast as each rival, on a logarithmic axis; short bars are goals."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = [(title, rows) for title, rows in plot_panels(data["results"]) if rows]
    heights = [len(rows) + 1.5 for _, rows in panels]
    figure, axes = pyplot.subplots(
        len(panels),
        1,
        figsize=(9, 0.27 * sum(heights) + 1.2),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    for axis, (title, rows) in zip(axes[:, 0], panels, strict=True):
        draw(axis, title, rows)
    machine = data["machine"]
    name = f"{machine['cpu']}, {machine['isa']}, {machine['cores']} cores"
    figure.suptitle(f"Times as fast as the rival; bars are goals: {name}", fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_panels(results: Mapping[str, Entry]) -> list[tuple[str, list[Row]]]:
    """Titles and rows, from top to bottom."""
    element_wise, linear, networks = [], [], []
    convolutions: dict[str, list[Entry]] = {}
    for e in results.values():
        if e.get("layout") == "tensor" and e["dtype"] == "float32":
            element_wise.append(row_of(f"{e['job']}  ${e['size'].replace('^', '^{')}}}$", [e]))
        elif e.get("job") == "lowbit_linear":
            linear.append(row_of(f"W{e['w_bits']}A{e['a_bits']}  M={e['m']}", [e]))
        elif e.get("job") == "lowbit_conv2d":
            convolutions.setdefault(f"W{e['w_bits']}A{e['a_bits']}  batch {e['batch']}", []).append(e)
        elif e["family"] == "end_to_end":
            networks.append(row_of(e["job"], [e]))
    layers = [row_of(label, entries) for label, entries in convolutions.items()]
    return [
        ("element-wise, float32 per tensor", element_wise),
        (f"linear layers, {features(results)}", linear),
        ("ResNet-18's convolutions, a dot a layer", layers),
        ("whole networks", networks),
    ]


def row_of(label: str, entries: Sequence[Entry]) -> Row:
    """Ratios and goals of one row; a goal "≤ f x time of R" is drawn at 1/f."""
    ratios: dict[str, list[float]] = {}
    goals: dict[str, float] = {}
    for e in entries:
        for rival, seconds in e["seconds"].items():
            if rival in COLOURS:
                ratios.setdefault(rival, []).append(seconds / e["seconds"][OURS])
    for goal in entries[0]["goals"]:
        sign, factor, *_ = goal["goal"].split()
        rival = next((r for r in COLOURS if goal["goal"].endswith(" " + r)), None)
        if rival is not None:
            goals[rival] = float(factor) if sign == "≥" else 1 / float(factor)
    return label, ratios, goals


def draw(axis: Any, title: str, rows: Sequence[Row]) -> None:
    """One panel."""
    from matplotlib.ticker import LogLocator, NullLocator

    seen: set[str] = set()
    for y, (_, ratios, goals) in enumerate(rows):
        for rival, values in ratios.items():
            label = None if rival in seen else rival
            axis.scatter(values, [y] * len(values), s=26, color=COLOURS[rival], label=label, alpha=0.85, zorder=3)
            seen.add(rival)
        for rival, goal in goals.items():
            axis.plot([goal, goal], [y - 0.38, y + 0.38], color=COLOURS[rival], linewidth=2, zorder=2)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.tick_params(axis="x", labelsize=8)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [label for label, *_ in rows], fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_title(title, fontsize=9, loc="left")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


if __name__ == "__main__":
    main()

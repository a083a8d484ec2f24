"""One self-contained HTML page about some runs: table, notes, learning curves, attention, settings."""

from __future__ import annotations

import base64
import html
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from training.algorithms.base import build_quantizer
from training.algorithms.dqa import CONVERGED
from training.config import ConfigError
from training.plots import figure_attention, figure_bits, figure_learning_curves, figure_levels
from training.run_folder import flatten
from training.run_reader import Run, group_by_settings, read_run

Table = tuple[Sequence[str], Sequence[Sequence[str]]]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 68rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .3rem .8rem; text-align: right }
.text { text-align: left } thead th { border-bottom: 2px solid #444 }
tbody tr:nth-child(even) { background: #f5f6f8 } td { font-variant-numeric: tabular-nums }
.notes { background: #fff6e0; border-left: 4px solid #e69f00; padding: .5rem 1rem }
figure { margin: 1rem 0 } figcaption { color: #555; font-size: .9rem } img { max-width: 100%; height: auto }
details { margin: .4rem 0 } summary { cursor: pointer } code { font-size: .85rem }
"""


def write_report(
    run_dirs: Sequence[Path | str],
    out: Path | str,
    title: str = "Training report",
    tables: Mapping[str, Table] | None = None,
    figures: Mapping[str, Figure] | None = None,
) -> Path:
    """Write one HTML page about the runs in `run_dirs` to `out`, with all images inside; nothing is fetched.

    Runs that differ only in their seed share a row: mean, and lowest to highest. Folders that are missing,
    unfinished or damaged are listed with what is wrong, and what can be read of them is used.
    `tables` (heading -> (header, rows)) and `figures` (caption -> figure) are put after the table of runs.
    Returns the path of the page. Raises ValueError if no folder is given, OSError if `out` cannot be written.
    """
    if not run_dirs:
        raise ValueError("write_report: run_dirs must name at least one folder, got none")
    runs = [read_run(folder) for folder in run_dirs]
    groups = group_by_settings(runs)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _section("Runs", table_html(*runs_table(groups))),
        _notes(runs),
        _results_section(groups),
    ]
    parts += [_section(heading, table_html(*table)) for heading, table in (tables or {}).items()]
    parts += [_section("Learning curves", *_learning_curves(groups)), _attention_section(groups), _bits_section(groups)]
    parts.append(_levels_section(groups))
    if figures:
        parts.append(_section("Figures", *(figure_html(f, caption) for caption, f in figures.items())))
    parts.append(_section("Settings", *(_settings(name, group[0]) for name, group in groups.items())))
    page = "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f"<title>{html.escape(title)}</title>",
            f"<style>{STYLE}</style></head><body>",
            *parts,
            "</body></html>",
        ]
    )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def mean_and_range(values: Sequence[float], digits: int = 2) -> str:
    """ "mean (lowest to highest)", only the value where there is one, a dash where there is none."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def runs_table(groups: Mapping[str, Sequence[Run]]) -> Table:
    """Header and rows, one row a group of seeds."""
    header = ["run", "seeds", "epochs", "final accuracy %", "deviation", "published %", "from", "minutes"]
    rows = []
    for name, group in groups.items():
        accuracies = [run.accuracy for run in group if run.accuracy is not None]
        deviation = f"{statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else "-"
        paper = group[0].recipe.get("paper", {})
        published = paper.get("published", {})
        epochs = sorted({len(run.epochs) for run in group})
        rows.append(
            [
                name,
                str(len(group)),
                " or ".join(map(str, epochs)),
                mean_and_range(accuracies),
                deviation,
                f"{published['accuracy']:.1f}" if "accuracy" in published else "-",
                paper.get("table") or "-",
                mean_and_range([run.seconds / 60 for run in group if run.epochs], 1),
            ]
        )
    return header, rows


def table_html(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; every cell is escaped, and columns with words are aligned to the left, numbers to the right."""
    words = [any(row[i][:1].isalpha() for row in rows) for i in range(len(header))]
    kinds = [' class="text"' if word else "" for word in words]

    def line(tag: str, cells: Sequence[str]) -> str:
        marked = zip(kinds, cells, strict=True)
        return "<tr>" + "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in marked) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', header)}</thead><tbody>{body}</tbody></table>"


def figure_html(figure: Figure, caption: str) -> str:
    """The figure as an inline PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    caption = html.escape(caption)
    image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _section(heading: str, *content: str) -> str:
    return f"<h2>{html.escape(heading)}</h2>\n" + "\n".join(content)


def _notes(runs: Sequence[Run]) -> str:
    notes = [f"{run.folder}: {problem}" for run in runs for problem in run.problems]
    notes += [f"{run.name}: {run.recipe['paper']['note']}" for run in _one_each(runs, "note")]
    if not notes:
        return ""
    return '<div class="notes"><ul>' + "".join(f"<li>{html.escape(note)}</li>" for note in notes) + "</ul></div>"


def _one_each(runs: Sequence[Run], key: str) -> list[Run]:
    """The first run of every name whose recipe has that key in [paper]."""
    return list({run.name: run for run in reversed(runs) if run.recipe.get("paper", {}).get(key)}.values())


def _learning_curves(groups: Mapping[str, Sequence[Run]]) -> list[str]:
    # No training losses: those of DQA hold its regulariser and would dwarf all others.
    wanted = [("eval_accuracy", "test accuracy (%)"), ("train_accuracy", "training accuracy (%)")]
    figures = []
    for key, label in wanted:
        curves = {name: [run.series(key) for run in group if run.series(key)[0]] for name, group in groups.items()}
        curves = {name: series for name, series in curves.items() if series}
        if curves:
            caption = f"{label}; lines: mean over seeds, bands: lowest to highest"
            figures.append(figure_html(figure_learning_curves(curves, label, percent=True), caption))
    return figures or ["<p>No run has a finished epoch.</p>"]


def _results_section(groups: Mapping[str, Sequence[Run]]) -> str:
    """What the algorithms measured beside the accuracy, such as that at other bit-widths; who taught whom."""
    columns = list(dict.fromkeys(key for group in groups.values() for run in group for key in run.results))
    if not columns:
        return ""
    rows = [
        [name, *(mean_and_range([run.results[key] for run in group if key in run.results]) for key in columns)]
        for name, group in groups.items()
        if any(run.results for run in group)
    ]
    return _section("Results", table_html(["run", *columns], rows), *_teachers(groups))


def _teachers(groups: Mapping[str, Sequence[Run]]) -> list[str]:
    """CoQuant's histogram: how often each bit-width taught each lower one, over all epochs and seeds."""
    rows = []
    for name, group in groups.items():
        counts: dict[str, dict[str, int]] = {}
        for students in (run_line for run in group for run_line in run.teachers()):
            for student, teachers in students.items():
                for teacher, count in teachers.items():
                    counts.setdefault(student, {}).setdefault(teacher, 0)
                    counts[student][teacher] += count
        for student, teachers in counts.items():
            total = max(1, sum(teachers.values()))
            shares = ", ".join(f"{teacher}: {100 * count / total:.1f} %" for teacher, count in teachers.items())
            rows.append([name, student, f"by {shares}"])
    if not rows:
        return []
    return ["<p>How often each bit-width was taught by which:</p>", table_html(["run", "bits", "taught"], rows)]


def _levels_section(groups: Mapping[str, Sequence[Run]]) -> str:
    parts = []
    for name, group in groups.items():
        layers = next((found for run in group if (found := run.histograms())), None)
        if layers:
            caption = (
                f"{name}: weights of one output channel and activations, before and after quantization, and levels"
            )
            parts.append(figure_html(figure_levels(layers), caption))
    return _section("Learned levels", *parts) if parts else ""


def _attention_section(groups: Mapping[str, Sequence[Run]]) -> str:
    parts = []
    for name, group in groups.items():
        run = next((run for run in group if run.attention()), None)
        if run is not None:
            parts += _attention_of(name, run)
    return _section("Attention", *parts) if parts else ""


def _attention_of(name: str, run: Run) -> list[str]:
    """Figure 3 for the first layer, and the layers that had not converged."""
    attention = run.attention()
    first, (epochs, values) = next(iter(attention.items()))
    quantizers = _quantizers(run, first)
    if quantizers:
        names = [f"{type(quantizer).__name__} {quantizer.bits}" for quantizer in quantizers]
    else:
        names = [f"quantizer {k + 1}" for k in range(len(values[0]))]
    figure = figure_attention(epochs, values, names, quantizers, first.rpartition(".")[0])
    seed = run.recipe.get("run", {}).get("seed", 0)
    parts = [figure_html(figure, f"{name}, seed {seed}: attention of its first layer, and the function that it makes")]
    last = {layer: rows[-1] for layer, (_, rows) in attention.items()}
    selected = run.recipe.get("algorithm", {}).get("select", 0)
    open_layers = {layer: row for layer, row in last.items() if row[selected] < CONVERGED}
    if run.final is None:
        return parts
    if not open_layers:
        return [
            *parts,
            f"<p>All {len(last)} mixtures had at least {CONVERGED} on the selected quantizer.</p>",
        ]
    rows = [[layer, *(f"{value:.3f}" for value in row)] for layer, row in open_layers.items()]
    text = f"<p>{len(rows)} of {len(last)} mixtures had less than {CONVERGED} on the selected quantizer:</p>"
    return [*parts, text, table_html(["mixture", *names], rows)]


def _bits_section(groups: Mapping[str, Sequence[Run]]) -> str:
    """The bits of every layer, of runs where they differ, of the first seed."""
    found = {name: run for name, group in groups.items() if (run := next((r for r in group if r.bits()), None))}
    figures = [figure_html(figure_bits(run.bits()), f"{name}: bits of every layer") for name, run in found.items()]
    return _section("Bits of the layers", *figures) if figures else ""


def _quantizers(run: Run, mixture: str) -> list[Any] | None:
    """The quantizers of a mixture, from the recipe; None where the recipe could not be read."""
    room = "activation" if mixture.endswith("activation_quantizer") else "weight"
    try:
        quantizers = [build_quantizer(table) for table in run.recipe["algorithm"][room]]
    except (KeyError, TypeError, ConfigError):
        return None
    return sorted(quantizers, key=lambda quantizer: quantizer.bits)


def _settings(name: str, run: Run) -> str:
    rows = [[key, str(value)] for key, value in {**flatten(run.recipe), **run.versions}.items() if value != ""]
    if not rows:
        return f"<p>{html.escape(name)}: not on record</p>"
    return f"<details><summary>{html.escape(name)}</summary>{table_html(['key', 'value'], rows)}</details>"

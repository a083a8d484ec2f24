"""Reads the folders of runs for reports, unfinished and damaged ones too: a bad run raises nothing."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EVALUATED = {"accuracy": "eval_accuracy", "top5": "eval_top5"}  # column of a table -> key of the final line


@dataclass
class Run:
    """What could be read of one run, and what was wrong with the rest."""

    folder: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    processes: int = 1
    epochs: list[dict[str, Any]] = field(default_factory=list)
    final: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The run's name without its seed."""
        name = self.recipe.get("run", {}).get("name") or self.folder.name
        return re.sub(r"-seed\d+$", "", str(name))

    @property
    def accuracy(self) -> float | None:
        """Final test accuracy in percent; None of a run that is not finished."""
        value = (self.final or {}).get("eval_accuracy")
        return 100 * value if isinstance(value, int | float) else None

    @property
    def figures(self) -> dict[str, float]:
        """What a finished run gave: "accuracy" and "top5" in percent, "GPU-hours", and those of `Algorithm.results`."""
        final = self.final or {}
        percent = {name: 100 * final[key] for name, key in EVALUATED.items() if key in final}
        return percent | {"GPU-hours": self.hours} | self.results

    @property
    def hours(self) -> float:
        """Hours of training times processes, with those of the search and the indicators that its bits come from.

        The search takes one process, and the indicators are counted as trained by as many as the run.
        """
        indicators, search = (self.results.get(f"{stage} s", 0.0) for stage in ("indicators", "search"))
        return (self.processes * (self.seconds + indicators) + search) / 3600

    @property
    def results(self) -> dict[str, float]:
        """The figures of `Algorithm.results` of a finished run that are numbers."""
        given = (self.final or {}).get("results") or {}
        return {key: value for key, value in given.items() if isinstance(value, int | float)}

    def teachers(self) -> list[dict[str, dict[str, int]]]:
        """Of each epoch {student's bits: {teacher's bits: batches}}, of CoQuant runs."""
        return [(line.get("algorithm") or {}).get("teachers", {}) for line in self.epochs]

    @property
    def seconds(self) -> float:
        """Training time of the epochs on record."""
        return sum(line.get("seconds", 0.0) for line in self.epochs)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """(epochs, values) of a key of the epoch lines, where it is a number."""
        points = [(line["epoch"], line[key]) for line in self.epochs if isinstance(line.get(key), int | float)]
        return [epoch for epoch, _ in points], [value for _, value in points]

    def histograms(self) -> dict[str, Any]:
        """Layer -> histograms of its weight and activation at the end, of LQ-Nets runs."""
        return ((self.final or {}).get("algorithm") or {}).get("histograms", {})

    def attention(self) -> dict[str, tuple[list[int], list[list[float]]]]:
        """Path of a mixture -> (epochs, attention [E][K]), of DQA runs."""
        found: dict[str, tuple[list[int], list[list[float]]]] = {}
        for line in self.epochs:
            for name, values in (line.get("algorithm") or {}).get("attention", {}).items():
                epochs, rows = found.setdefault(name, ([], []))
                if not rows or len(values) == len(rows[0]):
                    epochs.append(line["epoch"])
                    rows.append(values)
        return found

    def bits(self) -> dict[str, tuple[float, float]]:
        """Layer -> (weight bits, activation bits) at the end of a run with bits of their own in every layer."""
        last = self.final or (self.epochs[-1] if self.epochs else {})
        found = (last.get("algorithm") or {}).get("bits")
        return {name: (pair[0], pair[1]) for name, pair in found.items()} if isinstance(found, dict) else {}


def read_run(folder: Path | str) -> Run:
    """The run in `folder`; whatever is missing or damaged there is in `problems`."""
    run = Run(Path(folder))
    if not run.folder.is_dir():
        run.problems.append("there is no such folder")
        return run
    _read_config(run)
    _read_metrics(run)
    total = run.recipe.get("run", {}).get("epochs")
    if run.final is None and not run.problems:
        run.problems.append(f"not finished: {len(run.epochs)} of {total} epochs are on record")
    return run


def _read_config(run: Run) -> None:
    try:
        about = json.loads((run.folder / "config.json").read_text())
        run.recipe, run.versions = dict(about["recipe"]), dict(about.get("versions", {}))
        run.processes = int(about.get("processes", 1))
    except (OSError, ValueError, KeyError, TypeError) as error:
        run.problems.append(f"config.json cannot be read ({type(error).__name__}: {error})")


def _read_metrics(run: Run) -> None:
    try:
        lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        run.problems.append(f"metrics.jsonl cannot be read ({type(error).__name__}: {error})")
        return
    bad = []
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
            kind, _ = line["kind"], int(line["epoch"])
        except (ValueError, KeyError, TypeError):
            bad.append(number)
            continue
        if kind == "final":
            run.final = line
        elif kind == "epoch":
            run.epochs.append(line)
    if bad:
        some = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        run.problems.append(f"metrics.jsonl: {len(bad)} of {len(lines)} lines are damaged (line {some})")


def group_by_settings(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in nothing but the seed, under their common name, in the given order."""
    groups: dict[str, list[Run]] = {}
    keys: dict[str, str] = {}
    for run in runs:
        settings = copy.deepcopy(run.recipe)
        for key in ("seed", "name"):
            settings.get("run", {}).pop(key, None)
        identity = json.dumps([run.name, settings], sort_keys=True)
        if identity not in keys:
            name = run.name
            while name in groups:  # the same name with other settings
                name += "'"
            keys[identity], groups[name] = name, []
        groups[keys[identity]].append(run)
    return groups

"""Runs the rows of a paper's table and sets what they give beside what the paper has there.

A run lies in ROOT/NAME, or ROOT/NAME-seedN, as ``python -m training run NAME`` leaves it; one that is there is
continued, and one that is finished is taken as it is. Rows with the same settings, in one table or in several (a float
baseline, most often), share a run: the one of the row that comes first in the order of names.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from training import engine
from training.algorithms.base import build_algorithm
from training.config import TWIN, Config, UserError, load
from training.run_folder import RunFolder
from training.run_reader import read_run
from training.search.driver import search, search_of
from training.search.policy import policy_path, with_policy
from training.tables import Row, all_recipes, rows

DEFAULTS = ("accuracy", "top5", "GPU-hours")  # every run has them: shown where the paper has them, or nothing else
START = "recipe:"  # of model.init: the trained network of another recipe, with the same seed


@dataclass
class Outcome:
    """A row and what its runs gave."""

    row: Row
    figures: list[dict[str, float]] = field(default_factory=list)  # column -> figure, of each seed that ended
    errors: list[str] = field(default_factory=list)


def settings(config: Config) -> str:
    """What decides a run's result, as a string: two rows with the same need one run."""
    tables = config.to_tables()
    del tables["paper"], tables["run"]["name"]
    return json.dumps(tables, sort_keys=True)


def start_from(config: Config, folder: Path) -> Config:
    """`config` that starts from the finished run in `folder`. Raises UserError where that is not finished."""
    files = RunFolder(folder)
    if not files.finished:
        name = config.model.init.removeprefix(START)
        seed = f" --set run.seed={config.run.seed}" if config.run.seed else ""
        raise UserError(
            f"model.init = {config.model.init!r} needs a finished run in {folder}; "
            f"train it first: python -m training run {name}{seed}"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, init=str(files.model)))


def resolve_start(config: Config, root: Path) -> Config:
    """`config` with the weights of another recipe's run below `root`, where its model.init asks for them."""
    if not config.model.init.startswith(START):
        return config
    other = load(config.model.init.removeprefix(START), [f"run.seed={config.run.seed}"])
    return start_from(config, root / other.run.name)


class Reproduction:
    """Trains what a table needs below `root`; `overrides` are ``table.key=value`` for every row."""

    def __init__(self, root: Path, small: bool, overrides: Sequence[str] = (), show: bool = False) -> None:
        self.root, self.small, self.overrides, self.show = root, small, list(overrides), show

    def run(self, table: str, seeds: int, report: Callable[[str], None] = lambda text: None) -> list[Outcome]:
        """The outcome of each row, in the table's order. `report` gets a line for each run.

        Every recipe is checked before the first one trains. A run that fails leaves its error with the row, and the
        next one starts. Raises ConfigError.
        """
        outcomes = [Outcome(row) for row in rows(table, self.small, self.overrides)]
        for outcome in outcomes:
            build_algorithm(outcome.row.config.algorithm.name, outcome.row.config.algorithm.options)
        for seed in range(seeds):
            for outcome in outcomes:
                name = f"{outcome.row.name}, seed {seed}"
                try:
                    folder, reused = self.train(outcome.row.name, seed)
                    figures = read_run(folder).figures
                except UserError as error:
                    outcome.errors.append(f"{name}: {error}")
                    report(f"{name}: {error}")
                    continue
                outcome.figures.append(figures)
                report(f"{name}: accuracy {figures['accuracy']:.2f} %" + (f", from {folder}" if reused else ""))
        return outcomes

    def train(self, name: str, seed: int) -> tuple[Path, bool]:
        """(folder, whether it was finished before) of the recipe's run with a seed, trained as far as it needs."""
        config = self._config(name, seed)
        folder = self.root / config.run.name
        if not folder.exists():
            first = self._first.get(settings(self._config(name, 0)), name)
            config = self._config(first, seed)
            folder = self.root / config.run.name
        config = self._with_policy(self._with_start(config), folder)
        files = RunFolder(folder)
        if files.finished:
            files.require_same(config)
            return folder, True
        engine.run(config, folder, resume=folder.exists(), show=self.show)
        return folder, False

    def _config(self, name: str, seed: int) -> Config:
        return load(name, [*self.overrides, f"run.seed={seed}"])

    def _with_start(self, config: Config) -> Config:
        """`config`, with the network that it starts from trained and its file named where it is another recipe's."""
        if not config.model.init.startswith(START):
            return config
        folder, _ = self.train(config.model.init.removeprefix(START), config.run.seed)
        return start_from(config, folder)

    def _with_policy(self, config: Config, folder: Path) -> Config:
        """`config`, with the bits of its layers searched, and the indicators that needs trained, where it has none."""
        path = policy_path(folder)
        if "search" in config.algorithm.options and not path.exists():
            if os.environ.get("WORLD_SIZE", "1") != "1":  # each process would write it
                raise UserError(
                    f"there is no policy in {path}; reproduce the table with one process first, or `search`"
                )
            indicators = search_of(config).indicators
            trained = self.train(indicators, config.run.seed)[0] if indicators else None
            search(config, trained).write(path)
        return with_policy(config, folder)

    @cached_property
    def _first(self) -> dict[str, str]:
        """Settings -> the first recipe (or twin) that has them."""
        first: dict[str, str] = {}
        for recipe in all_recipes():
            if not self.small or recipe.has_twin:
                name = recipe.name + (TWIN if self.small else "")
                first.setdefault(settings(self._config(name, 0)), name)
        return first


def side_by_side(outcomes: Sequence[Outcome]) -> str:
    """A Markdown table: for each column of the paper's, what it has there and mean ± deviation of our seeds.

    Columns that our runs have and the paper has not come last; the accuracy where the paper has nothing.
    """
    published = list({column: None for outcome in outcomes for column in outcome.row.paper.published})
    given = {column: None for outcome in outcomes for figures in outcome.figures for column in figures}
    own = [column for column in given if column not in published and column not in DEFAULTS]
    own = own if published else ["accuracy", *own]
    both = [f"{column}, {whose}" for column in published for whose in ("published", "ours")]
    lines = [["row", *both, *own, "seeds"]]
    for outcome in outcomes:
        cells = [outcome.row.paper.row or outcome.row.name]
        for column in published:
            value = outcome.row.paper.published.get(column)
            cells += ["-" if value is None else str(value), _mean(outcome.figures, column)]
        lines.append([*cells, *(_mean(outcome.figures, column) for column in own), str(len(outcome.figures))])
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in padded)


def _mean(figures: Sequence[dict[str, float]], column: str) -> str:
    values = [figure[column] for figure in figures if column in figure]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"

"""The papers' tables: which recipe is which row."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from training.config import (
    TWIN,
    Config,
    ConfigError,
    PaperConfig,
    load,
    nearest,
    read_tables,
    recipe_files,
    recipe_name,
)

# folder below training/recipes -> the paper whose experiments are there
PAPERS = {
    "dqa": "DQA (Hacene et al., 2021)",
    "coquant": "CoQuant (Sun et al., 2021)",
    "limpq": "LIMPQ (Tang et al., 2022)",
    "lqnets": "LQ-Nets (Zhang et al., 2018)",
}


@dataclass(frozen=True)
class Recipe:
    """A recipe below training/recipes, read but not checked: what a list of all of them needs."""

    path: Path

    @property
    def name(self) -> str:
        """Its path below training/recipes, without the suffix."""
        return recipe_name(self.path)

    @property
    def folder(self) -> str:
        """The first part of the name: the paper, or the data set."""
        return self.name.partition("/")[0]

    @cached_property
    def tables(self) -> dict[str, Any]:
        """The recipe's own tables, on top of those of the file that it extends."""
        return read_tables(self.path)

    @property
    def table(self) -> str:
        """The paper's table that it has a row of; empty if none."""
        return str(self.tables.get("paper", {}).get("table", ""))

    @property
    def has_twin(self) -> bool:
        """Whether it has a small twin."""
        return "small" in self.tables

    @property
    def comment(self) -> str:
        """The first line of comment."""
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return next((line.lstrip("# ").rstrip() for line in lines if line.startswith("#")), "")


@dataclass(frozen=True)
class Row:
    """A row of a table: the checked recipe (or its small twin) that gives it."""

    name: str
    config: Config

    @property
    def paper(self) -> PaperConfig:
        """Where the row is in the paper, and what the paper has there."""
        return self.config.paper


def all_recipes() -> list[Recipe]:
    """Every recipe below training/recipes, in the order of their names."""
    return [Recipe(path) for path in recipe_files()]


def by_table(recipes: list[Recipe]) -> dict[str, list[Recipe]]:
    """Table -> its recipes, of those that belong to one."""
    tables: dict[str, list[Recipe]] = {}
    for recipe in recipes:
        if recipe.table:
            tables.setdefault(recipe.table, []).append(recipe)
    return tables


def find_table(name: str) -> str:
    """The table meant by `name`; case, blanks and signs do not matter: "dqa/table1" is "DQA table 1"."""

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    known = {plain(table): table for table in by_table(all_recipes())}
    if plain(name) not in known:
        raise ConfigError(f"there is no table {name!r}; {nearest(name, known.values())}")
    return known[plain(name)]


def rows(table: str, small: bool = False, overrides: list[str] | None = None) -> list[Row]:
    """The rows of a table, in its order, each recipe checked. Raises ConfigError.

    `small` takes the recipes' small twins; a recipe that has none is an error.
    """
    recipes = by_table(all_recipes())[find_table(table)]
    names = [recipe.name + (TWIN if small else "") for recipe in recipes]
    found = [Row(name, load(name, overrides or [])) for name in names]
    return sorted(found, key=lambda row: (row.paper.line, row.name))

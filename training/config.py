"""Recipes: small TOML files with the tables model, data, optimizer, schedule, algorithm, run, paper and small.

A recipe is read into dataclasses and checked whole before anything starts. Every mistake is a `ConfigError`:
one sentence that names the key, what it may be and what it was.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import sys
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).parent / "recipes"
TWIN = "-small"  # the end of the name of a recipe's small twin


class UserError(Exception):
    """A mistake that the user can put right; the command line prints one sentence and no traceback."""


class ConfigError(UserError, ValueError):
    """A recipe, or an option given with ``--set``, that cannot be used."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of an error message: the names near `name`, or all valid ones where none is near."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=3)
    if close:
        return "did you mean " + " or ".join(repr(word) for word in close) + "?"
    return "valid: " + (", ".join(valid) if valid else "none")


def reject_unknown(given: Iterable[str], valid: Iterable[str], where: str) -> None:
    """Raise ConfigError for the first name in `given` that is not in `valid`; `where` is the table's name."""
    valid = list(valid)
    for name in given:
        if name not in valid:
            raise ConfigError(f"unknown key {where}.{name}; {nearest(name, valid)}")


def choose(value: str, valid: Iterable[str], where: str) -> str:
    """`value` if it is one of `valid`, else ConfigError."""
    valid = list(valid)
    if value not in valid:
        raise ConfigError(f"{where} = {value!r} is not known; {nearest(str(value), valid)}")
    return value


def require(condition: bool, where: str, rule: str, value: object) -> None:
    """Raise ConfigError "`where` must be `rule`, got `value`" unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{where} must be {rule}, got {value!r}")


@dataclass(frozen=True)
class ModelConfig:
    """``[model]``: the network's name, its options, and float weights to start from (a safetensors file)."""

    name: str
    init: str = ""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataConfig:
    """``[data]``. `batch_size` is the batch of one optimizer step, over all processes together."""

    name: str
    root: str = ""  # empty: $QK_DATA_DIR
    batch_size: int = 128
    eval_batch_size: int = 500
    augment: bool = True
    crop: str = "area"  # of folders' augmentation: area (of any size and shape) or side (a square, anywhere)
    color: float = 0.0  # of folders' augmentation: how far brightness, contrast and saturation may go from 1
    subset: int = 0  # 0: all; else that many training images, the same number of each class
    image_size: int = 224  # folders of images and of videos
    workers: int = 4  # threads that decode them; has no influence on results
    segments: int = 16  # videos: frames of a clip
    train_list: str = "train.txt"  # folders of videos: the annotation lists
    test_list: str = "val.txt"

    def __post_init__(self) -> None:
        for key in ("batch_size", "eval_batch_size", "image_size", "workers", "segments"):
            require(getattr(self, key) >= 1, f"data.{key}", "at least 1", getattr(self, key))
        choose(self.crop, ("area", "side"), "data.crop")
        require(0 <= self.color <= 1, "data.color", "in [0, 1]", self.color)
        require(self.subset >= 0, "data.subset", "0 (all) or a number of images", self.subset)


@dataclass(frozen=True)
class OptimizerConfig:
    """``[optimizer]``: name is sgd, adam or adamw."""

    name: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        choose(self.name, ("sgd", "adam", "adamw"), "optimizer.name")
        require(self.lr > 0, "optimizer.lr", "positive", self.lr)
        require(0 <= self.momentum < 1, "optimizer.momentum", "in [0, 1)", self.momentum)
        require(self.weight_decay >= 0, "optimizer.weight_decay", "0 or positive", self.weight_decay)
        if self.nesterov and self.momentum == 0:
            raise ConfigError("optimizer.nesterov needs optimizer.momentum > 0")


@dataclass(frozen=True)
class ScheduleConfig:
    """``[schedule]``: name is constant, multistep, cosine or linear, each after `warmup_epochs` of linear warm-up."""

    name: str = "constant"
    milestones: list[int] = field(default_factory=list)  # multistep: epochs that multiply lr by gamma
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    final_factor: float = 0.0  # cosine, linear: lr at the end, as a fraction of optimizer.lr

    def __post_init__(self) -> None:
        choose(self.name, ("constant", "multistep", "cosine", "linear"), "schedule.name")
        require(self.warmup_epochs >= 0, "schedule.warmup_epochs", "0 or positive", self.warmup_epochs)
        require(0 < self.gamma <= 1, "schedule.gamma", "in (0, 1]", self.gamma)
        require(0 <= self.final_factor <= 1, "schedule.final_factor", "in [0, 1]", self.final_factor)
        rising = sorted(set(self.milestones)) == self.milestones
        require(rising, "schedule.milestones", "rising epoch numbers", self.milestones)
        if self.name == "multistep" and not self.milestones:
            raise ConfigError("schedule.milestones must name at least one epoch for schedule.name = 'multistep'")


@dataclass(frozen=True)
class AlgorithmConfig:
    """``[algorithm]``: its name and its own options (see `training.algorithms`)."""

    name: str = "float"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunConfig:
    """``[run]``: how long, with which seed and precision, and how often to write checkpoints."""

    epochs: int
    name: str = ""  # the run's folder below runs/; empty: the recipe's name, with the seed where it is not 0
    seed: int = 0
    label_smoothing: float = 0.0
    mixed_precision: str = "no"
    device: str = "auto"  # auto: the accelerator where there is one
    checkpoint_steps: int = 500  # a checkpoint every that many steps too; 0: only after epochs
    checkpoint_epochs: int = 1  # a checkpoint after every that many epochs, and at the end
    eval_epochs: int = 1  # evaluate after every that many epochs, and at the end
    deterministic: bool = True

    def __post_init__(self) -> None:
        for key in ("epochs", "checkpoint_epochs", "eval_epochs"):
            require(getattr(self, key) >= 1, f"run.{key}", "at least 1", getattr(self, key))
        require(0 <= self.seed < 2**31, "run.seed", "in [0, 2^31)", self.seed)
        require(0 <= self.label_smoothing < 1, "run.label_smoothing", "in [0, 1)", self.label_smoothing)
        require(self.checkpoint_steps >= 0, "run.checkpoint_steps", "0 or positive", self.checkpoint_steps)
        choose(self.device, ("auto", "cpu"), "run.device")
        choose(self.mixed_precision, ("no", "bf16", "fp16"), "run.mixed_precision")


@dataclass(frozen=True)
class PaperConfig:
    """``[paper]``: the table and row that the recipe reproduces, and what the paper has there.

    `published` has a figure for each column of the table that the paper fills in this row. The column "accuracy" is
    top-1 and "top5" top-5 accuracy, in percent; every other column has the name that `Algorithm.results` gives it.
    """

    table: str = ""  # such as "DQA table 1": `python -m training reproduce` runs all recipes that name it
    line: int = 0  # place in the table; recipes of the same line are in the order of their names
    row: str = ""  # what the table calls the row
    published: dict[str, float] = field(default_factory=dict)
    note: str = ""  # what the paper leaves open and how the recipe reads it


@dataclass(frozen=True)
class Config:
    """A whole recipe."""

    model: ModelConfig
    data: DataConfig
    run: RunConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    paper: PaperConfig = field(default_factory=PaperConfig)

    def to_tables(self) -> dict[str, dict[str, Any]]:
        """Back to plain tables, as in the recipe, with every default filled in."""
        tables = copy.deepcopy(dataclasses.asdict(self))
        for table in tables.values():
            table.update(table.pop("options", {}))
        return tables


def _typed(value: Any, kind: Any, where: str) -> Any:
    """`value` if it has a dataclass field's type (an integer may stand for a float), else ConfigError."""
    if typing.get_origin(kind) is list:
        require(isinstance(value, list), where, "a list", value)
        (item,) = typing.get_args(kind)
        return [_typed(entry, item, where) for entry in value]
    if typing.get_origin(kind) is dict:
        require(isinstance(value, Mapping), where, "a table", value)
        (_, item) = typing.get_args(kind)
        return {key: _typed(entry, item, f"{where}.{key}") for key, entry in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    require(type(value) is kind, where, words[kind], value)
    return value


def _table(kind: type, where: str, table: Mapping[str, Any]) -> Any:
    """One recipe table as its dataclass. Other keys are its options, where it has a place for them."""
    types = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.name != "options"}
    known = {key: value for key, value in table.items() if key in fields}
    values = {key: _typed(value, types[key], f"{where}.{key}") for key, value in known.items()}
    others = {key: value for key, value in table.items() if key not in fields}
    if "options" in types:
        values["options"] = others
    else:
        reject_unknown(others, fields, where)
    for key, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and key not in values:
            raise ConfigError(f"the recipe must give {where}.{key}")
    return kind(**values)


def from_tables(tables: Mapping[str, Any]) -> Config:
    """A `Config` of plain nested dictionaries, such as a TOML file holds. Raises ConfigError."""
    types = typing.get_type_hints(Config)
    for name, table in tables.items():
        if name not in types:
            raise ConfigError(f"unknown table [{name}]; {nearest(name, types)}")
        require(isinstance(table, Mapping), name, "a table", table)
    return Config(**{name: _table(kind, name, tables.get(name, {})) for name, kind in types.items()})


def parse_override(text: str) -> tuple[list[str], Any]:
    """``a.b=value`` as a path and a value in TOML notation; what is not TOML is taken as a string."""
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise ConfigError(f"--set takes table.key=value, got {text!r}")
    try:
        return keys, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return keys, value.strip()


def override(tables: dict[str, Any], text: str) -> None:
    """Apply one ``table.key=value`` to nested tables, in place."""
    keys, value = parse_override(text)
    for key in keys[:-1]:
        tables = tables.setdefault(key, {})
        require(isinstance(tables, dict), ".".join(keys[:-1]), "a table", tables)
    tables[keys[-1]] = value


def find_recipe(name: str) -> tuple[Path, bool]:
    """The file of a recipe, and whether its small twin is meant: ``NAME-small``, where no recipe has that name itself.

    `name` is a path, or the name or the end of the path of a recipe below training/recipes.
    """
    if Path(name).is_file():
        return Path(name), False
    known = {recipe_name(path): path for path in recipe_files()}
    wanted = name.removesuffix(".toml")
    for end, small in (("", False), (TWIN, True)):
        stem = wanted.removesuffix(end) if wanted.endswith(end) else None
        found = [key for key in known if key == stem] or [key for key in known if key.endswith(f"/{stem}")]
        if len(found) == 1:
            return known[found[0]], small
        if found:
            raise ConfigError(f"recipe {name!r} may be any of {', '.join(sorted(found))}: give more of its path")
    close = difflib.get_close_matches(wanted, known, n=3, cutoff=0.4)
    hint = f"; near: {', '.join(close)}" if close else ""
    raise ConfigError(f"no recipe {name!r}: neither a file nor a name in `python -m training list`{hint}")


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` on top, table by table; a list replaces a list."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def read_tables(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The tables of a recipe on top of those of the file it ``extends`` (a path relative to its own)."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from error
    if "extends" not in tables:
        return tables
    base = tables.pop("extends")
    require(isinstance(base, str), f"extends in {path}", "the path of a recipe", base)
    target = (path.parent / base).resolve()
    if not target.is_file():
        raise ConfigError(f"{path} extends {base!r}, but there is no file {target}")
    if target in seen:
        raise ConfigError(f"{path} extends {base!r}, which extends it in turn")
    return merge(read_tables(target, (*seen, target)), tables)


def shrink(tables: dict[str, Any], path: Path) -> dict[str, Any]:
    """The tables of a recipe's small twin: those of ``[small]`` on top of the recipe's own.

    A table of ``[small]`` that gives a ``name`` replaces the recipe's, options and all; others change single keys.
    """
    changes = tables.pop("small", None)
    if changes is None:
        raise ConfigError(f"{recipe_name(path)} has no small twin: neither it nor what it extends has a table [small]")
    replaced = [name for name, table in changes.items() if isinstance(table, Mapping) and "name" in table]
    return merge({name: table for name, table in tables.items() if name not in replaced}, changes)


def load(name: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a recipe (path or name), apply ``table.key=value`` overrides, check it. Raises ConfigError.

    A recipe with a table ``[small]`` has a twin for two cores and minutes, by its name and ``-small``.
    """
    path, small = find_recipe(str(name))
    tables = read_tables(path)
    tables = shrink(tables, path) if small else {key: tables[key] for key in tables if key != "small"}
    for text in overrides:
        override(tables, text)
    run = tables.setdefault("run", {})
    if isinstance(run, dict) and not run.get("name"):
        seed = run.get("seed", 0)
        run["name"] = recipe_name(path) + (TWIN if small else "") + (f"-seed{seed}" if seed else "")
    return from_tables(tables)


def recipe_files() -> list[Path]:
    """Every recipe in training/recipes; files that begin with an underscore are only there to be extended."""
    return sorted(path for path in RECIPES.rglob("*.toml") if not path.name.startswith("_"))


def recipe_name(path: Path) -> str:
    """A recipe's path below training/recipes without its suffix; of another file, its stem."""
    path = path.resolve()
    if path.is_relative_to(RECIPES.resolve()):
        return path.relative_to(RECIPES.resolve()).with_suffix("").as_posix()
    return path.stem

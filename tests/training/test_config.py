"""Recipes: overrides, defaults, and errors that name the key."""

from itertools import pairwise

import pytest

from training import config
from training.algorithms.base import build_algorithm
from training.config import ConfigError, from_tables
from training.schedule import lr_factor


def test_tables_and_back(tables):
    recipe = from_tables(tables)
    assert recipe.model.options == {"width": 4}
    assert recipe.optimizer.momentum == 0.9
    assert from_tables(recipe.to_tables()) == recipe


@pytest.mark.parametrize(
    ("table", "values", "message"),
    [
        ("optimizer", {"lrr": 1.0}, r"unknown key optimizer\.lrr; did you mean 'lr'"),
        ("optimizer", {"colour": 1.0}, r"unknown key optimizer\.colour; valid: lr, momentum"),
        ("optimizer", {"name": "sdg"}, r"optimizer\.name = 'sdg' is not known; did you mean 'sgd'"),
        ("optimizer", {"lr": -1.0}, r"optimizer\.lr must be positive, got -1\.0"),
        ("optimizer", {"lr": "fast"}, r"optimizer\.lr must be a number, got 'fast'"),
        ("optimizer", {"lr": float("nan")}, r"optimizer\.lr must be positive, got nan"),
        ("run", {"epochs": 2.5}, r"run\.epochs must be an integer, got 2\.5"),
        ("run", {"epochs": 0}, r"run\.epochs must be at least 1, got 0"),
        ("run", {"epochs": True}, r"run\.epochs must be an integer, got True"),
        ("run", {"mixed_precision": "fp8"}, r"run\.mixed_precision = 'fp8' is not known"),
        ("data", {"batch_size": 0}, r"data\.batch_size must be at least 1"),
        ("data", {"crop": "center"}, r"data\.crop = 'center' is not known; valid: area, side"),
        ("data", {"color": -0.5}, r"data\.color must be in \[0, 1\], got -0\.5"),
        ("schedule", {"name": "multistep"}, r"schedule\.milestones must name at least one epoch"),
        ("schedule", {"milestones": [3, 2]}, r"schedule\.milestones must be rising"),
        ("schedule", {"milestones": ["a"]}, r"schedule\.milestones must be an integer, got 'a'"),
        ("optimiser", {}, r"unknown table \[optimiser\]; did you mean 'optimizer'"),
    ],
)
def test_mistakes_are_named(tables, table, values, message):
    tables.setdefault(table, {}).update(values)
    with pytest.raises(ConfigError, match=message):
        from_tables(tables)


def test_missing_key_is_named(tables):
    del tables["run"]["epochs"]
    with pytest.raises(ConfigError, match=r"the recipe must give run\.epochs"):
        from_tables(tables)


@pytest.mark.parametrize(
    ("text", "keys", "value"),
    [
        ("run.epochs=3", ["run", "epochs"], 3),
        ("optimizer.lr=1e-3", ["optimizer", "lr"], 1e-3),
        ("data.augment=false", ["data", "augment"], False),
        ("model.name=resnet20", ["model", "name"], "resnet20"),
        ('model.name="a b"', ["model", "name"], "a b"),
        ("schedule.milestones=[1, 2]", ["schedule", "milestones"], [1, 2]),
        ("algorithm.weight.bits=4", ["algorithm", "weight", "bits"], 4),
        ("data.root=/a=b", ["data", "root"], "/a=b"),
    ],
)
def test_override_values(text, keys, value):
    assert config.parse_override(text) == (keys, value)


@pytest.mark.parametrize("text", ["epochs=3", "run.epochs", ".epochs=3", "=3", ""])
def test_override_needs_table_key_value(text):
    with pytest.raises(ConfigError, match=r"--set takes table\.key=value"):
        config.parse_override(text)


def test_broken_toml_names_the_file(tmp_path):
    path = tmp_path / "broken.toml"
    path.write_text("[model\n")
    with pytest.raises(ConfigError, match=r"broken\.toml is not a TOML file"):
        config.load(path)


def test_unknown_recipe():
    with pytest.raises(ConfigError, match="no recipe 'no-such-recipe'"):
        config.load("no-such-recipe")


def test_name_of_a_run_has_the_seed(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[model]\nname = "tiny_convnet"\n[data]\nname = "digits"\n[run]\nepochs = 1\n')
    assert config.load(path).run.name == "mine"
    assert config.load(path, ["run.seed=3"]).run.name == "mine-seed3"
    assert config.load(path, ["run.seed=3", "run.name=other"]).run.name == "other"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vanila", {}, r"algorithm\.name = 'vanila' is not known; did you mean 'vanilla'"),
        ("float", {"bits": 2}, r"unknown key algorithm\.bits; valid: none"),
        ("vanilla", {}, r"needs algorithm\.weight, algorithm\.activation or both"),
        ("vanilla", {"wieght": {}}, r"unknown key algorithm\.wieght; did you mean 'weight'"),
        ("vanilla", {"weight": 2}, r"algorithm\.weight must be a table such as"),
        ("vanilla", {"weight": {"bits": 2}}, r"the recipe must give algorithm\.weight\.kind, one of MinMax"),
        ("vanilla", {"weight": {"kind": "MinMaks", "bits": 2}}, r"did you mean 'MinMax'"),
        ("vanilla", {"weight": {"kind": "MinMax"}}, r"the recipe must give algorithm\.weight\.bits"),
        ("vanilla", {"weight": {"kind": "MinMax", "bits": 9}}, r"weight\.bits must be an integer from 1 to 8"),
        ("vanilla", {"weight": {"kind": "MinMax", "bits": 2, "ax": 0}}, r"unknown key algorithm\.weight\.ax"),
        ("vanilla", {"weight": {"kind": "MinMax", "bits": 2}, "skip": "last"}, r"algorithm\.skip = 'last'"),
        ("vanilla", {"weight": {"kind": "BWN"}, "quantizer_lr": -1}, r"algorithm\.quantizer_lr must be 0 or"),
    ],
)
def test_algorithm_mistakes_are_named(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build_algorithm(name, options)


def test_schedules(tables):
    def factors(**schedule):
        tables["schedule"] = schedule
        recipe = from_tables(tables).schedule
        return [lr_factor(recipe, step, steps_per_epoch=2, epochs=4) for step in range(8)]

    assert factors(name="constant") == [1.0] * 8
    steps = factors(name="multistep", milestones=[1, 3], gamma=0.5)
    assert steps == [1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25]
    cosine = factors(name="cosine", warmup_epochs=1.0)
    assert cosine[:3] == [0.5, 1.0, 1.0]
    assert cosine[5] == pytest.approx(0.5)
    assert all(a >= b for a, b in pairwise(cosine[1:]))
    assert factors(name="cosine", final_factor=0.5)[4] == pytest.approx(0.75)
    assert factors(name="linear") == pytest.approx([1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert factors(name="linear", warmup_epochs=1.0, final_factor=0.1)[:3] == pytest.approx([0.5, 1.0, 1.0])

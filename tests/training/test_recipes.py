"""Every recipe is valid, and its network and algorithm can be built; files that extend others."""

import pytest
import torch

from training import config
from training.algorithms.base import build_algorithm
from training.algorithms.limpq import layers_of
from training.config import ConfigError
from training.models import build_model
from training.options import call_with_options
from training.search.driver import Search
from training.tables import all_recipes, by_table

ALL = all_recipes()
FULL = [recipe.name for recipe in ALL]
TWINS = [recipe.name + config.TWIN for recipe in ALL if recipe.has_twin]
RECIPES = FULL + TWINS
CLASSES = {
    "digits": 10,
    "mnist": 10,
    "cifar10": 10,
    "cifar100": 100,
    "folder": 1000,
    "video": 200,
    "synthetic_digit_clips": 10,
    "synthetic_cifar_clips": 10,
}
CHANNELS = {"digits": 1, "mnist": 1, "synthetic_digit_clips": 1}


def test_every_row_of_the_dqa_tables_has_a_recipe():
    found = {table: len(rows) for table, rows in by_table(ALL).items() if table.startswith("DQA")}
    assert found == {"DQA table 1": 28, "DQA table 2": 13, "DQA table 3": 8, "DQA table 4": 4}


def test_every_row_of_the_limpq_tables_has_a_recipe():
    found = {table: len(rows) for table, rows in by_table(ALL).items() if table.startswith("LIMPQ table")}
    assert found == {"LIMPQ table 1": 3, "LIMPQ table 2": 3}


def test_every_row_of_the_coquant_tables_has_a_recipe():
    found = {table: len(rows) for table, rows in by_table(ALL).items() if table.startswith("CoQuant")}
    assert found == {
        "CoQuant ablations": 7,
        "CoQuant lambda": 3,
        "CoQuant methods": 16,
        "CoQuant table 1": 6,
        "CoQuant table 3": 6,
        "CoQuant table 4": 3,
        "CoQuant table 5": 8,
    }


@pytest.mark.parametrize(
    ("name", "p1", "distance", "alpha", "alpha_lr", "alpha_decay"),
    [
        ("methods/cifar10-resnet18", 0.9, 0.001, 8, 0.1, 1e-4),
        ("methods/cifar10-mobilenetv2", 0.5, 0.001, 8, 0.01, 4e-5),
        ("methods/imagenet-resnet18", 0.7, 0.001, 8, 0.1, 6e-5),
        ("table3/activitynet-resnet18", 0.5, 0.001, 4, 0.01, 5e-4),
        ("methods/activitynet-resnet50", 0.7, 0.0001, 4, 0.1, 5e-4),
        ("table3/minikinetics-resnet18", 0.7, 0.001, 2, 0.1, 1e-4),
    ],
)
def test_hyper_parameters_of_coquant_are_those_of_its_table_2(name, p1, distance, alpha, alpha_lr, alpha_decay):
    given = config.load(f"coquant/{name}-coquant").algorithm.options
    keys = ("p1", "distance", "alpha", "quantizer_lr", "quantizer_weight_decay")
    assert [given[key] for key in keys] == [p1, distance, alpha, alpha_lr, alpha_decay]


def test_every_row_of_a_table_has_a_name_and_a_twin():
    for table, members in by_table(ALL).items():
        assert all(recipe.has_twin for recipe in members), table
        names = [config.load(recipe.name).paper.row for recipe in members]
        assert all(names) and len(set(names)) == len(names), table


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_valid(name):
    recipe = config.load(name)
    assert recipe.run.name == name
    assert recipe.data.name in CLASSES
    if name.startswith("dqa/") and name in FULL:
        assert 0 < recipe.paper.published["accuracy"] < 100
        assert recipe.run.epochs == (90 if "imagenet" in name else 300)
        assert recipe.data.batch_size == (256 if "imagenet" in name else 128)


@pytest.mark.parametrize("name", RECIPES)
def test_network_and_algorithm_of_the_recipe_can_be_built(name):
    recipe = config.load(name)
    data = recipe.data.name
    with torch.device("meta"):  # shapes without memory: it is the seventy-fold initialisation that takes time
        model = build_model(recipe.model.name, CLASSES[data], in_channels=CHANNELS.get(data, 3), **recipe.model.options)
    options = dict(recipe.algorithm.options)
    if recipe.algorithm.name == "mixed_precision":  # whose policy is the result of another command
        call_with_options(Search, options["search"], "algorithm.search")
        options["policy"] = {"layers": dict.fromkeys(layers_of(model)[1:-1], (4, 4))}
    algorithm = build_algorithm(recipe.algorithm.name, options)
    model = algorithm.prepare(model)
    groups = algorithm.parameter_groups(model, {"lr": 0.1, "weight_decay": 0.0})
    given = [id(parameter) for group in groups for parameter in group["params"]]
    given += [id(parameter) for parameter in getattr(algorithm, "own_parameters", list)()]
    assert sorted(given) == sorted(id(parameter) for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "penalty"),
    [
        ("dqa/table1/cifar10-resnet18-minmax-dqa", 5),
        ("dqa/table1/cifar10-resnet18-sawb-dqa", 1),
        ("dqa/table1/cifar100-resnet18-bwn-dqa", 30),
        ("dqa/table1/cifar100-resnet18-twn-dqa", 20),
        ("dqa/table2/cifar100-resnet18-pact-sawb-dqa", 5),
        ("dqa/table3/imagenet-resnet18-bwn-dqa", 10),
        ("dqa/table4/imagenet-resnet18-minmax-dqa", 0.5),
    ],
)
def test_lambda_is_the_one_of_the_paper(name, penalty):
    assert config.load(name).algorithm.options["penalty"] == penalty


def test_a_recipe_extends_another(tmp_path):
    (tmp_path / "base.toml").write_text('[model]\nname = "a"\n[data]\nname = "digits"\n[run]\nepochs = 3\nseed = 1\n')
    (tmp_path / "leaf.toml").write_text('extends = "base.toml"\n[run]\nepochs = 5\n')
    recipe = config.load(tmp_path / "leaf.toml", ["run.seed=2"])
    assert (recipe.model.name, recipe.run.epochs, recipe.run.seed) == ("a", 5, 2)
    assert recipe.run.name == "leaf-seed2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('extends = "missing.toml"', "there is no file"),
        ('extends = "leaf.toml"', "extends it in turn"),
        ("extends = 3", "must be the path of a recipe, got 3"),
    ],
)
def test_a_wrong_extends_is_one_clear_error(tmp_path, text, message):
    (tmp_path / "leaf.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        config.load(tmp_path / "leaf.toml")

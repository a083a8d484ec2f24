"""Indicators, search, fine-tuning: three commands, and what each refuses."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from training import engine
from training.cli import app
from training.config import ConfigError, UserError, load
from training.options import call_with_options
from training.search.driver import Search, indicators_folder, search

BASE = """# digits
[model]
name = "tiny_convnet"
width = 4
[data]
name = "digits"
batch_size = 256
[optimizer]
lr = 0.1
[run]
epochs = 1
"""
RECIPES = {
    "float": "",
    "indicators": '[algorithm]\nname = "limpq"\nbits = [4, 3, 2]\n',
    "limpq": '[algorithm]\nname = "mixed_precision"\ncalibration_batches = 2\n'
    '[algorithm.search]\nindicators = "indicators.toml"\nbitops = [3, 3]\nalpha = 2.0\n',
    "hawq": '[algorithm]\nname = "mixed_precision"\n'
    '[algorithm.search]\nmethod = "hawq"\nbits = [4, 3, 2]\nsize_mb = 0.00065\nprobes = 2\nbatches = 2\n',
    "uniform": '[algorithm]\nname = "mixed_precision"\n'
    '[algorithm.search]\nmethod = "uniform"\nbits = [4, 3, 2]\nbitops = [3, 4]\n',
}


def call(*args):
    result = CliRunner().invoke(app, list(args))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the recipes, and the runs of `float` and `indicators`."""
    folder = tmp_path_factory.mktemp("stages")
    for name, text in RECIPES.items():
        (folder / f"{name}.toml").write_text(BASE + text)
    for name in ("float", "indicators"):
        engine.run(load(folder / f"{name}.toml"), folder / "runs" / name)
    return folder


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def test_the_three_stages(folder):
    before = call("run", "limpq.toml")
    assert before.exit_code == 1
    assert "there is no policy in runs/limpq.policy.json; `python -m training search RECIPE`" in before.stderr
    found = call("search", "limpq.toml")
    assert found.exit_code == 0, found.stderr
    assert "integer program with 18 binaries" in found.stdout and "weights" in found.stdout
    table = json.loads((folder / "runs/limpq.policy.json").read_text())
    assert list(table["layers"]) == ["3", "6"]
    about = table["about"]
    uniform = (4 * 8 * 9 * 16 + 8 * 8 * 9 * 16) * 9 / 1e9  # the budget: multiply-adds of layers 3 and 6 at 3/3 bits
    assert 0 < about["gbitops"] <= uniform * (1 + 1e-6)
    assert about["search"]["alpha"] == 2.0 and about["indicator_seconds"] > 0
    assert call("run", "limpq.toml").exit_code == 0
    config, result = engine.load_run("runs/limpq")
    assert config.algorithm.options["policy"] == table, "the run's folder says what it was trained with"
    layer = result.model.get_submodule("6")
    assert [layer.weight_quantizer.bits, layer.activation_quantizer.bits] == table["layers"]["6"]
    assert result.metrics[-1]["results"]["GBitOps"] == about["gbitops"]
    (folder / "runs/limpq.policy.json").rename(folder / "other.json")
    with pytest.raises(UserError, match="there is no policy"):
        engine.run(load("limpq.toml"), folder / "runs/again")
    engine.run(load("limpq.toml", ["algorithm.policy=other.json"]), folder / "runs/again")
    assert engine.load_run("runs/again")[0].algorithm.options["policy"] == table


def test_hawq_needs_a_float_network_and_gives_weights_and_activations_the_same_bits():
    config = load("hawq.toml")
    with pytest.raises(ConfigError, match=r"HAWQ needs a trained float network: set model\.init"):
        search(config, None)
    config = load("hawq.toml", ["model.init=runs/float/model.safetensors"])
    policy = search(config, None)
    assert policy.method == "hawq" and policy.about["size_mb"] <= 0.00065
    assert all(w == a for w, a in policy.layers.values())
    assert search(config, None).layers == policy.layers, "its random vectors are those of the seed"


def test_uniform_bits_are_the_highest_that_fit():
    policy = search(load("uniform.toml"), None)
    assert policy.layers == {"3": (3, 3), "6": (3, 3)}
    more = search(load("uniform.toml", ["algorithm.search.bitops=[4, 4]"]), None)
    assert more.layers == {"3": (4, 4), "6": (4, 4)}
    weights = load("uniform.toml", ["algorithm.search.weight_only=true", "algorithm.search.bitops=[2, 8]"])
    assert search(weights, None).layers == {"3": (2, 8), "6": (2, 8)}


def test_a_budget_that_cannot_be_met_is_one_sentence():
    for name in ("limpq", "hawq", "uniform"):
        init = ["--set", "model.init=runs/float/model.safetensors"]
        result = call("search", f"{name}.toml", *init, "--set", "algorithm.search.size_mb=0.0001")
        assert result.exit_code == 1
        assert "size_mb = 0.0001 is below the smallest feasible budget, 0.0003" in result.stderr


def test_weights_alone_from_indicators_of_both():
    config = load("limpq.toml", ["algorithm.search.weight_only=true", "algorithm.search.average_bits=2.5"])
    config.algorithm.options["search"].pop("bitops")
    policy = search(config, indicators_folder(config, Path("runs")))
    assert all(a == 8 for _, a in policy.layers.values())
    assert sum(w for w, _ in policy.layers.values()) == 5


def test_indicators_that_are_missing_or_of_another_network(folder):
    result = call("search", "limpq.toml", "--set", "run.seed=3")
    assert result.exit_code == 1
    assert "no indicators in runs/indicators-seed3; train them first: python -m training run" in result.stderr
    config = load("limpq.toml", ["model.name=resnet20"])
    config.model.options.pop("width")
    with pytest.raises(UserError, match=r"runs/indicators has no indicators of .*layer1\.0\.conv1"):
        search(config, indicators_folder(config, Path("runs")))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"method": "magic"}, "algorithm.search.method = 'magic' is not known"),
        ({"bits": []}, r"algorithm.search.bits must be a list of at least one bit-width, got \[\]"),
        ({"bits": [9]}, "algorithm.search.bits must be a list of integers from 2 to 8"),
        ({"method": "limpq", "indicators": ""}, "algorithm.search.indicators must name the recipe"),
        ({"bitops": None}, "the search needs a budget"),
        ({"alpha": -1.0}, "algorithm.search.alpha must be 0 or positive"),
        ({"probes": 0}, "algorithm.search.probes must be at least 1"),
        ({"layers": 1}, "unknown key algorithm.search.layers"),
    ],
)
def test_wrong_searches(table, message):
    with pytest.raises(ConfigError, match=message):
        call_with_options(Search, {"method": "uniform", "bitops": [3, 3]} | table, "algorithm.search")


def test_a_recipe_without_a_search():
    with pytest.raises(ConfigError, match=r"algorithm 'float' has no table \[algorithm.search\]"):
        search(load("float.toml"), None)

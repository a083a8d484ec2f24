"""`reproduce`: the rows of a table run, are reused and continued, and are printed beside the published figures."""

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from training import config, engine, reproduce, tables
from training.algorithms.vanilla import Vanilla
from training.cli import app
from training.config import ConfigError, UserError

BASE = """# Never trained: too large
[model]
name = "resnet18"
stem = "cifar"
[data]
name = "cifar10"
[optimizer]
lr = 0.05
[schedule]
name = "multistep"
milestones = [100, 200]
[run]
epochs = 300
[small.model]
name = "tiny_convnet"
width = 4
[small.data]
name = "digits"
batch_size = 700
[small.schedule]
name = "constant"
[small.run]
epochs = 1
"""

ROWS = {
    "one/float": ("float", 1, "float", "accuracy = 95.0"),
    "one/minmax": ("vanilla", 2, "W2", '"4 bits" = 91.5'),
    "two/float": ("float", 1, "float again", "accuracy = 95.0"),
}


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """Three recipes of two tables; the float rows of both are the same."""
    root = tmp_path / "recipes"
    (root / "one").mkdir(parents=True)
    (root / "two").mkdir()
    (root / "_base.toml").write_text(BASE)
    for name, (algorithm, line, row, published) in ROWS.items():
        weight = 'weight = {kind = "MinMax", bits = 2}\n' if algorithm == "vanilla" else ""
        (root / f"{name}.toml").write_text(
            f'# A row\nextends = "../_base.toml"\n[algorithm]\nname = "{algorithm}"\n{weight}'
            f'[paper]\ntable = "Paper table {name[:3]}"\nline = {line}\nrow = "{row}"\npublished = {{{published}}}\n'
        )
    monkeypatch.setattr(config, "RECIPES", root)
    return root


@pytest.fixture
def run(tmp_path):
    return reproduce.Reproduction(tmp_path / "runs", small=True)


def forbid_training(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("nothing is left to train")

    monkeypatch.setattr(engine, "run", fail)


def test_a_twin_replaces_named_tables_and_changes_single_keys_of_others(recipes):
    full, small = config.load("one/minmax"), config.load("one/minmax-small")
    assert (full.model.name, full.model.options, full.run.epochs) == ("resnet18", {"stem": "cifar"}, 300)
    assert (small.model.name, small.model.options) == ("tiny_convnet", {"width": 4})
    assert (small.run.epochs, small.run.name, small.schedule.milestones) == (1, "one/minmax-small", [])
    assert small.optimizer.lr == 0.05
    assert (small.algorithm, small.paper) == (full.algorithm, full.paper)
    assert config.load("one/minmax-small", ["run.seed=2"]).run.name == "one/minmax-small-seed2"


def test_a_recipe_without_a_twin(recipes):
    (recipes / "alone.toml").write_text('[model]\nname = "resnet20"\n[data]\nname = "digits"\n[run]\nepochs = 1\n')
    with pytest.raises(ConfigError, match=r"alone has no small twin: .*\[small\]"):
        config.load("alone-small")


def test_rows_are_in_the_order_of_the_table(recipes):
    assert [row.name for row in tables.rows("paper table one")] == ["one/float", "one/minmax"]
    assert [row.name for row in tables.rows("papertabletwo", small=True)] == ["two/float-small"]
    with pytest.raises(ConfigError, match="there is no table 'paper table six'; did you mean 'Paper table"):
        tables.rows("paper table six")


def test_finished_runs_are_used_as_they_are_and_equal_rows_share_one(recipes, run, tmp_path, monkeypatch):
    first = run.run("Paper table one", seeds=2)
    names = sorted(
        path.parent.relative_to(tmp_path / "runs").as_posix() for path in tmp_path.rglob("model.safetensors")
    )
    assert names == ["one/float-small", "one/float-small-seed1", "one/minmax-small", "one/minmax-small-seed1"]
    forbid_training(monkeypatch)
    lines = []
    assert [outcome.figures for outcome in run.run("Paper table one", 2, lines.append)] == [o.figures for o in first]
    assert len(lines) == 4 and all(", from " in line for line in lines)
    assert run.run("Paper table two", seeds=2)[0].figures == first[0].figures


def test_finished_runs_of_other_settings_are_an_error_of_their_row(recipes, run, tmp_path):
    run.run("Paper table two", seeds=1)
    changed = reproduce.Reproduction(tmp_path / "runs", small=True, overrides=["optimizer.lr=0.01"])
    (outcome,) = changed.run("Paper table two", seeds=1)
    assert outcome.figures == []
    assert "was started with optimizer.lr = 0.05, now it is 0.01" in outcome.errors[0]


def test_a_row_that_fails_does_not_stop_the_others(recipes, run, monkeypatch):
    train = engine.run

    def diverge(config, *args, **kwargs):
        if config.algorithm.name == "float":
            raise UserError("training diverged")
        return train(config, *args, **kwargs)

    monkeypatch.setattr(engine, "run", diverge)
    broken, good = run.run("Paper table one", seeds=1)
    assert (broken.figures, broken.errors) == ([], ["one/float-small, seed 0: training diverged"])
    assert len(good.figures) == 1 and not good.errors


def test_options_are_checked_before_the_first_row_trains(recipes, run, monkeypatch):
    forbid_training(monkeypatch)
    path = recipes / "one/minmax.toml"
    path.write_text(path.read_text().replace("bits = 2", "bits = 9"))
    with pytest.raises(ConfigError, match=r"bits must be an integer from 1 to 8, got 9"):
        run.run("Paper table one", seeds=1)


def test_a_recipe_starts_from_the_network_of_another(recipes, run, tmp_path):
    path = recipes / "one/minmax.toml"
    start = '[small.model]\ninit = "recipe:two/float-small"\n[small.optimizer]\nlr = 1e-9\n'
    path.write_text(path.read_text() + start)
    with pytest.raises(UserError, match=r"train it first: python -m training run two/float-small --set run"):
        reproduce.resolve_start(config.load("one/minmax-small", ["run.seed=1"]), tmp_path / "runs")
    folder, reused = run.train("one/minmax-small", seed=1)
    assert folder == tmp_path / "runs/one/minmax-small-seed1" and not reused
    before = load_file(tmp_path / "runs/one/float-small-seed1/model.safetensors")
    after = load_file(folder / "model.safetensors")
    assert before["0.weight"].sub(after["0.weight"]).abs().max() < 1e-6


class WithBits(Vanilla):
    """Gives figures of its own."""

    def results(self, model, evaluate):
        assert set(evaluate()) == {"eval_loss", "eval_accuracy", "eval_top5"}
        return {"4 bits": 12.5, "size MB": 0.25}


def test_figures_of_an_algorithm_stand_beside_the_published_ones(recipes, tmp_path, monkeypatch):
    monkeypatch.setitem(engine.build_algorithm.__globals__["_REGISTRY"], "vanilla", WithBits)
    args = ["reproduce", "paper/tableone", "--small", "--out", str(tmp_path / "runs")]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    title, _, header, _, first, second = result.stdout.splitlines()
    assert title.startswith("Paper table one; ours: the small twins")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, first, second)]
    both = [f"{column}, {whose}" for column in ("accuracy", "4 bits") for whose in ("published", "ours")]
    assert cells[0] == ["row", *both, "size MB", "seeds"]
    assert (cells[1][0], cells[1][1], cells[1][3:]) == ("float", "95.0", ["-", "-", "-", "1"])
    assert (cells[2][0], cells[2][3:]) == ("W2", ["91.5", "12.50", "0.25", "1"])


def test_mean_and_deviation_of_seeds():
    row = tables.Row("a", config.from_tables({**MINIMAL, "paper": {"row": "one", "published": {"accuracy": 94.8}}}))
    outcome = reproduce.Outcome(row, [{"accuracy": 90.0, "top5": 99.0}, {"accuracy": 92.0, "top5": 99.0}])
    assert reproduce.side_by_side([outcome]).splitlines() == [
        "| row | accuracy, published | accuracy, ours | seeds |",
        "| --- | ------------------: | -------------: | ----: |",
        "| one |                94.8 |   91.00 ± 1.41 |     2 |",
    ]


def test_accuracy_stands_first_where_the_paper_has_nothing():
    row = tables.Row("a", config.from_tables({**MINIMAL, "paper": {"row": "one"}}))
    outcome = reproduce.Outcome(row, [{"accuracy": 90.0, "top5": 99.0, "size MB": 0.5}])
    assert reproduce.side_by_side([outcome]).splitlines()[0] == "| row | accuracy | size MB | seeds |"


MINIMAL = {"model": {"name": "resnet20"}, "data": {"name": "digits"}, "run": {"epochs": 1}}


def test_mistakes_at_the_command_line_are_one_sentence(recipes, tmp_path):
    for args, message in (
        (["table nine"], "there is no table 'table nine'"),
        (["paper table one", "--set", "run.epoch=1"], "unknown key run.epoch"),
        (["paper table one", "--small", "--set", "algorithm.bits=1"], "unknown key algorithm.bits"),
    ):
        result = CliRunner().invoke(app, ["reproduce", *args, "--out", str(tmp_path / "runs")])
        assert result.exit_code == 1 and message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


def test_list_groups_by_paper():
    result = CliRunner().invoke(app, ["list"])
    assert result.exit_code == 0
    headings = [line for line in result.stdout.splitlines() if line and not line.startswith((" ", "*"))]
    papers = [title for title in tables.PAPERS.values() if title in headings]
    assert sorted(headings[: len(papers)]) == sorted(papers) and "digits" in headings[len(papers) :]
    assert "  * dqa/table4/imagenet-resnet18-float " in result.stdout

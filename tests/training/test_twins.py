"""Every small twin of the papers' recipes trains and beats chance by far (`make test-training`)."""

import pytest

from training.config import TWIN
from training.reproduce import Reproduction, side_by_side
from training.run_reader import read_run
from training.tables import all_recipes, by_table

CLASSES = 10  # of the data sets that the twins train on
MARGIN = 3  # times the accuracy of chance
COMPARISONS = {"DQA table 1", "CoQuant methods", "LIMPQ methods", "LQ-Nets CIFAR-10"}  # of methods, over several seeds
SEEDS = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """One folder for all tables: rows with the same settings share a run."""
    return tmp_path_factory.mktemp("runs")


RECIPES = all_recipes()
OTHERS = [recipe.name + TWIN for recipe in RECIPES if recipe.has_twin and not recipe.table]
pytestmark = [
    pytest.mark.slow,
    # short runs end before it converges
    pytest.mark.filterwarnings("ignore:.*the attention on the selected quantizer"),
]


def test_the_comparisons_are_tables():
    assert by_table(RECIPES).keys() >= COMPARISONS


@pytest.mark.parametrize("table", by_table(RECIPES))
def test_twins_of_a_table_beat_chance_by_far(table, root, capsys):
    seeds = SEEDS if table in COMPARISONS else 1
    outcomes = Reproduction(root, small=True).run(table, seeds=seeds)
    with capsys.disabled():
        print(f"\n{table}, small twins, {seeds} seed{'s' * (seeds > 1)}\n{side_by_side(outcomes)}")
    errors = [error for outcome in outcomes for error in outcome.errors]
    assert not errors
    for outcome in outcomes:
        assert len(outcome.figures) == seeds
        for figures in outcome.figures:
            assert figures["accuracy"] > MARGIN * 100 / CLASSES, outcome.row.name


@pytest.mark.parametrize("name", OTHERS)
def test_a_twin_outside_of_the_tables_beats_chance_by_far(name, root):
    folder, _ = Reproduction(root, small=True).train(name, seed=0)
    assert read_run(folder).figures["accuracy"] > MARGIN * 100 / CLASSES

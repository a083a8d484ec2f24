"""LQ-Nets training: it learns, resumes, agrees between processes, packs, and shows its levels."""

import pytest
import torch

import quantkernels as qk
from training import engine
from training.algorithms.base import build_algorithm, build_quantizer
from training.algorithms.lqnets import histogram, learned_layers
from training.config import ConfigError
from training.models import build_model
from training.plots import figure_levels
from training.report import write_report
from training.run_reader import read_run

TWO_BITS = {"name": "lqnets", "weight_bits": 2, "activation_bits": 2}


def test_layers():
    algorithm = build_algorithm("lqnets", {"weight_bits": 1, "activation_bits": 2})
    model = algorithm.prepare(build_model("preact_resnet20", 10, in_channels=3, shortcut="B"))
    layers = learned_layers(model)
    floats = [name for name, m in model.named_modules() if type(m) in (torch.nn.Conv2d, torch.nn.Linear)]
    assert floats == ["stem.0", "fc"] and any("shortcut" in name for name in layers)
    for layer in layers.values():
        assert layer.weight_quantizer.basis.shape == (layer.out_channels, 1)
        assert layer.weight_quantizer.signed and not layer.activation_quantizer.signed
        assert layer.activation_quantizer.bits == 2
    (group,) = algorithm.parameter_groups(model, {"lr": 0.1})
    assert len(group["params"]) == len(list(model.parameters()))


def test_weights_alone_and_the_quantizer_in_other_algorithms():
    model = build_algorithm("lqnets", {"weight_bits": 2}).prepare(build_model("tiny_convnet", 10, in_channels=1))
    assert all(layer.activation_quantizer is None for layer in learned_layers(model).values())
    quantizer = build_quantizer({"kind": "LearnedBasis", "bits": 3, "axis": 0})
    assert isinstance(quantizer, qk.LearnedBasis) and quantizer.axis == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 0}, "algorithm.weight_bits must be an integer from 1 to 8, got 0"),
        ({"weight_bits": 32}, "algorithm.weight_bits must be an integer from 1 to 8, got 32"),
        (
            {"weight_bits": 2, "activation_bits": 9},
            "activation_bits must be an integer from 1 to 8, or 32 for float, got 9",
        ),
        ({"weight_bits": 2, "skip": "all"}, "algorithm.skip"),
        ({}, "weight_bits"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        build_algorithm("lqnets", options)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lqnets") / "run"
    return engine.run(tiny(algorithm=TWO_BITS, model={"width": 8}, run={"epochs": 4}), folder), folder


def test_it_learns_and_packs(trained):
    result, _ = trained
    assert result.accuracy > 0.3  # three times chance, after 44 steps
    model = result.model
    for layer in learned_layers(model).values():
        assert layer.weight_quantizer.batches == layer.activation_quantizer.batches == 44
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(qk.convert(model, fold=False)(x), model(x))


def test_report_shows_errors_and_levels(trained, tmp_path):
    _, folder = trained
    run = read_run(folder)
    errors = [line["algorithm"]["weight_error"] for line in run.epochs]
    assert len(errors) == 4 and all(0 < value < 0.5 for line in errors for value in line.values())
    layers = run.histograms()
    assert layers and all(set(roles) == {"weight", "activation"} for roles in layers.values())
    for roles in layers.values():
        for h in roles.values():
            assert 1 <= len(h["levels"]) <= 4 and sum(h["shares"]) == pytest.approx(1, abs=1e-4)
    page = write_report([folder], tmp_path / "report.html").read_text()
    assert "Learned levels" in page


def test_histogram():
    h = histogram(torch.tensor([0.0, 0.5, 1.0, 1.0]), torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert (h["low"], h["high"], sum(h["counts"])) == (0.0, 1.0, 4)
    assert (h["levels"], h["shares"]) == ([0.0, 1.0], [0.5, 0.5])
    assert len(figure_levels({"layer": {"weight": h}}).axes) == 2
    with pytest.raises(ValueError, match="at least one histogram"):
        figure_levels({})

"""Quantized training with one quantizer each: it learns, resumes, and gives a network that can be packed."""

import pytest
import torch

import quantkernels as qk
from training import engine
from training.algorithms.base import build_algorithm, build_quantizer, split_parameters
from training.config import ConfigError
from training.models import build_model

TWO_BITS = {"name": "vanilla", "weight": {"kind": "MinMax", "bits": 2}}


@pytest.mark.parametrize(
    ("table", "kind", "bits"),
    [
        ({"kind": "MinMax", "bits": 3}, qk.MinMax, 3),
        ({"kind": "MinMax", "bits": 3, "axis": 0}, qk.MinMax, 3),
        ({"kind": "SAWB", "bits": 2, "ste": "identity"}, qk.SAWB, 2),
        ({"kind": "PACT", "bits": 4, "alpha": 6.0, "plus": True}, qk.PACT, 4),
        ({"kind": "BWN"}, qk.BWN, 1),
        ({"kind": "TWN", "axis": 0}, qk.TWN, 2),
        ({"kind": "Identity"}, qk.Identity, None),
    ],
)
def test_quantizers_of_tables(table, kind, bits):
    quantizer = build_quantizer(table)
    assert type(quantizer) is kind
    if bits is not None:
        assert quantizer.bits == bits


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"kind": "SAWB", "bits": 2, "ste": "none"}, r"algorithm\.weight: .*ste"),
        ({"kind": "BWN", "bits": 1}, r"unknown key algorithm\.weight\.bits"),
        ({"kind": "PACT", "bits": 2, "alpha": -1.0}, r"algorithm\.weight: .*alpha"),
        ({"kind": "PACT", "bits": 2, "alpha": "big"}, r"algorithm\.weight: "),
        ({"kind": "MinMax", "bits": 2.0}, r"bits must be an integer from 1 to 8, got 2\.0"),
    ],
)
def test_wrong_arguments_of_quantizers(table, message):
    with pytest.raises(ConfigError, match=message):
        build_quantizer(table)


def test_layers_and_groups():
    options = {
        "weight": {"kind": "MinMax", "bits": 2},
        "activation": {"kind": "PACT", "bits": 2},
        "skip": "first_and_last",
        "quantizer_lr": 0.01,
    }
    algorithm = build_algorithm("vanilla", options)
    model = algorithm.prepare(build_model("tiny_convnet", 10, in_channels=1))
    kinds = [type(m).__name__ for m in model if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert kinds == ["Conv2d", "QConv2d", "QConv2d", "Linear"]
    network, quantizers = split_parameters(model)
    assert len(quantizers) == 2  # an alpha for each quantized layer
    groups = algorithm.parameter_groups(model, {"lr": 0.1, "weight_decay": 1e-4})
    assert [group["lr"] for group in groups] == [0.1, 0.01]
    assert [len(group["params"]) for group in groups] == [len(network), 2]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("activation", [None, {"kind": "PACT", "bits": 4}, {"kind": "MinMax", "bits": 4}])
def test_learns_digits(tiny, tmp_path, activation):
    algorithm = TWO_BITS | ({"activation": activation} if activation else {})
    config = tiny(model={"width": 12}, data={"batch_size": 64}, run={"epochs": 10}, algorithm=algorithm)
    result = engine.run(config, tmp_path / "run")
    assert result.accuracy > 0.85
    _, loaded = engine.load_run(tmp_path / "run")
    inputs, _ = loaded.data.test.eval_batch(torch.arange(50))
    with torch.no_grad():
        assert torch.equal(loaded.model(inputs), result.model(inputs))
        trained, packed = result.model(inputs), qk.convert(result.model, fold=False)(inputs)
    assert torch.equal(packed, trained)

"""DQA against numbers worked out by hand from Algorithm 1 and equations 4 to 7."""

import warnings

import pytest
import torch
from torch import nn

import quantkernels as qk
from training import engine
from training.algorithms.base import build_algorithm
from training.algorithms.dqa import DQA, count_weights, relaxed_modules
from training.config import ConfigError, load

MIXTURE = [{"kind": "MinMax", "bits": bits} for bits in (2, 4, 8)]
CRITERION = nn.functional.cross_entropy


def small_model() -> nn.Sequential:
    """Weights: 9 * 4 = 36 and 4 * 4 * 3 = 48, so 84 in all."""
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 4, 3, bias=False)
    return nn.Sequential(conv, nn.ReLU(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(16, 3))


def started(total_steps: int = 2, **options) -> tuple[DQA, nn.Module]:
    algorithm = build_algorithm("dqa", {"weight": MIXTURE, **options})
    model = algorithm.prepare(small_model())
    algorithm.start(model, total_steps, total_steps, 1)
    return algorithm, model


def mixtures(model: nn.Module) -> list[qk.Attention]:
    return list(relaxed_modules(model, qk.Attention).values())


def set_attention(mixture: qk.Attention, logits: list[float], temperature: float = 1.0) -> None:
    with torch.no_grad():
        mixture.logits.copy_(torch.tensor(logits))
        mixture.temperature.fill_(temperature)


def test_temperature_falls_from_100_to_003_by_the_batch():
    algorithm, _ = started(total_steps=2)
    assert algorithm.temperature(0) == pytest.approx(100 * 0.0003**0.5)
    assert algorithm.temperature(1) == pytest.approx(0.03)
    algorithm, model = started(total_steps=1000)
    assert algorithm.temperature(0) == pytest.approx(100 * 0.0003**0.001)
    algorithm.before_batch(model, 999)
    for mixture in mixtures(model):
        assert float(mixture.temperature) == pytest.approx(0.03)


def test_logits_start_from_equation_7_and_are_normalised_before_each_batch():
    algorithm, model = started()
    for mixture in mixtures(model):
        torch.testing.assert_close(mixture.logits.detach(), torch.tensor([12.0, 10.0, 6.0]) / 14)
    algorithm.before_batch(model, 0)
    first = torch.tensor([12.0, 10.0, 6.0]) / torch.tensor([12.0, 10.0, 6.0]).std(correction=0)
    for mixture in mixtures(model):
        torch.testing.assert_close(mixture.logits.detach(), first)


def test_float_counts_as_32_bits():
    algorithm = DQA(weight=[{"kind": "Identity"}, {"kind": "TWN"}, {"kind": "BWN"}])
    (mixture, *_) = mixtures(algorithm.prepare(small_model()))
    assert [quantizer.bits for quantizer in mixture.quantizers] == [1, 2, 32]
    torch.testing.assert_close(mixture.logits.detach(), torch.tensor([34.0, 33.0, 3.0]) / 35)


@pytest.mark.parametrize("logits", [[0.5], [0.4, 0.4, 0.4]], ids=["one quantizer", "no deviation"])
def test_normalisation_without_a_deviation_changes_nothing(logits):
    algorithm, model = started(weight=MIXTURE[: len(logits)])
    for mixture in mixtures(model):
        set_attention(mixture, logits)
    algorithm.before_batch(model, 0)
    for mixture in mixtures(model):
        assert mixture.logits.tolist() == pytest.approx(logits)
        assert torch.isfinite(mixture(torch.randn(8))).all()


@pytest.mark.parametrize(
    ("normalise", "expected"),
    [
        # g^T a is 1 in the first layer (36 weights, all on 2 bits) and 7 in the second (48, a third each)
        ("weights", (36 * 1 + 48 * 7) / 84),
        ("layers", (1 + 7) / 2),
        ("literal", (1 + 7) / 84),
    ],
)
def test_regulariser(normalise, expected):
    algorithm, model = started(normalise=normalise)
    assert count_weights(model) == 84
    set_attention(mixtures(model)[0], [100.0, 0.0, 0.0])
    set_attention(mixtures(model)[1], [0.0, 0.0, 0.0])
    assert algorithm.regulariser().item() == pytest.approx(expected)


def test_loss_is_cross_entropy_plus_lambda_times_the_regulariser():
    algorithm, model = started(penalty=5.0, g=[1, 2, 9])
    for mixture in mixtures(model):
        set_attention(mixture, [0.0, 0.0, 0.0])
    inputs, targets = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    loss, outputs = algorithm.loss(model, inputs, targets, CRITERION)
    assert loss.item() == pytest.approx(CRITERION(outputs, targets).item() + 5 * 4, rel=1e-6)
    loss.backward()
    for mixture in mixtures(model):
        # 2 bits cost least: descent raises their logit and lowers that of 8 bits
        assert mixture.logits.grad[0] < 0 < mixture.logits.grad[2]


def test_skipped_layers_count_in_s_but_have_no_term():
    algorithm = DQA(weight=MIXTURE, skip="first_and_last")
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    model = algorithm.prepare(model)
    algorithm.start(model, 1, 1, 1)
    (mixture,) = mixtures(model)
    set_attention(mixture, [0.0, 0.0, 0.0])
    assert algorithm.regulariser().item() == pytest.approx(7 * 36 / (18 + 36 + 24))


def test_weights_and_activations_have_a_term_each():
    algorithm, model = started(activation=[{"kind": "PACT", "bits": bits} for bits in (2, 4, 8)])
    for mixture in mixtures(model):
        set_attention(mixture, [0.0, 0.0, 0.0])
    assert len(mixtures(model)) == 4
    assert algorithm.regulariser().item() == pytest.approx(14)
    alphas = {id(p) for name, p in model.named_parameters() if name.endswith("alpha")}
    assert len(alphas) == 2  # one for each layer, shared by its three quantizers


def test_parameter_groups_hold_everything_once_and_logits_do_not_decay():
    algorithm, model = started(activation={"kind": "PACT", "bits": 2}, attention_lr=0.5, quantizer_weight_decay=0.1)
    groups = algorithm.parameter_groups(model, {"lr": 0.1, "weight_decay": 1e-4})
    network, attention, ranges = groups
    assert (network["lr"], network["weight_decay"]) == (0.1, 1e-4)
    assert (attention["lr"], attention["weight_decay"]) == (0.5, 0.0)
    assert (ranges["lr"], ranges["weight_decay"]) == (0.1, 0.1)
    given = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(given) == sorted(id(parameter) for parameter in model.parameters())


def test_hard_selection_keeps_one_quantizer_and_says_where_attention_had_not_converged():
    algorithm, model = started()
    set_attention(mixtures(model)[0], [100.0, 0.0, 0.0])
    set_attention(mixtures(model)[1], [0.0, 0.0, 0.0])
    with pytest.warns(UserWarning, match=r"4\.weight_quantizer: .*is 0\.333, below 0\.99") as record:
        algorithm.finish(model)
    assert len(record) == 1
    x = torch.randn(50)
    for mixture in mixtures(model):
        assert torch.equal(mixture(x), qk.MinMax(2)(x))
    assert algorithm.metrics(model)["attention"]["4.weight_quantizer"] == pytest.approx([1 / 3] * 3)


def test_a_cooled_mixture_is_selected_without_a_warning():
    algorithm, model = started(total_steps=10, select=1)
    for mixture in mixtures(model):
        set_attention(mixture, [0.1, 0.9, 0.2])
    algorithm.before_batch(model, 9)
    x = torch.randn(50)
    soft = [mixture(x).detach() for mixture in mixtures(model)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        algorithm.finish(model)
    for mixture, mixed in zip(mixtures(model), soft, strict=True):
        assert torch.equal(mixture(x), qk.MinMax(4)(x))
        torch.testing.assert_close(mixed, mixture(x))


def test_metrics_are_plain_values():
    algorithm, model = started()
    algorithm.before_batch(model, 1)
    metrics = algorithm.metrics(model)
    assert list(metrics["attention"]) == ["0.weight_quantizer", "4.weight_quantizer"]
    assert metrics["temperature"] == pytest.approx(0.03)
    assert sum(metrics["attention"]["0.weight_quantizer"]) == pytest.approx(1)
    assert type(metrics["regulariser"]) is float


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a list of quantizers"),
        ({"weight": {"kind": "MinMax", "bits": 2}}, "needs a list of quantizers"),
        ({"weight": []}, "at least one quantizer"),
        ({"weight": MIXTURE, "g": [1, 4]}, "one number for each of the 3 quantizers, got"),
        ({"weight": MIXTURE, "select": 3}, "from 0 to 2, got 3"),
        ({"weight": MIXTURE, "normalise": "mean"}, "algorithm.normalise = 'mean'"),
        ({"weight": MIXTURE, "penalty": -1.0}, "0 or positive, got -1.0"),
        ({"weight": MIXTURE, "temperature_end": 0.0}, "positive, got 0.0"),
        ({"weight": MIXTURE, "temperature_start": 0.01}, "at least temperature_end, got 0.01"),
        ({"weight": MIXTURE, "lambda": 5}, "unknown key algorithm.lambda"),
        ({"weight": [{"kind": "MinMax", "bits": 9}]}, r"algorithm.weight\[0\].bits must be"),
    ],
)
def test_wrong_options_are_one_clear_error(options, message):
    with pytest.raises(ConfigError, match=message):
        build_algorithm("dqa", options)


@pytest.fixture(scope="module", params=["digits/dqa-pact", "digits/binary-relax"])
def whole_run(request, tmp_path_factory):
    """A recipe and its run without interruption."""
    settings = ["run.epochs=2", "model.width=4", "run.checkpoint_steps=10", 'algorithm.skip="none"']
    config = load(request.param, settings)
    return config, engine.run(config, tmp_path_factory.mktemp("runs") / "whole")


@pytest.mark.parametrize("stop", [7, 35], ids=["before the first checkpoint", "within the second epoch"])
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, monkeypatch, whole_run, stop):
    config, whole = whole_run
    kind = type(build_algorithm(config.algorithm.name, config.algorithm.options))
    before_batch = kind.before_batch

    def interrupted(self, model, step):
        if step == stop:
            raise KeyboardInterrupt
        before_batch(self, model, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(kind, "before_batch", interrupted)
        engine.run(config, tmp_path / "parts")
    resumed = engine.run(config, tmp_path / "parts", resume=True)
    expected = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    for ours, theirs in zip(resumed.metrics, whole.metrics, strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


def test_the_final_line_is_of_the_selected_network_and_keeps_its_attention(whole_run):
    config, whole = whole_run
    *epochs, final = whole.metrics
    assert [line["kind"] for line in epochs] == ["epoch"] * config.run.epochs
    assert final["kind"] == "final"
    mixtures = relaxed_modules(whole.model, (qk.Attention, qk.BinaryRelax))
    assert mixtures and all(mixture.choice == 0 for mixture in mixtures.values())
    assert final["algorithm"] == epochs[-1]["algorithm"]

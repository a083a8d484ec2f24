"""LIMPQ: indicators in one joint training, policies that are trained on, what is refused before."""

import random

import pytest
import torch

import quantkernels as qk
from training import config, engine
from training.algorithms.base import build_algorithm
from training.algorithms.limpq import importance, layers_of
from training.config import ConfigError, UserError
from training.models import build_model

OPTIONS = {"bits": [4, 3, 2]}


def network(algorithm, width=4):
    torch.manual_seed(0)
    return algorithm.prepare(build_model("tiny_convnet", 10, in_channels=1, width=width))


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, 1, 8, 8, generator=generator), torch.randint(0, 10, (16,), generator=generator)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run_passes(algorithm, model, indices):
    criterion = torch.nn.functional.cross_entropy
    for index in indices:
        algorithm.before_pass(model, index)
        loss, _ = algorithm.loss(model, *batch(), criterion)
        loss.backward()


def test_a_step_for_each_layer_and_bit_width():
    model = network(build_algorithm("limpq", OPTIONS))
    first, *middle, last = layers_of(model)
    assert len(middle) == 2
    for name in middle:
        layer = model.get_submodule(name)
        assert layer.weight_quantizer.per_bit == layer.activation_quantizer.per_bit == [4, 3, 2]
        assert layer.weight_quantizer.signed and not layer.activation_quantizer.signed
        spread, mean = torch.std_mean(layer.weight, correction=0)
        bound = max(abs(mean - 3 * spread), abs(mean + 3 * spread))
        expected = torch.stack([bound / 8, bound / 4, bound / 2])
        torch.testing.assert_close(layer.weight_quantizer.step, expected, check_stride=False)
    for name, signed in ((first, True), (last, False)):
        layer = model.get_submodule(name)
        assert (layer.weight_quantizer.bits, layer.activation_quantizer.bits) == (8, 8)
        assert layer.weight_quantizer.per_bit is None and layer.activation_quantizer.per_bit is None
        assert layer.activation_quantizer.signed == signed, "an image has negative values, what follows a ReLU has none"
    kinds = [type(m) for m in model if "BatchNorm" in type(m).__name__]
    switchable = qk.nn.SwitchableBatchNorm2d
    assert kinds == [torch.nn.BatchNorm2d, switchable, switchable], "the first layer's bits are fixed"
    weight, activation = importance(model)
    assert list(weight) == list(activation) == middle
    assert list(weight[middle[0]]) == [4, 3, 2]


def test_gradients_of_all_policies_add_up():
    algorithm = build_algorithm("limpq", OPTIONS)
    model = network(algorithm).train()
    algorithm.parameter_groups(model, {"lr": 0.1, "weight_decay": 0.1})
    random.seed(0)
    algorithm.before_batch(model, 0)
    assert algorithm.passes == 4
    run_passes(algorithm, model, range(4))  # sets the steps of the activations
    model.zero_grad()
    run_passes(algorithm, model, range(4))
    together, expected = gradients(model), {}
    for index in range(4):
        model.zero_grad()
        run_passes(algorithm, model, [index])
        for name, grad in gradients(model).items():
            expected[name] = expected.get(name, 0) + grad
    assert together.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, grad in together.items():
        torch.testing.assert_close(grad, expected[name])


def test_the_passes_have_the_bits_that_they_should():
    algorithm = build_algorithm("limpq", OPTIONS)
    model = network(algorithm)
    names = layers_of(model)[1:-1]

    def bits():
        layers = [model.get_submodule(name) for name in names]
        assert [m.bits for m in model if isinstance(m, qk.nn.SwitchableBatchNorm2d)] == [
            m.weight_quantizer.bits for m in layers
        ]
        return [(m.weight_quantizer.bits, m.activation_quantizer.bits) for m in layers]

    policies = []
    for seed in (1, 1, 2, 3, 4, 5):
        random.seed(seed)
        algorithm.before_batch(model, 0)
        seen = []
        for index in range(4):
            algorithm.before_pass(model, index)
            seen.append(bits())
        assert seen[:3] == [[(b, b)] * 2 for b in (4, 3, 2)]
        assert all(w == a for w, a in seen[3])
        policies.append(seen[3])
    assert policies[0] == policies[1]
    assert len({str(policy) for policy in policies}) > 2
    algorithm.after_epoch(model, 0)
    assert bits() == [(4, 4)] * 2


def test_only_indicators_with_a_gradient_decay():
    algorithm = build_algorithm("limpq", OPTIONS)
    model = network(algorithm).train()
    groups = algorithm.parameter_groups(model, {"lr": 0.5, "weight_decay": 0.1})
    random.seed(0)
    algorithm.before_batch(model, 0)
    run_passes(algorithm, model, [1])  # 3 bits alone
    algorithm.clamp_steps()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    used = gradients(model)
    algorithm.before_step(model)
    torch.optim.SGD(groups, lr=0.5).step()
    for name, p in model.named_parameters():
        if not name.endswith("step") or p.numel() == 1:
            continue
        assert torch.equal(p[[0, 2]], before[name][[0, 2]]), "4 and 2 bits had no part in this step"
        expected = before[name][1] - 0.5 * (used[name][1].clamp(-1, 1) + 0.1 * before[name][1])
        torch.testing.assert_close(p[1], expected)


def test_gradients_are_clipped_and_steps_kept_in_range():
    algorithm = build_algorithm("limpq", OPTIONS)
    model = network(algorithm).train()
    model(batch()[0])  # sets the steps of the activations
    algorithm.parameter_groups(model, {"lr": 0.5, "weight_decay": 0.0})
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    algorithm.before_step(model)
    assert all((p.grad == 1).all() for p in model.parameters())
    with torch.no_grad():
        for steps in algorithm.steps:
            steps.copy_(torch.linspace(-3, 3, steps.numel()))
    algorithm.before_batch(model, 0)
    assert all((steps > 0.999e-5).all() and (steps <= 1).all() for steps in algorithm.steps)


def test_weights_alone():
    algorithm = build_algorithm("limpq", OPTIONS | {"weight_only": True})
    model = network(algorithm)
    weight, activation = importance(model)
    assert len(weight) == 2 and not activation
    random.seed(0)
    algorithm.before_batch(model, 0)
    algorithm.before_pass(model, 2)
    layer = model.get_submodule(layers_of(model)[1])
    assert (layer.weight_quantizer.bits, layer.activation_quantizer.bits) == (2, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": []}, r"algorithm\.bits must be a list of at least one bit-width, got \[\]"),
        ({"bits": [4, 9]}, r"algorithm\.bits must be a list of integers from 2 to 8, got \[4, 9\]"),
        ({"bits": [4, 1]}, r"algorithm\.bits must be a list of integers from 2 to 8"),
        ({"bits": [4, 4]}, r"algorithm\.bits must be a list of different bit-widths"),
        ({"signed_inputs": ["layer9.*"]}, r"algorithm\.signed_inputs: 'layer9\.\*' matches no layer"),
    ],
)
def test_wrong_options_of_the_indicators(options, message):
    with pytest.raises(ConfigError, match=message):
        network(build_algorithm("limpq", OPTIONS | options))


def test_a_network_with_nothing_to_search():
    with pytest.raises(ConfigError, match="needs a network with a layer between its first and its last one"):
        build_algorithm("limpq", OPTIONS).prepare(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)))


def test_signed_inputs():
    model = network(build_algorithm("limpq", OPTIONS | {"signed_inputs": ["3"]}))
    signed = [model.get_submodule(name).activation_quantizer.signed for name in layers_of(model)]
    assert signed == [True, True, False, False]


@pytest.fixture(scope="module")
def indicators(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("limpq")
    config = tiny(algorithm={"name": "limpq"} | OPTIONS, data={"batch_size": 64}, run={"epochs": 3})
    return engine.run(config, folder / "runs/indicators"), folder


def test_indicators_are_on_record_and_in_the_model(indicators):
    result, folder = indicators
    assert result.accuracy > 0.3
    _, loaded = engine.load_run(folder / "runs/indicators")
    weight, activation = importance(loaded.model)
    line = result.metrics[-1]["algorithm"]["indicators"]
    assert {name: {str(b): s for b, s in steps.items()} for name, steps in weight.items()} == line["weight"]
    for steps in (*weight.values(), *activation.values()):
        assert all(0 < s <= 1 for s in steps.values())
        assert steps[2] > steps[4], "a layer is quantized more coarsely with fewer bits"


def policy(**layers):
    return {"layers": {"3": [3, 4], "6": [2, 3]} | layers}


def test_a_policy_is_trained_and_packed(tiny, tmp_path):
    config = tiny(
        algorithm={"name": "mixed_precision", "policy": policy()},
        model={"width": 8},
        data={"batch_size": 64},
        run={"epochs": 6},
    )
    result = engine.run(config, tmp_path / "run")
    assert result.accuracy > 0.85
    layer = result.model.get_submodule("6")
    assert (layer.weight_quantizer.bits, layer.activation_quantizer.bits) == (2, 3)
    assert result.metrics[-1]["algorithm"]["bits"] == {"3": [3, 4], "6": [2, 3]}
    _, loaded = engine.load_run(tmp_path / "run")
    inputs, _ = loaded.data.test.eval_batch(torch.arange(50))
    with torch.no_grad():
        trained = result.model(inputs)
        assert torch.equal(loaded.model(inputs), trained)
        assert torch.equal(qk.convert(result.model, fold=False)(inputs), trained)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (policy(**{"7": [2, 2]}), "names the layer '7', whose bits are not searched"),
        (policy(**{"0": [2, 2]}), "names the layer '0', whose bits are not searched"),
        (policy(**{"6": [9, 2]}), r"the policy's bits of '6' must be a pair of integers from 2 to 8, got \[9, 2\]"),
        (policy(**{"6": 3}), "must be a pair of integers from 2 to 8, got 3"),
        ({"layers": {"3": [2, 2]}}, "the policy has no bits for 6"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused_before_training(tiny, tmp_path, table, message):
    config = tiny(algorithm={"name": "mixed_precision", "policy": table})
    with pytest.raises(ConfigError, match=message):
        engine.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_policy_yet(tiny, tmp_path):
    with pytest.raises(UserError, match=r"no policy in .*/run\.policy\.json; `python -m training search RECIPE`"):
        engine.run(tiny(algorithm={"name": "mixed_precision"}), tmp_path / "run")


@pytest.mark.parametrize(
    ("network", "alpha", "epochs"), [("resnet18", 3, 5), ("resnet50", 2, 1), ("mobilenetv1", 1, 5)]
)
def test_hyper_parameters_are_those_of_the_paper(network, alpha, epochs):
    """The supplement's section 1."""
    indicators = config.load(f"limpq/{network}-indicators")
    assert indicators.algorithm.options["bits"] == [6, 5, 4, 3, 2]
    assert (indicators.optimizer.lr, indicators.run.epochs) == (0.01, epochs)
    tuned = config.load("limpq/table1/limpq" if network == "resnet50" else f"limpq/{network}-limpq-w4a4")
    assert (tuned.optimizer.lr, tuned.optimizer.weight_decay, tuned.run.epochs) == (0.04, 2.5e-5, 90)
    assert (tuned.schedule.name, tuned.schedule.warmup_epochs) == ("cosine", 5)
    search = tuned.algorithm.options["search"]
    assert search["alpha"] == alpha and config.load(search["indicators"]) == indicators

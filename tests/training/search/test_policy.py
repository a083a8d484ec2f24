"""What networks cost, budgets, sensitivities, policies on disk."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from training.config import ConfigError, UserError
from training.models import build_model
from training.search.accounting import LayerSize, average_bits, gbitops, measure, size_mb
from training.search.methods import hawq_costs, hutchinson_traces, limpq_costs, without_outliers
from training.search.policy import Budgets, Policy, best_bits, option_pairs, read_policy

SIZES = {
    "stem": LayerSize(100, 10_000),
    "a": LayerSize(1000, 300_000),
    "b": LayerSize(4000, 200_000),
    "c": LayerSize(2000, 50_000),
    "fc": LayerSize(50, 50),
}


def test_resnet18_has_the_multiply_adds_that_everybody_knows():
    with torch.device("meta"):
        model = build_model("resnet18", 1000, in_channels=3)
    sizes = measure(model, torch.empty(1, 3, 224, 224))
    assert sum(size.macs for size in sizes.values()) == 1_814_073_344
    assert sum(size.weights for size in sizes.values()) == 11_678_912
    assert sizes["conv1"] == LayerSize(64 * 3 * 49, 64 * 3 * 49 * 112 * 112)
    assert sizes["fc"] == LayerSize(512_000, 512_000)


def test_grouped_and_strided_layers():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4), nn.Flatten(), nn.Linear(8 * 9, 5))
    sizes = measure(model, torch.empty(1, 4, 5, 5))
    assert sizes == {"0": LayerSize(72, 72 * 9), "2": LayerSize(360, 360)}
    assert next(model.parameters()).device.type == "cpu", "the model itself must be left alone"


def test_costs_of_a_policy():
    bits = {"a": (2, 4), "b": (3, 3), "c": (4, 2)}
    assert gbitops(SIZES, bits) == pytest.approx((300_000 * 8 + 200_000 * 9 + 50_000 * 8) / 1e9)
    expected = (100 * 8 + 1000 * 2 + 4000 * 3 + 2000 * 4 + 50 * 8) / 8 / 2**20
    assert size_mb(SIZES, bits) == pytest.approx(expected)
    assert average_bits(bits) == (3.0, 3.0)


def random_costs(pairs):
    random = np.random.default_rng(0)
    return {name: random.random(len(pairs)) for name in "abc"}


@pytest.mark.parametrize(
    ("budgets", "holds"),
    [
        (Budgets(bitops=[3, 3]), lambda bits: gbitops(SIZES, bits) <= 550_000 * 9 / 1e9 * (1 + 1e-9)),
        (Budgets(bitops=0.004), lambda bits: gbitops(SIZES, bits) <= 0.004),
        (Budgets(size_mb=0.0025), lambda bits: size_mb(SIZES, bits) <= 0.0025),
        (Budgets(average_bits=3), lambda bits: average_bits(bits)[0] <= 3),
        (Budgets(average_bits=[3, 3.5]), lambda bits: average_bits(bits)[0] <= 3 and average_bits(bits)[1] <= 3.5),
        (
            Budgets(bitops=[4, 3], size_mb=0.003, average_bits=[3, 4]),
            lambda bits: (
                gbitops(SIZES, bits) <= 550_000 * 12 / 1e9
                and size_mb(SIZES, bits) <= 0.003
                and average_bits(bits)[0] <= 3
                and average_bits(bits)[1] <= 4
            ),
        ),
    ],
)
def test_the_best_policy_within_a_budget(budgets, holds):
    """Against all 16^3 policies, their costs counted by the functions that reports use."""
    pairs = option_pairs([5, 4, 3, 2], [5, 4, 3, 2])
    costs = random_costs(pairs)
    found = best_bits(SIZES, pairs, costs, budgets)
    assert holds(found)

    def cost(choice):
        return sum(costs[name][i] for name, i in zip("abc", choice, strict=True))

    def bits(choice):
        return {name: tuple(map(int, pairs[i])) for name, i in zip("abc", choice, strict=True)}

    best = min((c for c in itertools.product(range(16), repeat=3) if holds(bits(c))), key=cost)
    assert found == bits(best)


def test_the_smallest_feasible_budget_is_that_of_the_reports():
    pairs = option_pairs([4, 3, 2], [4, 3, 2])
    lowest = dict.fromkeys("abc", (2, 2))
    least = size_mb(SIZES, lowest)
    costs = {name: -pairs.sum(1).astype(float) for name in "abc"}
    assert best_bits(SIZES, pairs, costs, Budgets(size_mb=least))["b"] == (2, 4)
    with pytest.raises(UserError, match=f"size_mb = 0.001 is below the smallest feasible budget, {least:.6g}"):
        best_bits(SIZES, pairs, costs, Budgets(size_mb=0.001))
    with pytest.raises(UserError, match=r"bitops \(10\^9\) = 0.001 is below the smallest feasible budget, 0.0022"):
        best_bits(SIZES, pairs, costs, Budgets(bitops=0.001))
    with pytest.raises(UserError, match=r"of \[1, 1\] bits in every layer = 0.00055 is .*: raise it to that, or allow"):
        best_bits(SIZES, pairs, costs, Budgets(bitops=[1, 1]))
    with pytest.raises(UserError, match=r"average_bits of the activations = 1.5 is below .* 2,"):
        best_bits(SIZES, pairs, costs, Budgets(average_bits=[4, 1.5]))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "the search needs a budget: bitops, size_mb or average_bits"),
        ({"size_mb": -1}, "search.size_mb must be a positive number, got -1"),
        ({"size_mb": [1, 2]}, "search.size_mb must be a positive number"),
        ({"bitops": [4]}, r"search.bitops must be a positive number or a pair .*, got \[4\]"),
        ({"average_bits": "three"}, "search.average_bits must be a positive number or a pair"),
    ],
)
def test_wrong_budgets(table, message):
    with pytest.raises(ConfigError, match=message):
        Budgets(**table)


def test_fewer_bits_never_matter_less():
    clean = without_outliers({6: 0.02, 5: 0.05, 4: 0.04, 3: 0.2, 2: 0.1})
    assert clean == {6: 0.02, 5: 0.05, 4: float("inf"), 3: 0.2, 2: float("inf")}


def test_costs_of_limpq():
    weight = {"a": {3: 0.1, 2: 0.3}}
    activation = {"a": {3: 0.2, 2: 0.5}}
    pairs = option_pairs([3, 2], [3, 2])
    expected = [0.2 + 0.3, 0.5 + 0.3, 0.2 + 0.9, 0.5 + 0.9]
    assert limpq_costs(weight, activation, pairs, alpha=3.0)["a"].tolist() == pytest.approx(expected)
    weights_only = limpq_costs(weight, None, option_pairs([3, 2], [8]), alpha=2.0)
    assert weights_only["a"].tolist() == pytest.approx([0.2, 0.6])


def test_traces_are_those_of_the_hessian():
    """Within four deviations of the estimate, for two layers whose Hessian can be written down."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = torch.randn(20, 4).double(), torch.randint(0, 2, (20,))
    names = ["0", "2"]

    def loss_of(*weights):
        state = {f"{name}.weight": weight for name, weight in zip(names, weights, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, state, (x,)), y)

    weights = [model.get_submodule(name).weight.detach() for name in names]
    blocks = torch.func.hessian(loss_of, argnums=(0, 1))(*weights)
    probes = 1000
    traces = hutchinson_traces(model, F.cross_entropy(model(x), y), names, probes, torch.Generator().manual_seed(0))
    for i, name in enumerate(names):
        own = blocks[i][i].reshape(weights[i].numel(), -1)
        # of v^T H v: twice the squares beside the diagonal, and the squares of the blocks to other layers
        variance = 2 * (own.square().sum() - own.diagonal().square().sum()) + blocks[i][1 - i].square().sum()
        assert traces[name] == pytest.approx(own.trace().item(), abs=4 * (variance / probes).sqrt().item())
        assert (variance / probes).sqrt() < 0.1 * own.trace()


def test_costs_of_hawq():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    weight = model[0].weight.detach()
    pairs = option_pairs([8, 4, 2], None)
    assert pairs.tolist() == [[8, 8], [4, 4], [2, 2]]
    costs = hawq_costs(model, {"0": 6.0}, pairs)["0"]
    for (bits, _), cost in zip(pairs, costs, strict=True):
        step = (weight.max() - weight.min()) / (2**bits - 1)
        nearest = weight.min() + step * ((weight - weight.min()) / step).round()
        assert cost == pytest.approx(6.0 / 30 * (nearest - weight).square().sum().item(), rel=1e-4)
    assert (hawq_costs(model, {"0": -1.0}, pairs)["0"] == 0).all()


def test_a_policy_on_disk(tmp_path):
    path = tmp_path / "folder/policy.json"
    policy = Policy({"a": (2, 4)}, "limpq", {"size_mb": 1.5})
    policy.write(path)
    assert read_policy(path) == policy.to_table()
    assert read_policy(path)["layers"] == {"a": [2, 4]}
    for text in ("{", "[]", '{"format": "other"}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"cannot be read as a policy|is not a policy: its format must be"):
            read_policy(path)
    with pytest.raises(UserError, match="cannot be read as a policy"):
        read_policy(tmp_path / "nothing.json")

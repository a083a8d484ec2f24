"""Binary-Relax: the schedule of omega, the relaxed point and its gradient, the last phase."""

import pytest
import torch
from torch import nn

import quantkernels as qk
from training.algorithms.base import build_algorithm
from training.algorithms.dqa import relaxed_modules
from training.config import ConfigError

ONE = [{"kind": "MinMax", "bits": 2}]
THREE = [{"kind": "MinMax", "bits": bits} for bits in (2, 4, 8)]


def started(epochs: int = 4, steps: int = 3, **options):
    algorithm = build_algorithm("binary_relax", {"weight": ONE, **options})
    model = algorithm.prepare(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 3)))
    algorithm.start(model, epochs * steps, steps, epochs)
    return algorithm, model


def relaxed(model: nn.Module) -> list[qk.BinaryRelax]:
    return list(relaxed_modules(model, qk.BinaryRelax).values())


def test_omega_starts_at_1_and_grows_by_the_epoch():
    algorithm, model = started(growth=1.5)
    seen = []
    for step in range(12):
        algorithm.before_batch(model, step)
        seen.append(algorithm.metrics(model)["omega"])
    assert seen == pytest.approx([1.0] * 3 + [1.5] * 3 + [1.5**2] * 3 + [1.5**3] * 3)
    assert len({float(module.omega) for module in relaxed(model)}) == 1


def test_the_default_growth_is_the_one_of_the_paper():
    algorithm, model = started()
    algorithm.before_batch(model, 3)
    assert algorithm.metrics(model)["omega"] == pytest.approx(1.02)


@pytest.mark.parametrize("omega", [1.0, 3.0])
def test_relaxed_point_and_its_gradient(omega):
    x = torch.randn(64)
    two, four, eight = (qk.MinMax(bits)(x) for bits in (2, 4, 8))
    expected = {1: (omega * two + x) / (omega + 1), 3: (omega * two + four + eight) / (omega + 2)}
    for tables in (ONE, THREE):
        _, model = started(weight=tables)
        module = relaxed(model)[0]
        module.omega.fill_(omega)
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        torch.testing.assert_close(out.detach(), expected[len(tables)])
        upstream = torch.randn(64)
        out.backward(upstream)
        torch.testing.assert_close(leaf.grad, upstream)  # the identity, at the relaxed point


@pytest.mark.parametrize(("final_phase", "first_step"), [(0.5, 6), (0.6, 9), (0.0, 0), (1.0, None)])
def test_the_last_phase_uses_q1_alone(final_phase, first_step):
    algorithm, model = started(weight=THREE, final_phase=final_phase)
    x = torch.randn(64)
    alone = []
    for step in range(12):
        algorithm.before_batch(model, step)
        alone.append(torch.equal(relaxed(model)[0](x), qk.MinMax(2)(x)))
    assert alone == [first_step is not None and step >= first_step for step in range(12)]


def test_finish_selects_q1_and_the_network_can_be_packed():
    algorithm, model = started()
    algorithm.finish(model)
    x = torch.randn(64)
    for module in relaxed(model):
        assert torch.equal(module(x), qk.MinMax(2)(x))
    inputs = torch.randn(2, 1, 4, 4)
    model.eval()
    assert torch.equal(qk.convert(model, fold=False)(inputs), model(inputs))


def test_learned_ranges_have_their_own_group():
    algorithm, model = started(activation=[{"kind": "PACT", "bits": 2}], quantizer_lr=0.01)
    network, ranges = algorithm.parameter_groups(model, {"lr": 0.1, "weight_decay": 0.0})
    assert (len(network["params"]), len(ranges["params"])) == (4, 2)
    assert (network["lr"], ranges["lr"]) == (0.1, 0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": {"kind": "MinMax", "bits": 2}}, "needs a list of quantizers"),
        ({"weight": THREE[:2]}, "a list of one or of three quantizers"),
        ({"weight": ONE, "growth": 0.9}, "algorithm.growth must be at least 1, got 0.9"),
        ({"weight": ONE, "final_phase": 2.0}, r"algorithm.final_phase must be in \[0, 1\], got 2.0"),
    ],
)
def test_wrong_options_are_one_clear_error(options, message):
    with pytest.raises(ConfigError, match=message):
        build_algorithm("binary_relax", options)

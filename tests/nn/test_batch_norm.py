"""Switchable batch-norm, clipping levels a bit-width, set_bits over all of them, calibration."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import quantkernels as qk
from quantkernels.nn import SwitchableBatchNorm2d, calibrate_batch_norm

WIDTHS = [8, 4, 2]


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip
    return model


def adaptive() -> nn.Module:
    weight, activation = qk.ModifiedDoReFa(8), qk.PACT(8, alpha=2.0, per_bit=WIDTHS)
    return qk.switch_batch_norms(qk.prepare(network(), weight=weight, activation=activation), WIDTHS)


def precisions(model: nn.Module) -> list[tuple[int, ...]]:
    """(weight bits, activation bits) of the layers, (bits,) of the batch-norms."""
    return [
        (m.bits,) if isinstance(m, SwitchableBatchNorm2d) else (m.weight_quantizer.bits, m.activation_quantizer.bits)
        for m in model
        if isinstance(m, SwitchableBatchNorm2d | qk.nn.QuantizedLayer)
    ]


def test_each_bit_width_has_a_batch_norm_of_its_own():
    plain = nn.BatchNorm2d(3)
    switchable = SwitchableBatchNorm2d.from_float(plain, [2, 8])
    assert switchable.widths == [8, 2] and switchable.bits == 8
    x = torch.randn(4, 3, 5, 5)
    switchable.set_bits(2)
    assert torch.equal(switchable(x), plain(x))
    assert torch.equal(switchable.norms["2"].running_mean, plain.running_mean)
    assert switchable.norms["8"].running_mean.abs().sum() == 0
    switchable(x).sum().backward()
    assert switchable.norms["2"].weight.grad is not None and switchable.norms["8"].weight.grad is None


def test_set_bits_switches_all_together():
    model = adaptive()
    for bits in (4, 2, 8):
        qk.set_bits(model, bits)
        assert precisions(model) == [(bits, bits), (bits,), (bits, bits), (bits,), (bits, bits)]


def test_a_policy_switches_the_batch_norm_with_the_layer_before_it():
    model = qk.set_bits(adaptive(), {"3": (2, 4), "7": (4, None)})
    assert precisions(model) == [(8, 8), (8,), (2, 4), (2,), (4, 8)]
    for bits, message in (({"4": (2, 2)}, "matches no layer"), (3, r"for \[8, 4, 2\] bits, not for 3"), (9, "1 to 8")):
        with pytest.raises(ValueError, match=message):
            qk.set_bits(model, bits)
    with pytest.raises(ValueError, match="clipping levels for"):
        qk.set_bits(model, {"0": (2, 2), "3": (4, 6)})
    assert precisions(model) == [(8, 8), (8,), (2, 4), (2,), (4, 8)]


def test_each_bit_width_learns_a_clipping_level_of_its_own():
    pact, single = qk.PACT(4, alpha=1.0, per_bit=[2, 4, 8]), qk.PACT(4, alpha=1.0)
    assert pact.per_bit == [8, 4, 2]
    x = torch.linspace(-1, 3, 50)
    assert torch.equal(pact(x), single(x))
    pact(x).sum().backward()
    single(x).sum().backward()
    assert pact.alpha.grad.tolist() == [0, single.alpha.grad.item(), 0]
    with torch.no_grad():
        pact.alpha.copy_(torch.tensor([8.0, 4.0, 2.0]))
    for bits in (2, 8, 4):
        pact.set_bits(bits)
        assert torch.equal(pact(x), qk.PACT(bits, alpha=float(bits))(x))
        assert torch.equal(pact.eval().encode(x).decode(), pact(x))
    pact.copy_bits(8, 2)
    assert pact.alpha.tolist() == [8, 4, 8]


def test_wrong_sets_of_bit_widths():
    for widths, message in (([], "at least one"), ([8, 8], "different"), ([9], "1 to 8"), ("8", "at least one")):
        for make in (
            lambda w: qk.PACT(8, per_bit=w),
            lambda w: qk.switch_batch_norms(network(), w),
            lambda w: SwitchableBatchNorm2d(3, w),
        ):
            with pytest.raises(ValueError, match=message):
                make(widths)
    with pytest.raises(ValueError, match=r"clipping levels for \[8, 2\] bits, not for 4"):
        qk.PACT(4, per_bit=[8, 2])


def test_copy_bits():
    model = adaptive()
    for bits in WIDTHS:
        qk.set_bits(model, bits)(torch.randn(4, 2, 6, 6))
    with torch.no_grad():
        model[3].activation_quantizer.alpha.copy_(torch.tensor([8.0, 4.0, 2.0]))
    qk.copy_bits(model, 4, 2)
    assert model[3].activation_quantizer.alpha.tolist() == [8, 4, 4]
    assert torch.equal(model[1].norms["2"].running_var, model[1].norms["4"].running_var)
    assert not torch.equal(model[1].norms["2"].running_var, model[1].norms["8"].running_var)
    with pytest.raises(ValueError, match="not for 5"):
        qk.copy_bits(model, 4, 5)
    with pytest.raises(ValueError, match="nothing that differs between bit-widths"):
        qk.copy_bits(qk.prepare(network(), weight=qk.MinMax(2)), 8, 4)


def test_state_dicts():
    """One of its own comes back whole, that of a float network is every bit-width's start."""
    model, other = adaptive(), adaptive()
    for bits in WIDTHS:
        qk.set_bits(model, bits)(torch.randn(4, 2, 6, 6))
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, 2, 6, 6)
    for bits in WIDTHS:
        assert torch.equal(qk.set_bits(model.eval(), bits)(x), qk.set_bits(other.eval(), bits)(x))
    plain = network()
    plain(torch.randn(9, 2, 6, 6))
    state = plain.state_dict()
    other.load_state_dict(state)
    assert list(state) == list(plain.state_dict())
    for norm in other[1].norms.values():
        assert torch.equal(norm.running_mean, plain[1].running_mean)


def test_switching_twice_and_copies():
    model = adaptive()
    assert qk.switch_batch_norms(model, [8]) is model
    assert model[1].widths == WIDTHS
    twin = copy.deepcopy(qk.set_bits(model, 2))
    assert precisions(twin) == precisions(model)
    assert isinstance(qk.switch_batch_norms(nn.BatchNorm2d(3), [4]), SwitchableBatchNorm2d)


def test_calibration_is_the_average_over_batches():
    model = qk.set_bits(adaptive(), 4)
    model.train()(torch.randn(6, 2, 6, 6))
    before = copy.deepcopy(model.state_dict())
    batches = [torch.randn(5, 2, 6, 6) + i for i in range(3)]
    calibrate_batch_norm(model, batches)
    with torch.no_grad():
        seen = [model[0].eval()(x) for x in batches]
    means = torch.stack([y.mean((0, 2, 3)) for y in seen]).mean(0)
    variances = torch.stack([y.var((0, 2, 3)) for y in seen]).mean(0)
    torch.testing.assert_close(model[1].current.running_mean, means)
    torch.testing.assert_close(model[1].current.running_var, variances)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {key.split(".")[0] for key in changed} == {"1", "4"}
    assert all(".norms.4." in key and ("running" in key or "num_batches" in key) for key in changed)
    assert model[4].training and model[1].current.momentum == 0.1 and model[1].norms["8"].training


def test_calibration_of_a_plain_network_and_without_batches():
    model = network().eval()
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate_batch_norm(model, [])
    before = model[1].running_mean.clone()
    calibrate_batch_norm(model, iter([torch.randn(5, 2, 6, 6)]))
    assert not torch.equal(model[1].running_mean, before)
    assert not any(m.training for m in model.modules())

"""HWGQ: levels, the clipped ReLU, bits that exist, a layer from training to disk."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import quantkernels as qk

STEPS = {2: 0.538, 3: 0.3217, 4: 0.185}


@pytest.mark.parametrize("bits", STEPS)
def test_levels_are_multiples_of_the_step(bits):
    step, top = STEPS[bits], 2**bits - 1
    x = torch.linspace(-1, 1.2 * top * step, 1001)
    quantizer = qk.HWGQ(bits)
    q = quantizer(x)
    torch.testing.assert_close(q, (x / step).round().clamp(0, top) * step)
    assert q.unique().numel() == top + 1
    assert torch.equal(quantizer.encode(x).decode(), q)


@pytest.mark.parametrize("bits", STEPS)
def test_the_gradient_is_a_clipped_relu(bits):
    top = (2**bits - 1) * STEPS[bits]
    x = torch.tensor([-1.0, -1e-6, 1e-6, 0.3, top * 0.999, top * 1.001, 50.0], requires_grad=True)
    g = torch.arange(1.0, 8.0)
    qk.HWGQ(bits)(x).backward(g)
    assert torch.equal(x.grad, g * ((x > 0) & (x <= top)))


def test_zero_itself_passes_the_gradient():
    x = torch.zeros(1, requires_grad=True)
    qk.HWGQ(2)(x).sum().backward()
    assert x.grad.item() == 1.0


@pytest.mark.parametrize("bits", [1, 5, 2.0, True, "2"])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=r"HWGQ: HWGQ has steps for \[2, 3, 4\] bits"):
        qk.HWGQ(bits)
    with pytest.raises(ValueError, match="set_bits: HWGQ"):
        qk.HWGQ(2).set_bits(bits)


def test_set_bits_is_a_new_quantizer():
    quantizer, x = qk.HWGQ(2), torch.randn(99)
    quantizer.set_bits(4)
    assert torch.equal(quantizer(x), qk.HWGQ(4)(x))
    assert quantizer.state_dict() == {}


def test_a_layer_from_training_to_disk(tmp_path):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    architecture = copy.deepcopy(model)
    model = qk.prepare(model, weight=qk.MinMax(2), activation=qk.HWGQ(2))
    x = torch.randn(2, 3, 6, 6)
    model(x).square().sum().backward()
    assert model[0].weight.grad.abs().sum() > 0
    expected = model.eval()(x)
    packed = qk.convert(model, fold=False)
    assert torch.equal(packed(x), expected)
    qk.save(packed, tmp_path / "hwgq.safetensors")
    assert torch.equal(qk.load(tmp_path / "hwgq.safetensors", architecture)(x), expected)

"""DiffQ's pseudo-noise: its range and gradients, true quantization in eval, what can be packed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import quantkernels as qk


def with_bits(*bits: float, min_bits: int = 2, max_bits: int = 15) -> qk.PseudoNoise:
    quantizer = qk.PseudoNoise(len(bits), min_bits=min_bits, max_bits=max_bits, start=(min_bits + max_bits) / 2)
    share = (torch.tensor(bits) - min_bits) / (max_bits - min_bits)
    with torch.no_grad():
        quantizer.logits.copy_(torch.logit(share))
    return quantizer


def test_bits_start_where_they_should():
    torch.testing.assert_close(qk.PseudoNoise(3).bit_widths(), torch.full((3,), 8.0))
    assert qk.PseudoNoise(min_bits=2, max_bits=8, start=5).bit_widths().item() == pytest.approx(5)


@pytest.mark.parametrize("bits", [(3.3,), (2.5, 7.0, 4.25)])
def test_the_noise_is_uniform_and_as_wide_as_a_step(bits):
    torch.manual_seed(0)
    quantizer, x = with_bits(*bits), torch.randn(3, 40_000)
    noise = quantizer(x).detach() - x
    extent = x.amax(1) - x.amin(1) if len(bits) > 1 else (x.max() - x.min()).expand(3)
    step = extent / (2 ** torch.tensor(bits) - 1)
    assert (noise.abs() <= step[:, None] / 2 * 1.001).all()
    torch.testing.assert_close(noise.std(1), step / 12**0.5, rtol=0.02, atol=0)
    assert (noise.mean(1).abs() < 4 * step / 12**0.5 / 200).all()


def test_gradients():
    quantizer, x = with_bits(3.0, 6.0).double(), torch.randn(2, 50, requires_grad=True)
    g, weights = torch.randn(2, 50), 100
    quantizer.seed = 5
    noise = (quantizer(x) - x).detach()
    quantizer(x).backward(g)
    assert torch.equal(x.grad, g)
    bits = quantizer.bit_widths().detach()
    slope = -(2**bits) * torch.log(torch.tensor(2.0)) / (2**bits - 1)  # of log(1 / (2^b - 1)) by b
    share = (bits - 2) / 13
    expected = (g * noise).sum(1) * slope * 13 * share * (1 - share)
    torch.testing.assert_close(quantizer.logits.grad, expected, rtol=1e-4, atol=1e-5)
    quantizer.logits.grad = None
    quantizer.size(weights).backward()
    torch.testing.assert_close(quantizer.logits.grad, 50 * 13 * share * (1 - share))


def test_a_seed_gives_the_noise():
    quantizer, x = qk.PseudoNoise(), torch.randn(100)
    quantizer.seed = 7
    first = quantizer(x)
    torch.manual_seed(3)
    assert torch.equal(quantizer(x), first)
    quantizer.seed = 8
    assert not torch.equal(quantizer(x), first)


@pytest.mark.parametrize("bits", [3.4, 8.4, 11.6, 14.9])
def test_eval_is_min_max_at_the_nearest_bits(bits):
    quantizer, x = with_bits(bits).eval(), torch.randn(5000)
    levels = 2 ** round(bits) - 1
    step = (x.max() - x.min()).double() / levels
    q = quantizer(x)
    assert quantizer.bits == round(bits)
    assert q.unique().numel() <= levels + 1
    assert (q - x).abs().max() <= step / 2 + 4 * 2**-23 * x.abs().max()  # a float32 rounding each of four operations
    if round(bits) <= 8:
        assert torch.equal(q, qk.MinMax(round(bits))(x))
        assert torch.equal(quantizer.encode(x).decode(), q)


def test_channels_have_bits_of_their_own():
    quantizer, x = with_bits(2.0001, 3.0, 5.2).eval(), torch.randn(3, 4, 5)
    q = quantizer(x)
    for i, bits in enumerate((2, 3, 5)):
        assert torch.equal(q[i], qk.MinMax(bits)(x[i]))
    assert quantizer.encode(x).bits == 5
    assert torch.equal(quantizer.encode(x).decode(), q)


def test_more_than_eight_bits_cannot_be_packed():
    model = qk.prepare(nn.Sequential(nn.Linear(6, 4)), weight=qk.PseudoNoise(start=12))
    assert model.eval()(torch.randn(2, 6)).isfinite().all()
    with pytest.raises(RuntimeError, match=r"learned 12 bits and codes have at most 8: train with max_bits=8"):
        qk.convert(model)


@pytest.mark.parametrize("groups", [1, 4])
def test_a_layer_from_training_to_packed(groups):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten())
    quantizer = qk.PseudoNoise(groups, start=5, max_bits=8)
    model = qk.prepare(model, weight=quantizer)
    x = torch.randn(3, 2, 6, 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x).square().mean() + model[0].weight_quantizer.size(72)).backward()
        optimizer.step()
    assert (model[0].weight_quantizer.bit_widths() < 5).all(), "size alone drives the bits down"
    other = copy.deepcopy(model)
    other[0].weight_quantizer.logits.data.zero_()
    other.eval().load_state_dict(model.state_dict())
    expected = model.eval()(x)
    assert torch.equal(other(x), expected)
    assert torch.equal(qk.convert(model)(x), expected)


def test_a_constant_weight():
    quantizer, x = qk.PseudoNoise(), torch.full((4, 3), 0.7)
    assert torch.equal(quantizer(x), x)
    assert torch.equal(quantizer.eval()(x), x)
    assert torch.equal(with_bits(12.0).eval()(x), x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_bits": 1}, "rising numbers from 2 to 15, got 1 and 15"),
        ({"max_bits": 16}, "rising numbers from 2 to 15, got 2 and 16"),
        ({"min_bits": 8, "max_bits": 8}, "rising numbers"),
        ({"max_bits": 8}, "start must be between 2 and 8, got 8"),
        ({"groups": 0}, "groups must be 1 or the number of output channels, got 0"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        qk.PseudoNoise(**options)


def test_wrong_use():
    with pytest.raises(ValueError, match="groups = 3 must be the size of dimension 0"):
        qk.PseudoNoise(3)(torch.randn(4, 2))
    with pytest.raises(ValueError, match="PseudoNoise is for weights"):
        qk.nn.QLinear(3, 4, activation=qk.PseudoNoise())

"""DoReFa, modified and centred: formulas, nested codes, gradients through tanh and the maximum, layers, sharing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import quantkernels as qk
from quantkernels.quantizers import dorefa
from quantkernels.quantizers.sharing import once

NESTED = [qk.ModifiedDoReFa, qk.CentredDoReFa]
WIDTHS = [(bits, highest) for highest in range(1, 9) for bits in range(1, highest + 1)]
EVERY = {
    "DoReFa": qk.DoReFa,
    "ModifiedDoReFa": lambda bits: qk.ModifiedDoReFa(bits, 8),
    "CentredDoReFa": lambda bits: qk.CentredDoReFa(bits, 8),
    "rescaled": lambda bits: qk.CentredDoReFa(bits, 8, rescale=True),
}


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    x = 0.4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x.view(-1)[:4] = torch.tensor([0.0, -0.0, 1e-9, -1e-9])
    return x


def unit(x: torch.Tensor) -> torch.Tensor:
    """t of the papers, in the float32 operations that the module is said to use."""
    tanh = torch.tanh(x)
    return (tanh / tanh.abs().max() + 1) / 2


def off_ties(x: torch.Tensor, levels: int) -> torch.Tensor:
    """Where N t is not within rounding errors of k + 1/2: there another order of operations may round another way."""
    return ((levels * unit(x).double()) % 1 - 0.5).abs() > 1e-4


@pytest.mark.parametrize("bits", range(2, 9))
def test_dorefa_is_the_formula(bits):
    x, levels = weights(40, 30), 2**bits - 1
    expected = 2 * torch.round(levels * unit(x).double()) / levels - 1
    clear = off_ties(x, levels)
    assert clear.float().mean() > 0.98
    torch.testing.assert_close(qk.DoReFa(bits)(x).double()[clear], expected[clear], rtol=1e-6, atol=1e-6)


def test_dorefa_with_one_bit_is_the_sign_times_the_mean_magnitude():
    x, g = weights(30, 7).requires_grad_(), torch.randn(30, 7)
    q = qk.DoReFa(1)(x)
    q.backward(g)
    torch.testing.assert_close(q.detach(), torch.where(x >= 0, 1.0, -1.0) * x.detach().abs().mean())
    assert torch.equal(x.grad, g)


@pytest.mark.parametrize(("bits", "highest"), WIDTHS)
def test_modified_dorefa_is_the_formula(bits, highest):
    x, top, dropped = weights(50, 40), 2**highest - 1, 2 ** (highest - bits)
    h = torch.round(top * unit(x)).double()
    low = torch.floor(h / dropped) * dropped
    expected = 2 * (low / top) * (h.mean() / low.mean()) - 1
    torch.testing.assert_close(qk.ModifiedDoReFa(bits, highest)(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bits", "highest"), WIDTHS)
def test_centred_dorefa_is_the_formula(bits, highest):
    x, count = weights(50, 40), 2**bits
    expected = 2 * (torch.floor(count * unit(x)).clamp(max=count - 1) + 0.5) / count - 1
    torch.testing.assert_close(qk.CentredDoReFa(bits, highest)(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
def test_modified_is_dorefa_at_its_highest_bits(bits):
    x = weights(50, 40)
    clear = off_ties(x, 2**bits - 1)
    modified, plain = (quantizer.encode(x).codes() for quantizer in (qk.ModifiedDoReFa(bits, bits), qk.DoReFa(bits)))
    assert torch.equal(modified[clear], plain[clear])
    torch.testing.assert_close(qk.ModifiedDoReFa(bits, bits).grid(x), qk.DoReFa(bits).grid(x))


@pytest.mark.parametrize("kind", NESTED)
@pytest.mark.parametrize("highest", range(1, 9))
def test_the_first_planes_are_the_code_with_fewer_bits(kind, highest):
    """Also at the thresholds themselves: weights whose t is k / 2^n, or near it."""
    edges = torch.atanh(torch.linspace(-0.999, 0.999, 1025))
    for x in (weights(60, 50), edges, torch.cat((edges, torch.tensor([30.0, -30.0]))), -weights(9).abs()):
        planes = kind(highest, highest).encode(x).planes
        for bits in range(1, highest + 1):
            assert torch.equal(kind(bits, highest).encode(x).planes, planes[:bits])


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decode_of_encode_is_forward(name, dtype):
    for bits in range(1, 9):
        quantizer = EVERY[name](bits)
        for x in (weights(6, 5, 3, 3), weights(33), torch.zeros(5, 2), torch.full((3, 3), -0.2), torch.empty(0, 4)):
            x = x.to(dtype)
            q = quantizer(x)
            assert q.dtype == dtype and q.isfinite().all()
            assert torch.equal(quantizer.encode(x).decode(), q)


def reference_gradient(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    x = x.detach().double().requires_grad_()
    tanh = torch.tanh(x)
    (tanh / tanh.abs().max()).backward(g.double())
    return x.grad


@pytest.mark.parametrize("name", ["DoReFa", "ModifiedDoReFa", "CentredDoReFa"])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_the_gradient_goes_through_tanh_and_the_maximum(name, bits):
    x, g = weights(20, 30).requires_grad_(), torch.randn(20, 30)
    EVERY[name](bits)(x).backward(g)
    torch.testing.assert_close(x.grad.double(), reference_gradient(x, g), rtol=1e-4, atol=1e-5)


def test_the_gradient_of_the_maximum_is_shared_by_all_that_have_it():
    x = torch.tensor([0.5, -0.5, 0.5, 0.1], requires_grad=True)
    g = torch.tensor([1.0, 2.0, -3.0, 4.0])
    qk.DoReFa(2)(x).backward(g)
    tanh = torch.tanh(x.detach().double()).requires_grad_()
    (tanh / tanh.abs().amax()).backward(g.double())
    torch.testing.assert_close(x.grad.double(), tanh.grad * (1 - tanh.detach() ** 2), rtol=1e-5, atol=1e-6)


def test_rescaled_weights_have_variance_one_over_the_number_of_outputs():
    x, g = weights(10, 400).requires_grad_(), torch.randn(10, 400)
    for kind in NESTED:
        for bits in (1, 2, 4, 8):
            plain, rescaled = kind(bits, 8)(x), kind(bits, 8, rescale=True)(x)
            torch.testing.assert_close(rescaled.var(correction=0), torch.tensor(0.1))
            gain = (10 * plain.var(correction=0)).rsqrt().detach()
            torch.testing.assert_close(rescaled, plain * gain)
            one, other = (torch.autograd.grad(q, x, g)[0] for q in (plain, rescaled))
            torch.testing.assert_close(other, one * gain)


@pytest.mark.parametrize("name", EVERY)
def test_set_bits_is_another_quantizer(name):
    x, quantizer = weights(20, 20), EVERY[name](8)
    for bits in (1, 3, 8, 2):
        quantizer.set_bits(bits)
        assert torch.equal(quantizer(x), EVERY[name](bits)(x))


def test_errors():
    for kind in (qk.DoReFa, *NESTED):
        for bits in (0, 9, 2.0, True):
            with pytest.raises(ValueError, match="bits must be an int from 1 to 8"):
                kind(bits)
    with pytest.raises(ValueError, match=r"ModifiedDoReFa\(highest=4\) cannot have 5 bits"):
        qk.ModifiedDoReFa(4, 4).set_bits(5)
    with pytest.raises(ValueError, match=r"highest=\.\.\.\): bits must be an int from 1 to 8, got 9"):
        qk.CentredDoReFa(2, 9)
    for mixture in (qk.Attention, qk.BinaryRelax):
        with pytest.raises(ValueError, match="one and the same tensor, got DoReFa"):
            mixture([qk.DoReFa(2)])
    with pytest.raises(ValueError, match="must give codes of its input itself, got ModifiedDoReFa"):
        qk.nn.QLinear(4, 3, activation=qk.ModifiedDoReFa(2))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packed_logits_are_those_of_eval(name, bits, tmp_path):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 9, 3, padding=1), nn.ReLU(), nn.Conv2d(9, 4, 3, groups=1), nn.Flatten())
    architecture = copy.deepcopy(model)
    x = torch.randn(2, 3, 6, 6)
    for activation in (qk.PACT(4, alpha=2.0), None):
        trained = qk.prepare(copy.deepcopy(model), weight=EVERY[name](bits), activation=activation)
        trained(x).square().mean().backward()
        expected = trained.eval()(x)
        packed = qk.convert(trained, fold=False)
        assert torch.equal(packed(x), expected)
        qk.save(packed, tmp_path / "net.safetensors")
        assert torch.equal(qk.load(tmp_path / "net.safetensors", architecture)(x), expected)


def test_statistics_are_computed_once_inside_and_never_outlive_a_change(monkeypatch):
    calls = []
    original = torch.tanh
    monkeypatch.setattr(dorefa.torch, "tanh", lambda x: calls.append(1) or original(x))
    weight = nn.Parameter(weights(20, 20))
    quantizer = qk.ModifiedDoReFa(8)

    def sweep() -> torch.Tensor:
        total = 0
        for bits in (8, 4, 2, 8):
            quantizer.set_bits(bits)
            total = total + quantizer(weight).square().sum()
        return total

    sweep().backward()
    expected, weight.grad = weight.grad, None
    assert len(calls) == 4
    with qk.shared_statistics():
        loss = sweep()
        assert len(calls) == 5
        loss.backward()
        assert torch.equal(weight.grad, expected)
        with torch.no_grad():
            weight.mul_(2)
        changed = quantizer(weight)
        assert len(calls) == 6
        with qk.shared_statistics():  # what is inside another adds to it
            sweep()
        assert len(calls) == 6
    assert torch.equal(changed, quantizer(weight))
    assert len(calls) == 7


def test_each_forward_that_shares_has_a_backward_of_its_own():
    weight = nn.Parameter(weights(20, 20))
    quantizer = qk.CentredDoReFa(4)
    with qk.shared_statistics():
        one, other = quantizer(weight).sum(), quantizer(weight).square().sum()
        one.backward()
        third = quantizer(weight).sum()
        other.backward()
        third.backward()
    assert weight.grad.isfinite().all()


def test_minmax_of_a_weight_is_shared_and_of_an_activation_not():
    weight, x = nn.Parameter(weights(5, 5)), torch.randn(5, 5)
    with qk.shared_statistics():
        stats = qk.MinMax(2).statistics(weight)
        assert qk.MinMax(4).statistics(weight) is stats
        assert qk.MinMax(2).statistics(x) is not qk.MinMax(2).statistics(x)
        assert once(weight, ("channel_stats", None), lambda: None) is stats

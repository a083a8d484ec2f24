"""LearnedBasis: QEM in closed form, its running average, the modes of a layer, and packed products."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import quantkernels as qk
from quantkernels import reference
from quantkernels.nn import QConv2d
from quantkernels.quantizers.learned_basis import RIDGE, fitted_basis


def error(quantizer: qk.LearnedBasis, x: torch.Tensor) -> float:
    return float((quantizer.eval()(x) - x).square().sum())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_fitted_basis_is_the_closed_form(bits, signed):
    torch.manual_seed(bits)
    x = torch.randn(5, 4000) if signed else torch.randn(5, 4000).relu()
    quantizer = qk.LearnedBasis(bits, signed, axis=0)
    quantizer.bind(x)
    before = quantizer.basis.clone()
    quantizer(x)
    _, gram, product = reference.learned_basis_quantize(x, before, quantizer.encoding, axis=0)
    expected = reference.qem_basis(gram, product, before, RIDGE)
    # The first running mean, divided by 1 - 0.9, is the first basis that was fitted.
    torch.testing.assert_close(quantizer.upcoming, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_alternation_decreases_the_quantization_error(bits, signed):
    torch.manual_seed(0)
    x = torch.randn(3, 3000) * torch.tensor([[0.2], [1.0], [7.0]])
    quantizer = qk.LearnedBasis(bits, signed, axis=0)
    quantizer.bind(x)
    x = x if signed else x.abs()
    errors = []
    for _ in range(8):
        errors.append(error(quantizer, x))
        _, gram, product = qk.ops.learned_basis_quantize(x, quantizer.basis, quantizer.encoding, axis=0)
        quantizer.basis.copy_(fitted_basis(gram, product, quantizer.basis))
    assert errors[-1] < 0.7 * errors[0]
    for before, after in itertools.pairwise(errors):
        assert after <= before * (1 + 1e-5)  # the ridge of 1e-4 and float32 are all that is between


def test_one_bit_learns_the_mean_magnitude():
    x = torch.randn(2000)
    quantizer = qk.LearnedBasis(1)
    quantizer(x)
    assert quantizer.upcoming.item() == pytest.approx(x.abs().mean().item(), rel=1e-5)


def test_a_digit_that_never_changes_keeps_its_value():
    quantizer = qk.LearnedBasis(2, signed=False)
    x = torch.full((50,), 0.01)  # all have code 0, so B is zero
    quantizer(x)
    torch.testing.assert_close(quantizer.upcoming, quantizer.basis)


def test_running_average_is_debiased():
    torch.manual_seed(1)
    quantizer, mean = qk.LearnedBasis(2), torch.zeros(1, 2, dtype=torch.float64)
    for t in range(1, 7):
        x = torch.randn(500) * t
        basis = quantizer.upcoming.clone() if t > 1 else None
        quantizer(x)
        if basis is not None:
            assert torch.equal(quantizer.basis, basis)
        _, gram, product = reference.learned_basis_quantize(x, quantizer.basis, 0)
        mean = 0.9 * mean + 0.1 * reference.qem_basis(gram, product, quantizer.basis, RIDGE).double()
        torch.testing.assert_close(quantizer.upcoming, (mean / (1 - 0.9**t)).float(), rtol=1e-5, atol=1e-6)
    assert quantizer.batches.item() == 6


def test_first_basis():
    weight = torch.empty(8, 5, 3, 3)
    quantizer = qk.LearnedBasis(2, axis=0)
    quantizer.bind(weight)
    v = 0.6745 * (2 / (3 * 3 * 8)) ** 0.5 / 2
    torch.testing.assert_close(quantizer.basis, torch.tensor([[v, 2 * v]]).expand(8, 2))
    activation = qk.LearnedBasis(3).track()
    activation.bind(weight)
    torch.testing.assert_close(activation.basis, 1.349 / 7 * torch.tensor([[1.0, 2.0, 4.0]]))


def test_the_layer_decides_the_digits():
    layer = QConv2d(3, 4, 3, weight=qk.LearnedBasis(2, axis=0), activation=qk.LearnedBasis(2))
    assert layer.weight_quantizer.signed and not layer.activation_quantizer.signed
    assert layer.weight_quantizer.basis.shape == (4, 2)
    signed = QConv2d(3, 4, 3, activation=qk.LearnedBasis(2, signed=True))
    assert signed.activation_quantizer.signed


def test_gradients():
    x = torch.tensor([-0.5, 0.1, 0.9, 5.0], requires_grad=True)
    activation = qk.LearnedBasis(2).track()
    activation(x).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 1.0, 0.0]
    x.grad = None
    qk.LearnedBasis(2)(x).sum().backward()
    assert x.grad.tolist() == [1.0] * 4


def test_eval_changes_nothing_and_an_empty_batch_neither():
    quantizer = qk.LearnedBasis(2)
    quantizer(torch.randn(100))
    before = copy.deepcopy(quantizer.state_dict())
    quantizer(torch.empty(0))
    quantizer.eval()(torch.randn(100))
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_uses_the_same_basis_and_fits_once(reentrant):
    torch.manual_seed(2)
    plain, checked = (qk.LearnedBasis(2).track() for _ in range(2))
    for _ in range(3):
        x = torch.randn(400).relu()
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        plain(mine * 2).square().sum().backward()
        checkpoint(lambda t: checked(t * 2).square(), theirs, use_reentrant=reentrant).sum().backward()
        assert torch.equal(mine.grad, theirs.grad)
    for a, b in zip(plain.buffers(), checked.buffers(), strict=True):
        assert torch.equal(a, b)


def test_codes_in_training_are_those_of_the_forward():
    quantizer = qk.LearnedBasis(3, axis=0)
    for _ in range(3):
        x = torch.randn(4, 6, 3, 3)
        q = quantizer(x)
        assert torch.equal(quantizer.encode(x).decode(), q)


def test_a_state_dict_brings_its_channels():
    trained = qk.LearnedBasis(2, axis=0)
    trained(torch.randn(5, 30))
    loaded = qk.LearnedBasis(2, axis=0)
    loaded.load_state_dict(trained.state_dict())
    x = torch.randn(5, 30)
    assert torch.equal(loaded(x), trained(x))
    with pytest.raises(ValueError, match="x must have 5 channels, got 4"):
        loaded(x[:4])


def test_it_cannot_join_a_mixture_or_change_its_bits():
    with pytest.raises(TypeError, match="equal steps or thresholds, got LearnedBasis"):
        qk.Attention([qk.LearnedBasis(2), qk.MinMax(4)])
    with pytest.raises(ValueError, match="has 2 bits and cannot have 3"):
        qk.LearnedBasis(2).set_bits(3)
    with pytest.raises(ValueError, match="bits must be an int from 1 to 8, got 9"):
        qk.LearnedBasis(9)


def small_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Flatten(), nn.Linear(12 * 16, 10),
    )  # fmt: skip


@pytest.mark.parametrize(
    "weight, activation",
    [
        (qk.LearnedBasis(1, axis=0), qk.LearnedBasis(2)),
        (qk.LearnedBasis(3, axis=0), qk.LearnedBasis(3)),
        (qk.LearnedBasis(2), qk.HWGQ(2)),
        (qk.TWN(), qk.LearnedBasis(4)),
        (qk.LearnedBasis(2, axis=0), None),
        (None, qk.LearnedBasis(2)),
    ],
    ids=["1-2", "3-3", "2-hwgq", "twn-4", "2-float", "float-2"],
)
def test_a_packed_network_gives_the_same_bits(weight, activation, tmp_path):
    torch.manual_seed(3)
    network = qk.prepare(small_network(), weight=weight, activation=activation)
    for _ in range(3):
        network(torch.randn(4, 3, 8, 8).relu()).sum().backward()
    network.eval()
    x = torch.randn(4, 3, 8, 8).relu()
    packed = qk.convert(network, fold=False)
    assert torch.equal(packed(x), network(x))
    folded = qk.convert(network)
    torch.testing.assert_close(folded(x), network(x))
    qk.save(folded, tmp_path / "net.safetensors")
    assert torch.equal(qk.load(tmp_path / "net.safetensors", small_network())(x), folded(x))


def test_training_on_codes_agrees_with_training_on_values():
    torch.manual_seed(4)
    values = QConv2d(4, 6, 3, padding=1, weight=qk.LearnedBasis(2, axis=0), activation=qk.LearnedBasis(2))
    codes = copy.deepcopy(values)
    codes.exact = True
    for _ in range(3):
        x = torch.randn(2, 4, 7, 7).relu()
        torch.testing.assert_close(codes(x), values(x), rtol=1e-5, atol=1e-5)

"""LSQ: formula, gradients, first step, positivity, roles, a layer from training to disk."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import quantkernels as qk
from quantkernels import reference

CASES = [(bits, signed) for bits in range(1, 9) for signed in (True, False) if bits > 1 or not signed]


def ends(bits: int, signed: bool) -> tuple[int, int]:
    return (2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def with_step(bits: int, signed: bool, step: float) -> qk.LSQ:
    quantizer = qk.LSQ(bits, signed)
    quantizer.load_state_dict({"step": torch.tensor([step])})
    return quantizer


@pytest.mark.parametrize(("bits", "signed"), CASES)
def test_formula_with_ties(bits, signed):
    low, high = ends(bits, signed)
    x = torch.arange(-2.0 * low - 3, 2.0 * high + 3, 0.25) * 0.5  # the step is a power of two: ties are ties
    quantizer = with_step(bits, signed, 0.5)
    expected = 0.5 * (x / 0.5).round().clamp(-low, high)
    assert torch.equal(quantizer(x), expected)
    assert torch.equal(quantizer.encode(x).decode(), expected)


@pytest.mark.parametrize(("bits", "signed"), CASES)
def test_gradients_are_the_papers(bits, signed):
    torch.manual_seed(2)
    low, high = ends(bits, signed)
    step = 0.37
    x = (torch.randn(3000) * high * step).requires_grad_()
    g = torch.randn(3000)
    quantizer = with_step(bits, signed, step)
    quantizer(x).backward(g)
    v = x.detach().double() / step
    inside = (v > -low) & (v < high)
    slope = torch.where(inside, v.round() - v, v.clamp(-low, high))
    expected = (g * slope).sum() / (x.numel() * high) ** 0.5
    torch.testing.assert_close(x.grad, g * inside)
    torch.testing.assert_close(quantizer.step.grad.double(), expected[None], rtol=1e-4, atol=1e-4)


def test_gradients_at_the_ends():
    x = torch.tensor([-3.0, -2.0, 1.0, 5.0], requires_grad=True)
    quantizer = with_step(2, True, 1.0)
    quantizer(x).backward(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    assert x.grad.tolist() == [0, 10, 100, 0]
    assert quantizer.step.grad.item() == pytest.approx((-2 * 1 + 0 * 10 + 100 + 1000) / 4**0.5)


@pytest.mark.parametrize("signed", [True, False])
def test_gradient_against_the_reference(signed):
    torch.manual_seed(3)
    x, g = torch.randn(500), torch.randn(500)
    quantizer = with_step(3, signed, 0.21)
    quantizer(x).backward(g)
    grid = quantizer.grid(x).detach().requires_grad_()
    reference.differentiable_fake_quantize(x, grid, quantizer.kind, quantizer.levels, quantizer.ste, None).backward(g)
    low, high = ends(3, signed)
    expected = (grid.grad[0, 1] - low * grid.grad[0, 0]) / (500 * high) ** 0.5
    torch.testing.assert_close(quantizer.step.grad, expected[None], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "signed"), CASES)
def test_the_first_training_batch_sets_the_step(bits, signed):
    quantizer = qk.LSQ(bits, signed)
    quantizer(torch.empty(0))
    assert quantizer.step.isnan().all()
    x = torch.randn(64)
    quantizer(x)
    expected = 2 * x.abs().mean() / ends(bits, signed)[1] ** 0.5
    torch.testing.assert_close(quantizer.step.detach(), expected[None])
    quantizer(100 * x)
    torch.testing.assert_close(quantizer.step.detach(), expected[None])


def test_without_a_step_eval_and_encode_say_what_to_do():
    for use in (lambda q: q.eval()(torch.randn(4)), lambda q: q.encode(torch.randn(4))):
        with pytest.raises(RuntimeError, match="run at least one forward in training mode"):
            use(qk.LSQ(2))


def test_the_state_dict_says_whether_there_is_a_step():
    trained, fresh, x = qk.LSQ(3), qk.LSQ(3), torch.randn(50)
    trained(x)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.eval()(x), trained.eval()(x))
    fresh.load_state_dict(qk.LSQ(3).state_dict())
    with pytest.raises(RuntimeError, match="has none yet"):
        fresh(x)


def test_the_step_stays_positive():
    quantizer, x = with_step(2, True, 1.0), torch.randn(100)
    with torch.no_grad():
        quantizer.step.fill_(-3.0)
    assert not quantizer.eval()(x).isnan().any()
    assert quantizer.step.item() == -3.0  # eval writes nothing
    quantizer.train()(x).sum().backward()
    assert quantizer.step.item() == pytest.approx(1e-5)
    assert quantizer.step.grad.item() != 0, "the gradient must stay alive at the floor"


def test_training_and_eval_have_the_same_grid():
    quantizer, x = with_step(3, True, 0.123), torch.randn(50)
    assert torch.equal(quantizer.grid(x), quantizer.eval().grid(x))


def test_the_role_decides_the_sign_unless_told():
    layer = qk.nn.QLinear(4, 3, weight=qk.LSQ(4), activation=qk.LSQ(4))
    assert layer.weight_quantizer.signed and not layer.activation_quantizer.signed
    layer = qk.nn.QLinear(4, 3, weight=qk.LSQ(4), activation=qk.LSQ(4, signed=True))
    assert layer.activation_quantizer.signed


def test_errors():
    for bits in (0, 9, 2.0, True):
        with pytest.raises(ValueError, match="LSQ: bits must be an int"):
            qk.LSQ(bits)
    for make in (lambda: qk.LSQ(1), lambda: qk.LSQ(3, signed=True).set_bits(1)):
        with pytest.raises(ValueError, match="signed LSQ needs at least 2 bits"):
            make()


@pytest.mark.parametrize("signed", [True, False])
def test_a_step_for_each_bit_width(signed):
    """Each bit-width computes what a quantizer of that width alone does, and only its own step gets a gradient."""
    widths, steps = [6, 5, 4, 3, 2], torch.tensor([0.05, 0.1, 0.2, 0.4, 0.8])
    many, x = qk.LSQ(6, signed, per_bit=widths), torch.randn(300)
    many.set_step(steps)
    for i in torch.randperm(len(widths)).tolist():
        many.set_bits(widths[i])
        many.step.grad = None
        one, expected = with_step(widths[i], signed, steps[i].item()), torch.zeros(5)
        assert torch.equal(many(x), one(x))
        assert torch.equal(many.encode(x).decode(), one(x))
        g = torch.randn(300)
        many(x).backward(g)
        one(x).backward(g)
        expected[i] = one.step.grad
        assert torch.equal(many.step.grad, expected)
    assert torch.equal(many.step.detach(), steps), "changing the bits must leave the steps alone"


def test_the_first_batch_sets_all_steps():
    layer, x = (
        qk.nn.QLinear(8, 3, weight=qk.LSQ(4, per_bit=[4, 2]), activation=qk.LSQ(2, per_bit=[4, 2])),
        torch.rand(5, 8),
    )
    layer(x)
    for quantizer, value, high in (
        (layer.weight_quantizer, layer.weight, (7, 1)),
        (layer.activation_quantizer, x, (15, 3)),
    ):
        expected = torch.stack([2 * value.abs().mean() / q**0.5 for q in high])
        torch.testing.assert_close(quantizer.step, expected, check_stride=False)
    other = copy.deepcopy(layer)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.eval()(x), layer.eval()(x))
    assert "per_bit=[4, 2]" in repr(layer)


def test_set_bits_changes_every_layer_with_steps_of_its_own():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    qk.prepare(model, weight=qk.LSQ(4, per_bit=[4, 3, 2]), activation=qk.LSQ(4, per_bit=[4, 3, 2]))
    qk.set_bits(model, {"0": (2, 3)})
    assert [(m.weight_quantizer.bits, m.activation_quantizer.bits) for m in model] == [(2, 3), (4, 4)]
    with pytest.raises(ValueError, match=r"LSQ has steps for \[4, 3, 2\] bits, not for 5"):
        qk.set_bits(model, 5)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ([], "per_bit: bit-widths must be a list of at least one"),
        ([4, 4], "per_bit: bit-widths must be different"),
        ([4, 9], "bits must be an int from 1 to 8, got 9"),
        ([4, 1], "signed LSQ needs at least 2 bits"),
        ([3, 2], r"LSQ has steps for \[3, 2\] bits, not for 4"),
    ],
)
def test_wrong_sets_of_bits(widths, message):
    with pytest.raises(ValueError, match=message):
        qk.LSQ(4, per_bit=widths)


def test_wrong_steps():
    with pytest.raises(ValueError, match=r"step must have shape \[2\], got \[3\]"):
        qk.LSQ(4, per_bit=[4, 2]).set_step(torch.ones(3))


@pytest.mark.parametrize("signed", [True, False])
def test_set_bits_keeps_the_width(signed):
    quantizer = with_step(8, signed, 0.1)
    quantizer.set_bits(2)
    assert quantizer.step.item() * 3 == pytest.approx(0.1 * 255)
    low = ends(2, signed)[0]
    assert quantizer.grid(torch.ones(1))[0, 0].item() == pytest.approx(-low * 8.5)


def test_a_mixture_of_steps():
    mixture, x = qk.Attention([qk.LSQ(2), qk.LSQ(4)]), torch.randn(50)
    mixture(x).sum().backward()
    assert all(q.step.grad is not None and q.step.grad.isfinite().all() for q in mixture.members)


def test_a_layer_from_training_to_disk(tmp_path):
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3))
    architecture = copy.deepcopy(model)
    model = qk.prepare(model, weight=qk.LSQ(3), activation=qk.LSQ(3))
    with pytest.raises(RuntimeError, match="has none yet"):
        qk.convert(model)
    x = torch.randn(2, 3, 6, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    other = qk.prepare(copy.deepcopy(architecture), weight=qk.LSQ(3), activation=qk.LSQ(3))
    other.load_state_dict(model.state_dict())
    expected = model.eval()(x)
    assert torch.equal(other.eval()(x), expected)
    packed = qk.convert(model)
    assert torch.equal(packed(x), expected)
    qk.save(packed, tmp_path / "lsq.safetensors")
    assert torch.equal(qk.load(tmp_path / "lsq.safetensors", architecture)(x), expected)


def test_the_gradient_of_an_activation_is_scaled_by_the_batch_of_all_processes(monkeypatch):
    """Of which each process has a part; the weight, and so its scale, is the same on all."""
    layer, x = qk.nn.QLinear(8, 3, weight=qk.LSQ(4), activation=qk.LSQ(4)), torch.rand(5, 8)
    gradients = []
    for _ in range(2):
        layer.zero_grad()
        layer(x).sum().backward()
        monkeypatch.setattr("quantkernels.quantizers.lsq.process_count", lambda: 4)
        gradients.append([q.step.grad.clone() for q in (layer.activation_quantizer, layer.weight_quantizer)])
    assert gradients[1][0].item() == pytest.approx(gradients[0][0].item() / 2)
    assert torch.equal(gradients[1][1], gradients[0][1])

"""Gradients of every quantizer against the reference's autograd."""

from __future__ import annotations

import pytest
import torch

import quantkernels as qk
from quantkernels import reference

QUANTIZERS = [
    qk.MinMax(2),
    qk.MinMax(4, axis=0),
    qk.MinMax(3, axis=1),
    qk.SAWB(2),
    qk.SAWB(3, axis=0),
    qk.SAWB(8, ste="identity"),
    qk.BWN(axis=0),
    qk.TWN(),
    qk.PACT(2, alpha=1.0),
    qk.PACT(3, alpha=0.7, plus=True),
]


def sample(layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(6)
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.randn(4, 3, 5, 6).to(memory_format=memory)
    return x, torch.randn_like(x)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_forward_and_gradients(quantizer, layout):
    x, g = sample(layout)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    quantizer.zero_grad()
    q = quantizer(mine)
    q.backward(g)
    grid = quantizer.grid(x).detach().requires_grad_()
    arguments = (quantizer.kind, quantizer.levels, quantizer.ste, quantizer.axis)
    expected = reference.differentiable_fake_quantize(theirs, grid, *arguments)
    expected.backward(g)
    assert q.stride() == x.stride()
    assert torch.equal(q, expected)
    # Of offset + step*round((x - offset)/step) autograd multiplies by step and by 1/step: the same but for rounding.
    tolerance = 1e-6 if quantizer.ste == qk.ops.Ste.FULL else 0.0
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=tolerance, atol=0.0)
    if isinstance(quantizer, qk.PACT):
        alpha = grid.grad[0, 1] / quantizer.levels
        torch.testing.assert_close(quantizer.alpha.grad, alpha[None], rtol=1e-5, atol=1e-5)


def test_pact_alpha_gradient_is_the_sum_above():
    x = torch.tensor([-1.0, 0.5, 0.99, 1.0, 1.5, 30.0], requires_grad=True)
    g = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    pact = qk.PACT(2, alpha=1.0)
    pact(x).backward(g)
    assert pact.alpha.grad.item() == 8 + 16 + 32
    assert x.grad.tolist() == [0, 2, 4, 8, 0, 0]


def test_pact_plus_adds_the_rounding_error_inside():
    x = torch.tensor([0.2, 0.5, 2.0])
    plus = qk.PACT(2, alpha=1.0, plus=True)
    q = plus(x)
    q.sum().backward()
    expected = 1.0 + ((q.detach() - x) / 1.0)[:2].sum()
    torch.testing.assert_close(plus.alpha.grad, expected[None])


def test_pact_survives_a_huge_negative_step():
    pact = qk.PACT(2, alpha=1.0)
    optimizer = torch.optim.SGD(pact.parameters(), lr=1e6)
    x = torch.linspace(-1, 4, 100)
    pact(x).sum().backward()
    optimizer.step()
    assert pact.alpha.item() < 0
    pact.eval()
    assert (pact(x) >= 0).all() and pact(x).max() > 0  # eval clamps what it reads ...
    assert pact.alpha.item() < 0  # ... and writes nothing
    pact.train()
    optimizer.zero_grad()
    pact(x).sum().backward()
    assert pact.alpha.item() > 0
    assert pact.alpha.grad.item() > 0, "the gradient must stay alive at the floor"


def test_straight_through_of_half_types():
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(50, dtype=dtype, requires_grad=True)
        g = torch.randn(50, dtype=dtype)
        q = qk.MinMax(3)(x)
        assert q.dtype == dtype
        q.backward(g)
        assert torch.equal(x.grad, g)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_half_types_are_float32_arithmetic_rounded_once(quantizer, dtype):
    x = sample("contiguous")[0].to(dtype)
    q = quantizer(x)
    grid = quantizer.grid(x)
    exact = reference.fake_quantize(x.float(), grid.detach(), quantizer.kind, quantizer.levels, 0, quantizer.axis)
    assert grid.dtype == torch.float32
    assert torch.equal(q, exact.to(dtype))

"""minmax_mixture, against the same made of its parts."""

from __future__ import annotations

import importlib

import pytest
import torch

import quantkernels as qk
from quantkernels import ops
from quantkernels.testing import assert_bit_equal, lay_out

pytestmark = pytest.mark.ops("minmax_grids", "attention_quantize", "attention_gradient", "minmax_attention_quantize")
LEVELS = [3, 15, 255]
MEMBERS = [0, 0, 0], LEVELS, [0, 0, 0]


def from_parts(x, logits, temperature, axis):
    weights = torch.softmax(logits / temperature, 0)
    grids = ops.minmax_grids(x.detach(), LEVELS, axis)
    return ops.attention_quantize(x, weights, grids, *MEMBERS, axis, convex=True), weights, grids


def inputs(device, dtype=torch.float32, layout="contiguous"):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(3, 8, 5, 6, generator=generator).to(dtype) for _ in range(2))
    logits, temperature = torch.tensor([0.3, -1.0, 0.8]), torch.tensor(1.7)
    leaves = [lay_out(x, layout).to(device).requires_grad_(), logits.to(device).requires_grad_()]
    return leaves, temperature.to(device), lay_out(grad, layout).to(device)


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_equals_its_parts(backend, axis, dtype, layout):
    leaves, temperature, grad = inputs(backend.device, dtype, layout)
    with backend.chosen():
        found, expected = ops.minmax_mixture(*leaves, temperature, LEVELS, axis), from_parts(*leaves, temperature, axis)
        for one, other in zip(found, expected, strict=True):
            assert_bit_equal(one, other)
        assert not found[1].requires_grad and not found[2].requires_grad
        grads = [torch.autograd.grad(q[0], leaves, grad) for q in (found, expected)]
    assert_bit_equal(grads[0][0], grad)
    torch.testing.assert_close(*(g[1] for g in grads), rtol=1e-5, atol=1e-6)


def test_only_what_is_asked_for_gets_a_gradient(backend):
    leaves, temperature, grad = inputs(backend.device)
    for wanted in ((True, False), (False, True)):
        x, logits = (leaf.detach().requires_grad_(want) for leaf, want in zip(leaves, wanted, strict=True))
        with backend.chosen():
            q = ops.minmax_mixture(x, logits, temperature, LEVELS)[0]
        q.backward(grad)
        assert (x.grad is not None, logits.grad is not None) == wanted
    with backend.chosen(), torch.no_grad():
        assert not ops.minmax_mixture(*leaves, temperature, LEVELS)[0].requires_grad


def test_gradient_of_the_logits_is_the_derivative(backend):
    """By differences: with x fixed q is smooth in the logits."""
    (x, logits), temperature, grad = inputs(backend.device)
    with backend.chosen():
        q = ops.minmax_mixture(x, logits, temperature, LEVELS, 1)[0]
        (slope,) = torch.autograd.grad(q, logits, grad)
        for k in range(3):
            step = torch.zeros(3, device=x.device)
            step[k] = 2.0**-6
            ends = [
                ops.minmax_mixture(x.detach(), logits.detach() + s, temperature, LEVELS, 1)[0] for s in (step, -step)
            ]
            difference = ((ends[0] - ends[1]).double() * grad.double()).sum() / 2.0**-5
            assert float(difference) == pytest.approx(float(slope[k]), rel=0.02, abs=1e-3)


def test_a_backward_runs_where_its_forward_ran(monkeypatch):
    """Choosing another backend in between changes nothing."""
    module = importlib.import_module("quantkernels.ops.minmax_mixture")
    seen = []
    kept = module.kernel
    monkeypatch.setattr(module, "kernel", lambda op, namespace: seen.append(namespace) or kept(op, namespace))
    leaves, temperature, grad = inputs("cpu")
    q = ops.minmax_mixture(*leaves, temperature, LEVELS)[0]
    monkeypatch.setattr("quantkernels.ops._dispatch._current", "triton")
    q.backward(grad)
    assert seen == ["quantkernels"] * 2


def test_compiles_whole():
    leaves, _, grad = inputs("cpu")
    quantizer = qk.Attention([qk.MinMax(n) for n in (2, 4, 8)], temperature=1.7)
    quantizer.logits.data.copy_(leaves[1].detach())
    eager_grads = torch.autograd.grad(quantizer(leaves[0]), (leaves[0], quantizer.logits), grad)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(compiled(leaves[0]), (leaves[0], quantizer.logits), grad)
    for one, other in zip(eager_grads, grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_complaints():
    leaves, temperature, _ = inputs("cpu")
    with pytest.raises(RuntimeError, match=r"^minmax_grids: levels must be 2\^n - 1 with n from 1 to 8 .*, got 4"):
        ops.minmax_mixture(*leaves, temperature, [3, 4, 15])
    with pytest.raises(RuntimeError, match=r"attention must be of shape \[2\], got \[3\]"):
        ops.minmax_mixture(*leaves, temperature, [3, 15])

"""What a layer keeps for its backward: gradients do not change, and no quantized input is kept."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import quantkernels as qk
from quantkernels.nn import QConv2d, QLinear, layer

ACTIVATIONS = [
    qk.PACT(2, alpha=1.5),
    qk.MinMax(3),
    qk.LSQ(2),
    qk.HWGQ(2),
    qk.LearnedBasis(2),
    qk.Attention([qk.PACT(2), qk.PACT(4)]),
    qk.BinaryRelax([qk.MinMax(2)]),
    qk.PACT(2, per_bit=[4, 2]),
]


def convolution(activation) -> QConv2d:
    torch.manual_seed(3)
    return QConv2d(4, 6, 3, padding=1, weight=qk.MinMax(2), activation=activation).train()


def inputs() -> torch.Tensor:
    return torch.rand(2, 4, 5, 7, generator=torch.Generator().manual_seed(1)).mul(2).requires_grad_()


def gradients(module, x) -> list[torch.Tensor]:
    """Of a second training step, with a change of what the quantizer has stored between forward and backward."""
    module(x).sum().backward()
    module.zero_grad()
    x.grad = None
    loss = module(x).square().sum()
    module(3 * x.detach())
    loss.backward()
    return [x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_gradients_are_those_of_a_layer_that_keeps_everything(activation, monkeypatch):
    ours = gradients(convolution(activation), inputs())
    monkeypatch.setattr(layer, "requantized", lambda *_: nullcontext())
    kept = gradients(convolution(activation), inputs())
    assert len(ours) == len(kept) > 2
    assert all(torch.equal(one, other) for one, other in zip(ours, kept, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_the_quantized_input_is_not_kept(activation):
    """Of the size of x there is x alone; gradient checkpointing and other hooks get x too."""
    module, x = convolution(activation), inputs()
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    assert [address for address, numel in kept.items() if numel == x.numel()] == [x.data_ptr()]


def test_a_bit_width_that_changes_before_the_backward():
    """As in joint training: a forward at each bit-width, then one backward."""
    both, x = convolution(qk.PACT(4, alpha=1.0, per_bit=[4, 2])), inputs()
    (qk.set_bits(both, 4)(x).sum() + qk.set_bits(both, 2)(x).square().sum()).backward()
    apart, y = convolution(qk.PACT(4, alpha=1.0, per_bit=[4, 2])), inputs()
    qk.set_bits(apart, 2)(y).square().sum().backward()
    qk.set_bits(apart, 4)(y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(both.weight.grad, apart.weight.grad)


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8)])
def test_linear_layers_of_any_dimension(shape):
    torch.manual_seed(4)
    module = QLinear(8, 5, weight=qk.BWN(), activation=qk.PACT(2, alpha=0.5))
    x = torch.rand(shape, requires_grad=True)
    module(x).square().sum().backward()
    q, w = module.activation_quantizer(x).detach(), module.weight_quantizer(module.weight).detach()
    slope = 2 * torch.nn.functional.linear(q, w, module.bias).detach()
    torch.testing.assert_close(module.weight.grad, slope.flatten(0, -2).T @ q.flatten(0, -2))


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(reentrant):
    plain, x = convolution(qk.MinMax(3)), inputs()
    plain(x).square().sum().backward()
    module, y = convolution(qk.MinMax(3)), inputs()
    checkpoint(module, y, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, y.grad) and torch.equal(plain.weight.grad, module.weight.grad)
    assert torch.equal(plain.activation_quantizer.running_grid, module.activation_quantizer.running_grid)


def test_saved_on_the_host():
    plain, x = convolution(qk.PACT(2, alpha=1.0)), inputs()
    plain(x).square().sum().backward()
    module, y = convolution(qk.PACT(2, alpha=1.0)), inputs()
    with torch.autograd.graph.save_on_cpu():
        loss = module(y).square().sum()
    loss.backward()
    assert torch.equal(x.grad, y.grad) and torch.equal(plain.weight.grad, module.weight.grad)


def test_a_change_in_place_is_an_error():
    module, x = convolution(qk.MinMax(3)), inputs()
    changed = x * 1
    loss = module(changed).sum()
    with torch.no_grad():
        changed.add_(1)
    with pytest.raises(RuntimeError, match=r"was changed in place between its forward and its backward: change a copy"):
        loss.backward()

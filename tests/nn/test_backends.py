"""A small quantized network trains and is packed on every backend.

What runs where: statistics, quantization, the mixture, their gradients and the packing of weights are the backend's
kernels (for `emu`, the CUDA kernels in the emulator). Convolution and matrix product, their gradients, batch-norm and
ReLU are torch's in training. In eval the layers compute on codes, by the backend's own products where it has them.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import quantkernels as qk
from quantkernels import ops
from quantkernels.nn import QConv2d, QLinear
from quantkernels.testing import Backend, assert_bit_equal

TRAINED_BY = (
    "minmax_grids",
    "fake_quantize",
    "fake_quantize_backward",
    "minmax_attention_quantize",
    "attention_quantize_backward",
)


class Calls(TorchDispatchMode):
    """Records the library's ops that run, as namespace.op."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith("quantkernels"):
            self.names.add(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def network() -> nn.Module:
    """Grids from minima, maxima and parameters alone: the same bits on every backend."""
    torch.manual_seed(3)
    mixture = qk.Attention([qk.MinMax(2), qk.MinMax(4), qk.MinMax(8, axis=None)])
    return nn.Sequential(
        QConv2d(3, 8, 3, padding=1, weight=mixture, activation=qk.MinMax(4)),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        QConv2d(8, 12, 3, stride=2, groups=2, weight=qk.MinMax(2, axis=0), activation=qk.PACT(2, alpha=1.5)),
        nn.ReLU(),
        nn.Flatten(),
        QLinear(12 * 3 * 3, 5, weight=qk.MinMax(3), activation=qk.PACT(4, alpha=1.0)),
    )


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Loss and gradients of one training step."""
    loss = functional.cross_entropy(model(x), torch.arange(len(x), device=x.device) % 5)
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.fixture
def deterministic_convolution():
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


@pytest.mark.ops(*TRAINED_BY)
def test_a_network_trains(backend: Backend, deterministic_convolution: None) -> None:
    native, own = (network().to(backend.device) for _ in range(2))
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(4)).to(backend.device)
    expected = step(native, x)
    with backend.chosen(), Calls() as calls:
        actual = step(own, x)
    namespace = ops._dispatch.NAMESPACES[backend.choice]
    assert {f"{namespace}.{op}" for op in TRAINED_BY} - calls.names <= {f"{namespace}.attention_quantize_backward"}
    assert {name.split(".")[0] for name in calls.names} == {namespace}
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        if "alpha" in name or "logits" in name:  # sums, whose order is the backend's own
            torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-6)
        else:
            assert_bit_equal(actual[name], value)


@pytest.mark.ops(*TRAINED_BY, "quantize_pack", "unpack_bitplanes")
def test_a_trained_network_is_packed(backend: Backend) -> None:
    model = network().to(backend.device)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5)).to(backend.device)
    model(x)
    model.eval()
    with torch.no_grad():
        for layer in (m for m in model if isinstance(m, (QConv2d, QLinear))):
            if isinstance(layer.weight_quantizer, qk.Attention):
                layer.weight_quantizer = copy.deepcopy(layer.weight_quantizer).select(1)
            expected, coding = layer.pack()
            with backend.chosen():
                planes, own_coding = layer.pack()
                encoded = layer.weight_quantizer.encode(layer.weight)
                assert_bit_equal(encoded.decode(), layer.weight_quantizer(layer.weight))
            assert_bit_equal(planes, expected)
            assert_bit_equal(own_coding.grid, coding.grid)
        if backend.has("lowbit_conv2d", "lowbit_linear"):
            expected_logits = model(x)
            with backend.chosen():
                assert_bit_equal(model(x), expected_logits)

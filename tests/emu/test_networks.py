"""Whole packed networks: the CUDA kernels on the emulator give the CPU's logits to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quantkernels as qk
from quantkernels.nn import PackedLayer
from quantkernels.testing import BACKENDS, assert_bit_equal

models = pytest.importorskip("training.models")
EMU = next(b for b in BACKENDS if b.name == "emu")
pytestmark = pytest.mark.skipif(EMU.missing is not None, reason=str(EMU.missing))

NETWORKS = {
    # Sums of bytes, and depths that are split; 2 x 2 bits go through the bit product where a tap has whole words.
    "resnet20-w4a8": ("resnet20", {}, 4, 8),
    "resnet20-w2a2": ("resnet20", {}, 2, 2),
    # 1 x 1 and depthwise kernels, channels of every remainder.
    "mobilenet_v2-w3a5": ("mobilenet_v2", {"stem": "cifar"}, 3, 5),
}


def packed_learned(name: str, bits: int) -> tuple[nn.Module, nn.Module]:
    """A network with the bases that QEM fits in a few training forwards, and the same packed."""
    torch.manual_seed(8)
    model = models.build_model(name, 10)
    qk.prepare(model, weight=qk.LearnedBasis(bits, axis=0), activation=qk.LearnedBasis(bits), skip=qk.first_and_last)
    for _ in range(3):
        model.train()(torch.rand(8, 3, 8, 8))
    return model.eval(), qk.convert(model, fold=False)


@pytest.mark.parametrize("bits", [2, 3])
def test_a_packed_network_of_lq_nets(bits: int) -> None:
    """Equal to the network in eval, which computes on codes as well, and on both backends."""
    model, packed = packed_learned("resnet20", bits)
    assert sum(isinstance(m, PackedLayer) for m in packed.modules()) >= 18
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = model(images)
    assert_bit_equal(packed(images), expected)
    with EMU.chosen():
        logits = packed(images)
    assert expected[0].unique().numel() == 10 and expected.isfinite().all()
    assert_bit_equal(logits, expected)


def packed(name: str, options: dict[str, object], w_bits: int, a_bits: int) -> nn.Module:
    """Batch-norms have statistics of their own, so that they fold into something."""
    torch.manual_seed(7)
    model = models.build_model(name, 10, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    qk.prepare(model, weight=qk.MinMax(w_bits, axis=0), activation=qk.PACT(a_bits, alpha=2.0))
    return qk.convert(model.eval())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_logits_are_those_of_the_cpu(name: str, layout: torch.memory_format) -> None:
    model = packed(*NETWORKS[name])
    assert sum(isinstance(m, PackedLayer) for m in model.modules()) >= 20
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=layout)
    expected = model(images)
    with EMU.chosen():
        logits = model(images)
    assert EMU.has("lowbit_conv2d", "lowbit_linear", "encode")
    assert expected[0].unique().numel() == 10 and expected.isfinite().all()
    assert_bit_equal(logits, expected)

"""prepack: packed networks with their weights as the kernels read them."""

from __future__ import annotations

import copy

import pytest
import torch
from test_pass_codes import calibrated, chain, check_same, images, packed
from torch import nn

import quantkernels as qk
from quantkernels.nn import PackedLayer
from training.models import build_model

ARRANGES = qk.build_info()["cpu_isa"] in ("avx512", "zen4")
arranges = pytest.mark.skipif(not ARRANGES, reason="needs AVX-512")


def arranged(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, PackedLayer) and m.prepacked is not None]


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_logits_are_the_same(bits):
    model = packed(chain(), qk.BWN(axis=0) if bits == 1 else qk.MinMax(bits, axis=0), qk.PACT(bits, alpha=2.0))
    after = qk.prepack(copy.deepcopy(model))
    assert arranged(after) == (["0", "7", "10", "12"] if ARRANGES else [])  # "3" is depthwise
    check_same(model, after, images(4, 3, 12, 12))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_networks_that_pass_codes(name):
    torch.manual_seed(0)
    model = packed(build_model(name, 10, stem="cifar"), qk.MinMax(2), qk.PACT(4))
    x = images(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    check_same(model, qk.prepack(copy.deepcopy(model)), x)
    check_same(model, qk.prepack(qk.pass_codes(copy.deepcopy(model))), x)


def test_half_types():
    model = packed(chain())
    after = qk.prepack(copy.deepcopy(model))
    for dtype in (torch.float16, torch.bfloat16):
        check_same(model.to(dtype), after.to(dtype), images(4, 3, 12, 12).to(dtype))


def test_several_bit_widths():
    prepared = qk.prepare(chain(), weight=qk.ModifiedDoReFa(8), activation=qk.PACT(8, alpha=2.0))
    model = qk.convert(calibrated(prepared), bit_widths=[8, 4, 2])
    after = qk.prepack(copy.deepcopy(model))
    for bits in (8, 2, 4, {"0": (2, 8), "10": (None, 4)}):
        check_same(qk.set_bits(model, bits), qk.set_bits(after, bits), images(4, 3, 12, 12))


def test_other_planes_are_arranged_anew():
    torch.manual_seed(1)
    first = packed(chain())
    torch.manual_seed(2)
    second = packed(chain())
    after = qk.prepack(first)
    after.load_state_dict(second.state_dict())
    check_same(second, after, images(4, 3, 12, 12))


@arranges
def test_it_is_in_no_file(tmp_path):
    architecture = chain()
    model = qk.prepack(packed(copy.deepcopy(architecture)))
    assert not [name for name in model.state_dict() if "prepacked" in name]
    qk.save(model, tmp_path / "net.safetensors")
    loaded = qk.load(tmp_path / "net.safetensors", architecture)
    assert arranged(loaded) == []
    check_same(model, qk.prepack(loaded), images(4, 3, 12, 12))


@arranges
def test_copies_and_taking_it_back():
    model = qk.prepack(packed(chain()))
    twin = copy.deepcopy(model)
    assert arranged(twin) == arranged(model) == ["0", "7", "10", "12"]
    assert "prepacked" in repr(model[0]) and "prepacked" not in repr(model[3])
    for layer in twin.modules():
        if isinstance(layer, PackedLayer):
            layer.prepacked = None
    assert arranged(twin) == []
    check_same(model, twin, images(4, 3, 12, 12))


def test_a_layer_whose_input_floats_has_none():
    model = qk.convert(calibrated(qk.prepare(chain(), weight=qk.MinMax(3))))
    assert arranged(qk.prepack(model)) == []


def test_a_layer_whose_input_has_a_learned_basis_has_none():
    model = packed(chain(), qk.MinMax(2, axis=0), qk.LearnedBasis(2, signed=False))
    after = qk.prepack(copy.deepcopy(model))
    assert arranged(after) == []
    check_same(model, after, images(4, 3, 12, 12))


def test_under_compile():
    model = packed(chain())
    after = torch.compile(qk.prepack(copy.deepcopy(model)), fullgraph=True, dynamic=False)
    check_same(model, after, images(4, 3, 12, 12))


def test_a_float_network_is_an_error():
    with pytest.raises(ValueError, match="prepack: Sequential has no packed layers; call convert"):
        qk.prepack(chain())

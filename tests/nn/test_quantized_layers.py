"""QConv2d and QLinear: what they compute in training, in eval and packed, and what they accept."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

import quantkernels as qk
from quantkernels import reference
from quantkernels.nn import PackedConv2d, PackedLinear, QConv2d, QLinear

GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (2, 3), "padding": "same", "dilation": (1, 2)},
    {"kernel_size": 3, "padding": (1, 2), "stride": 2, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 1, "groups": 2, "padding_mode": "circular"},
    {"kernel_size": (3, 1), "padding": (2, 0), "padding_mode": "replicate", "stride": (1, 2)},
    {"kernel_size": 1, "padding": "valid", "groups": 4, "bias": False},
    {"kernel_size": 3, "padding": 4, "stride": 3},
]
WEIGHTS = [qk.MinMax(2), qk.MinMax(5, axis=0), qk.SAWB(8), qk.BWN(), qk.TWN(axis=0), None]
ACTIVATIONS = [qk.PACT(3, alpha=1.5), qk.MinMax(2), qk.BWN(), None]
PAIRS = [pair for pair in itertools.product(WEIGHTS, ACTIVATIONS) if pair != (None, None)]


def names(quantizer: object) -> str:
    return repr(quantizer)


def trained(layer: nn.Module, *shape: int) -> nn.Module:
    layer.train()
    layer(torch.randn(*shape))
    return layer.eval()


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(("weight", "activation"), PAIRS, ids=names)
def test_convolution_in_training_eval_and_packed(weight, activation, geometry):
    torch.manual_seed(9)
    layer = QConv2d(4, 8, **geometry, weight=weight, activation=activation)
    plain = nn.Conv2d(4, 8, **geometry)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "quantizer" not in k})
    x = torch.randn(2, 4, 9, 10)
    y = layer(x)
    qx = x if activation is None else layer.activation_quantizer(x)
    with torch.no_grad():
        if weight is not None:
            plain.weight.copy_(layer.weight_quantizer(layer.weight))
    torch.testing.assert_close(y, plain(qx))
    layer.eval()
    with torch.no_grad():
        evaluated = layer(x)
        smooth = layer._float_forward(x)
        torch.testing.assert_close(evaluated, smooth, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer(x[0]), evaluated[0], rtol=1e-5, atol=1e-5)
        if weight is not None:
            packed = PackedConv2d.pack(layer)
            assert torch.equal(packed(x), evaluated)
            assert "weight" not in packed.state_dict()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("weight", "activation"), PAIRS, ids=names)
def test_linear_in_training_eval_and_packed(weight, activation, bias):
    torch.manual_seed(10)
    layer = QLinear(37, 5, bias=bias, weight=weight, activation=activation)
    x = torch.randn(2, 6, 37)
    y = layer(x)
    qx = x if activation is None else layer.activation_quantizer(x)
    qw = layer.weight if weight is None else layer.weight_quantizer(layer.weight)
    torch.testing.assert_close(y, functional.linear(qx, qw, layer.bias))
    layer.eval()
    with torch.no_grad():
        evaluated = layer(x)
        torch.testing.assert_close(evaluated, layer._float_forward(x), rtol=1e-4, atol=1e-4)
        if weight is not None:
            assert torch.equal(PackedLinear.pack(layer)(x), evaluated)


@pytest.mark.parametrize("wanted", list(itertools.product([1, 2, 5, 8], [1, 3, 8])), ids=str)
def test_eval_is_the_reference_on_codes(wanted):
    weight_bits, activation_bits = wanted
    layer = QConv2d(
        6, 4, 3, padding=1, stride=2, weight=qk.MinMax(weight_bits, axis=0), activation=qk.PACT(activation_bits)
    )
    x = torch.randn(2, 6, 7, 7) * 4
    trained(layer, 2, 6, 7, 7)
    with torch.no_grad():
        planes, weight = layer.pack()
        expected = reference.lowbit_conv2d(
            x, *layer.activation_coding(x), planes, *weight, 3, 2, 1, 1, 1, bias=layer.bias
        )
        assert torch.equal(layer(x), expected)


def test_exact_training_has_the_value_of_eval_and_the_gradient_of_training():
    torch.manual_seed(11)
    arguments = {"padding": 1, "weight": qk.SAWB(2), "activation": qk.PACT(2, alpha=1.0)}
    exact = QConv2d(3, 5, 3, **arguments, exact=True)
    smooth = QConv2d(3, 5, 3, **arguments)
    smooth.load_state_dict(exact.state_dict())
    x = torch.randn(2, 3, 8, 8)
    g = torch.randn(2, 5, 8, 8)
    y = exact(x)
    y.backward(g)
    smooth(x).backward(g)
    for (name, a), (_, b) in zip(exact.named_parameters(), smooth.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    assert torch.equal(y, exact.eval()(x))
    assert "exact=True" in repr(exact)


def test_eval_with_gradients_enabled_is_differentiable():
    layer = QLinear(8, 3, weight=qk.MinMax(2), activation=qk.PACT(4)).eval()
    x = torch.randn(2, 8, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), y)
    y.sum().backward()
    assert x.grad is not None and layer.weight.grad is not None and layer.activation_quantizer.alpha.grad is not None


def test_a_mixture_stays_floating_in_eval_until_it_is_selected():
    layer = QConv2d(3, 4, 3, weight=qk.Attention([qk.MinMax(2), qk.MinMax(8)]), activation=qk.PACT(2))
    trained(layer, 2, 3, 6, 6)
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(layer(x), layer._float_forward(x))
    with pytest.raises(RuntimeError, match=r"call select\(\)"):
        PackedConv2d.pack(layer)
    layer.weight_quantizer.select(0)
    assert torch.equal(PackedConv2d.pack(layer)(x), layer(x))
    assert PackedConv2d.pack(layer).weight_bits == 2


def test_quantizers_are_templates():
    weight, activation = qk.MinMax(2), qk.PACT(2)
    a, b = (QLinear(4, 4, weight=weight, activation=activation) for _ in range(2))
    assert len({id(q) for q in (activation, a.activation_quantizer, b.activation_quantizer)}) == 3
    assert not qk.MinMax(2).tracking and QLinear(4, 4, activation=qk.MinMax(2)).activation_quantizer.tracking
    assert QLinear(4, 4, weight=qk.Identity(), activation=None).weight_quantizer is None


def test_what_layers_refuse():
    with pytest.raises(ValueError, match="activation quantizer must be per tensor"):
        QConv2d(3, 4, 3, weight=qk.MinMax(2), activation=qk.MinMax(2, axis=1))
    with pytest.raises(ValueError, match=r"weight quantizer must be per tensor .* got axis=1"):
        QLinear(3, 4, weight=qk.MinMax(2, axis=1))
    with pytest.raises(TypeError, match="weight must be a Quantizer or None, got int"):
        QLinear(3, 4, weight=2)
    layer = QConv2d(3, 4, 3, weight=qk.MinMax(2), activation=qk.MinMax(2)).eval()
    with pytest.raises(RuntimeError, match="run at least one forward in training mode"):
        layer(torch.randn(1, 3, 5, 5))


def test_a_float_state_dict_loads():
    plain = nn.Conv2d(3, 4, 3)
    for weight in (qk.Attention([qk.MinMax(2), qk.SAWB(4)]), qk.MinMax(2)):
        layer = QConv2d(3, 4, 3, weight=weight, activation=qk.PACT(2, alpha=3.0))
        layer.load_state_dict(plain.state_dict())
        assert torch.equal(layer.weight, plain.weight)
        assert layer.activation_quantizer.alpha.item() == 3.0
    tracking = QConv2d(3, 4, 3, weight=qk.MinMax(2), activation=qk.MinMax(2))
    tracking.load_state_dict(plain.state_dict())
    assert not tracking.activation_quantizer.calibrated


def test_what_does_not_match_in_a_state_dict_is_named():
    layer = QConv2d(3, 4, 3, weight=qk.MinMax(2), activation=qk.PACT(2))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(nn.Conv2d(3, 5, 3, bias=False).state_dict() | {"bias": torch.zeros(4)})
    with pytest.raises(RuntimeError, match=r'Missing key.*"bias"'):
        layer.load_state_dict(nn.Conv2d(3, 4, 3, bias=False).state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"gamma"'):
        layer.load_state_dict(nn.Conv2d(3, 4, 3).state_dict() | {"gamma": torch.zeros(1)})
    mixture = QConv2d(3, 4, 3, weight=qk.Attention([qk.MinMax(2), qk.MinMax(4)]))
    partial = mixture.state_dict()
    del partial["weight_quantizer.logits"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight_quantizer.logits"'):
        mixture.load_state_dict(partial)


def test_quantized_state_dict_round_trip_and_deepcopy():
    torch.manual_seed(12)
    make = lambda: QConv2d(3, 4, 3, weight=qk.SAWB(3), activation=qk.MinMax(4))  # noqa: E731
    layer = trained(make(), 2, 3, 6, 6)
    other = make().eval()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", [qk.PACT(4, alpha=2.0), None], ids=names)
def test_half_models_pack_to_the_same_values(activation, dtype):
    layer = QConv2d(4, 6, 3, padding=1, dtype=dtype, weight=qk.MinMax(3, axis=0), activation=activation).eval()
    x = torch.randn(1, 4, 6, 6, dtype=dtype)
    with torch.no_grad():
        packed = PackedConv2d.pack(layer)
        y = layer(x)
        assert y.dtype == dtype
        assert torch.equal(packed(x), y)
        assert torch.equal(packed.to(dtype)(x), y)
    assert packed.planes.dtype == torch.int32
    assert packed.weight_grid.dtype == torch.float32


def test_packed_size_and_repr():
    layer = QConv2d(64, 64, 3, bias=False, weight=qk.MinMax(2), activation=qk.PACT(2))
    packed = PackedConv2d.pack(layer)
    assert packed.planes.nbytes == 64 * 64 * 9 * 2 // 8
    assert "weight=2 bits, activation=2 bits" in repr(packed)
    assert (packed.weight_bits, packed.activation_bits) == (2, 2)
    assert torch.equal(packed.weight_planes().decode(), layer.weight_quantizer(layer.weight))
    text = repr(layer)
    assert "MinMax(bits=2)" in text and "PACT(bits=2, alpha=8)" in text
    assert PackedConv2d.pack(QConv2d(3, 3, 1, weight=qk.BWN())).activation_bits is None


def test_packed_layers_refuse_what_kernels_could_not_run():
    good = PackedLinear.pack(QLinear(40, 3, weight=qk.MinMax(2), activation=qk.PACT(2)))
    weight, activation = good.weight_coding, good.activation
    assert activation is not None
    cases = [
        (good.planes[:1], weight, activation, "planes must be"),
        (good.planes[..., :1], weight, activation, "planes must be"),
        (good.planes.long(), weight, activation, "planes must be torch.int32"),
        (good.planes, weight._replace(levels=511), activation, "kind and levels must be"),
        (good.planes, weight._replace(kind=3), activation, "kind and levels must be"),
        (good.planes, weight._replace(grid=torch.zeros(2, 3)), activation, "weight grid must be"),
        (good.planes, weight, activation._replace(grid=torch.zeros(3, 3)), "activation grid must be"),
        (good.planes, weight, activation._replace(levels=2), "kind and levels must be"),
    ]
    for planes, w, a, message in cases:
        with pytest.raises(ValueError, match=message):
            PackedLinear(40, planes, w, a)
    with pytest.raises(ValueError, match="scale must be"):
        good.fold(torch.zeros(4), torch.zeros(3))
    good.fold(torch.ones(3), torch.zeros(3))
    with pytest.raises(ValueError, match="already has a scale"):
        good.fold(torch.ones(3), torch.zeros(3))


@pytest.mark.parametrize("training", [True, False])
def test_layers_compile_without_a_graph_break(training):
    torch._dynamo.reset()
    model = nn.Sequential(
        QConv2d(3, 4, 3, padding=1, weight=qk.Attention([qk.MinMax(2), qk.SAWB(4)]).select(0), activation=qk.PACT(2)),
        nn.Flatten(),
        QLinear(4 * 36, 5, weight=qk.BWN(), activation=qk.MinMax(4)),
    )
    trained(model, 2, 3, 6, 6)
    x = torch.randn(2, 3, 6, 6)
    packed = nn.Sequential(PackedConv2d.pack(model[0]), nn.Flatten(), PackedLinear.pack(model[2]))
    model.train(training)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), twin(x))
    if not training:
        with torch.no_grad():
            assert torch.equal(torch.compile(packed, fullgraph=True, backend="aot_eager")(x), twin(x))

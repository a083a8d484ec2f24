"""prepare, set_bits and convert."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import quantkernels as qk
from quantkernels.nn import PackedConv2d, PackedLinear, QConv2d, QLinear


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.body(x)
        return self.head(x.mean((2, 3)))


def prepared(model: nn.Module, **changes) -> nn.Module:
    arguments = {"weight": qk.MinMax(2, axis=0), "activation": qk.PACT(3, alpha=2.0)} | changes
    return qk.prepare(model, **arguments)


def run(model: nn.Module, steps: int = 3) -> nn.Module:
    torch.manual_seed(13)
    model.train()
    for _ in range(steps):
        model(torch.randn(4, 3, 8, 8))
    return model.eval()


def quantized(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, (QConv2d, QLinear))]


def test_prepare_swaps_in_place_and_keeps_parameters():
    model = Net()
    before = dict(model.named_parameters())
    assert prepared(model) is model
    assert quantized(model) == ["stem", "body.0", "body.3", "head"]
    after = dict(model.named_parameters())
    assert all(after[name] is value for name, value in before.items())
    assert set(after) - set(before) == {f"{name}.activation_quantizer.alpha" for name in quantized(model)}


def test_prepare_of_a_layer_itself():
    layer = nn.Linear(4, 3)
    made = prepared(layer)
    assert isinstance(made, QLinear) and made.weight is layer.weight


def test_skip_and_overrides():
    model = prepared(Net(), skip=qk.first_and_last)
    assert quantized(model) == ["body.0", "body.3"]
    assert quantized(prepared(Net(), skip=["body.*", "head"])) == ["stem"]
    model = prepared(
        Net(),
        overrides={
            "body.*": {"weight": qk.BWN(), "exact": True},
            "body.3": {"activation": None},
            "stem": None,
        },
    )
    assert quantized(model) == ["body.0", "body.3", "head"]
    first, second = model.body[0], model.body[3]
    assert isinstance(first.weight_quantizer, qk.BWN) and isinstance(first.activation_quantizer, qk.PACT)
    assert isinstance(second.weight_quantizer, qk.BWN) and second.activation_quantizer is None and second.exact
    assert isinstance(model.head.weight_quantizer, qk.MinMax) and not model.head.exact


def test_patterns_that_match_nothing_name_the_nearest():
    with pytest.raises(ValueError, match=r"skip: 'bdoy.0' matches no layer; the nearest are .*'body.0'"):
        prepared(Net(), skip=["bdoy.0"])
    with pytest.raises(ValueError, match=r"overrides: 'steam' matches no layer; the nearest are 'stem'"):
        prepared(Net(), overrides={"steam": None})
    with pytest.raises(ValueError, match=r"has 'weights'; it can have weight, activation, exact"):
        prepared(Net(), overrides={"stem": {"weights": None}})
    with pytest.raises(ValueError, match="matches no layer"):
        prepared(Net(), skip=lambda layers: ["nowhere"])
    with pytest.raises(TypeError, match="list of patterns"):
        prepared(Net(), skip="stem")


class Others(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.line = nn.Conv1d(4, 4, 3)
        self.memory = nn.LSTM(4, 4)
        self.look = nn.MultiheadAttention(4, 2)
        self.block = nn.TransformerEncoderLayer(4, 2)
        self.words = nn.Embedding(10, 4)
        self.norm = nn.LayerNorm((3, 4))
        self.own = nn.Parameter(torch.zeros(3, 4))
        self.head = nn.Linear(4, 2)


def test_unsupported_modules_are_listed_never_silent():
    model = Others()
    with pytest.warns(UserWarning, match="cannot be quantized") as caught:
        prepared(model)
    text = str(caught[0].message)
    for name in (
        "the model itself (Others)",
        "up (Conv",
        "line (Conv1d)",
        "memory (LSTM)",
        "look (Multi",
        "block",
        "words",
    ):
        assert name in text
    assert "norm (" not in text and "head (" not in text
    assert quantized(model) == ["head"]
    strict = Others()
    with pytest.raises(qk.UnsupportedModuleError, match=r"memory \(LSTM\).*name them in skip="):
        prepared(strict, strict=True)
    assert quantized(strict) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared(nn.Sequential(nn.Conv1d(3, 3, 1), nn.Linear(3, 3)), skip=["0"], strict=True)


def test_subclasses_are_not_swapped_behind_their_back():
    class Mine(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = nn.Sequential(Mine(3, 3, 1), nn.Linear(3, 3))
    with pytest.warns(UserWarning, match=r"0 \(Mine\)"):
        prepared(model)
    assert quantized(model) == ["1"]


def test_nothing_to_quantize():
    with pytest.raises(ValueError, match="has no nn"):
        prepared(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match=r"call prepare\(\) first"):
        qk.convert(Net())


def test_shared_modules_stay_shared():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    prepared(model)
    assert isinstance(model[0], QLinear) and model[0] is model[2]
    packed = qk.convert(model.eval())
    assert packed[0] is packed[2]
    x = torch.randn(3, 4)
    assert torch.equal(packed(x), model(x))


def test_prepare_twice_leaves_what_is_quantized():
    model = prepared(Net(), skip=["head"])
    layers = {name: model.get_submodule(name) for name in quantized(model)}
    prepared(model, weight=qk.BWN())
    assert all(model.get_submodule(name) is layer for name, layer in layers.items())
    assert isinstance(model.head.weight_quantizer, qk.BWN)


def test_convert_without_folding_is_bit_identical_and_leaves_the_model():
    model = run(prepared(Net()))
    before = copy.deepcopy(model.state_dict())
    packed = qk.convert(model, fold=False)
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(packed(x), model(x))
    assert not packed.training
    assert isinstance(packed.norm, nn.BatchNorm2d)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_folding():
    model = run(prepared(Net()))
    packed = qk.convert(model)
    assert isinstance(packed.norm, nn.Identity) and isinstance(packed.body[1], nn.Identity)
    assert packed.stem.folded == "norm" and packed.body[0].folded == "body.1" and packed.body[3].folded is None
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(packed.stem(x), model.norm(model.stem(x)), rtol=1e-5, atol=1e-5)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        if x.sum() > 0:  # control flow that depends on data
            x = self.conv(x)
        return self.norm(x)


class Awkward(nn.Module):
    """Batch-norms that look as if they followed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)  # the convolution's output is used twice
        self.b, self.b_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)  # one layer, called twice
        self.c, self.c_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)  # something between
        self.d, self.d_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)
        self.e, self.e_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)  # used the other way round
        self.f, self.f_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False)  # this one can be folded

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x = self.a_norm(y) + y
        x = self.b_norm(self.b(self.b(x)))
        x = self.c_norm(self.c(x).relu())
        x = self.d_norm(self.d(x))
        x = self.e(self.e_norm(x))
        return self.f_norm(self.f(x))


@pytest.mark.parametrize("make", [Untraceable, Awkward])
def test_only_what_is_proven_is_folded(make):
    model = run(prepared(make(), activation=None))
    packed = qk.convert(model)
    folded = {name for name, m in packed.named_modules() if isinstance(m, PackedConv2d) and m.folded}
    assert folded == ({"block.0"} if make is Untraceable else {"f"})
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), model(x), rtol=1e-4, atol=1e-4)
        assert torch.equal(qk.convert(model, fold=False)(x), model(x))


def test_hooks_prevent_folding():
    model = run(prepared(Net()))
    model.norm.register_forward_hook(lambda *_: None)
    assert isinstance(qk.convert(model).norm, nn.BatchNorm2d)


def test_convert_names_what_is_not_ready():
    model = prepared(Net(), weight=qk.Attention([qk.MinMax(2), qk.MinMax(4)]))
    with pytest.raises(RuntimeError, match=r"call select\(\) first on the mixtures stem.weight_quantizer, body.0"):
        qk.convert(model)
    model = prepared(Net(), activation=qk.MinMax(4))
    with pytest.raises(RuntimeError, match=r"no activation statistics yet: stem.activation_quantizer, "):
        qk.convert(model)


@pytest.mark.parametrize(
    ("weight", "activation"),
    [
        (qk.Attention([qk.MinMax(2), qk.SAWB(4)]).select(0), qk.Attention([qk.PACT(2), qk.PACT(4)]).select(1)),
        (qk.BinaryRelax([qk.TWN()]).select(), qk.MinMax(4)),
        (qk.SAWB(3), None),
        (None, qk.PACT(2, alpha=2.0)),
        (None, qk.TWN()),
    ],
    ids=repr,
)
def test_convert_of_other_quantizers(weight, activation):
    model = run(prepared(Net(), weight=weight, activation=activation))
    packed = qk.convert(model, fold=False)
    kinds = (PackedConv2d, PackedLinear) if weight is not None else (QConv2d, QLinear)
    assert isinstance(packed.stem, kinds) and isinstance(packed.head, kinds)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(packed(x), model(x))


def test_set_bits():
    model = run(prepared(Net()))
    assert qk.set_bits(model, 4) is model
    assert {m.weight_quantizer.bits for m in map(model.get_submodule, quantized(model))} == {4}
    qk.set_bits(model, {"stem": (8, None), "head": (1, 2)})
    assert (model.stem.weight_quantizer.bits, model.stem.activation_quantizer.bits) == (8, 4)
    assert (model.head.weight_quantizer.bits, model.head.activation_quantizer.bits) == (1, 2)
    packed = qk.convert(model)
    assert (packed.stem.weight_bits, packed.head.weight_bits, packed.head.activation_bits) == (8, 1, 2)


def test_set_bits_changes_nothing_on_an_error():
    model = prepared(Net(), overrides={"head": {"weight": qk.TWN()}})
    with pytest.raises(ValueError, match="TWN has 2 bits and cannot have 4"):
        qk.set_bits(model, 4)
    with pytest.raises(ValueError, match=r"'heads' matches no layer; the nearest are 'head'"):
        qk.set_bits(model, {"stem": (8, 8), "heads": (2, 2)})
    with pytest.raises(ValueError, match=r"'stem' needs \(weight bits, activation bits\), got 8"):
        qk.set_bits(model, {"stem": 8})
    with pytest.raises(ValueError, match="from 1 to 8"):
        qk.set_bits(model, {"stem": (8, 9)})
    assert model.stem.weight_quantizer.bits == 2

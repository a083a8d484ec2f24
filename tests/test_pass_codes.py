"""pass_codes: packed layers that give their codes to the next."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantkernels as qk
from quantkernels.nn import PackedLayer
from quantkernels.nn.packed import ReluOfValues
from quantkernels.quantizers import Quantizer
from training.models import build_model


def packed(model: nn.Module, weight: Quantizer | None = None, activation: Quantizer | None = None, **options):
    weight, activation = weight or qk.MinMax(3, axis=0), activation or qk.PACT(3, alpha=2.0)
    return qk.convert(calibrated(qk.prepare(model, weight=weight, activation=activation)), **options)


def calibrated(model: nn.Module) -> nn.Module:
    """After a few steps, so that statistics and batch-norms are what they are in use."""
    torch.manual_seed(3)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 3, 12, 12))
    return model.eval()


def givers(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, PackedLayer) and m.taker]


def inputs_of(model: nn.Module, x: Tensor) -> dict[str, torch.dtype]:
    """What reaches each packed layer."""
    found: dict[str, torch.dtype] = {}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0].dtype}))
        for name, m in model.named_modules()
        if isinstance(m, PackedLayer)
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def check_same(before: nn.Module, after: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(after(x), before(x), rtol=0, atol=0, equal_nan=True)


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def chain(activation: nn.Module | None = None) -> nn.Sequential:
    """Convolutions of all sorts and linear layers, one after the other, with modules of their own between them."""
    between = [copy.deepcopy(activation or nn.ReLU()) for _ in range(4)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), between[0],
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8), nn.BatchNorm2d(8), between[1], nn.Dropout(0.3),
        nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=2), between[2], nn.Flatten(),
        nn.Linear(12 * 36, 10), between[3],
        nn.Linear(10, 7),
    )  # fmt: skip


ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(-0.75, 0.5),
    "nothing": nn.Identity(),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_logits_are_the_same_and_codes_are_passed(name, layout):
    model = packed(chain(ACTIVATIONS[name]))
    after = qk.pass_codes(copy.deepcopy(model))
    assert givers(after) == ["0", "3", "7", "10"]
    x = images(4, 3, 12, 12).contiguous(memory_format=layout)
    assert inputs_of(after, x) == {"0": torch.float32} | dict.fromkeys(("3", "7", "10", "12"), torch.uint8)
    assert set(inputs_of(model, x).values()) == {torch.float32}
    check_same(model, after, x)
    check_same(model, after, 100 * x)  # beyond every range
    assert not any(type(m) in (nn.ReLU, nn.ReLU6, nn.Hardtanh) for m in after.modules())


QUANTIZERS = {
    **{f"{n} bits": (qk.MinMax(n, axis=0), qk.PACT(n, alpha=2.0)) for n in range(1, 9)},
    "signed": (qk.SAWB(2), qk.MinMax(4)),
    "binary": (qk.BWN(), qk.BWN()),
    "ternary": (qk.TWN(), qk.TWN()),
    "learned": (qk.LearnedBasis(2), qk.LearnedBasis(2)),
}


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("activation", ["relu", "nothing"])
def test_every_quantizer(name, activation):
    weight, of_input = QUANTIZERS[name]
    model = packed(chain(ACTIVATIONS[activation]), weight, of_input)
    after = qk.pass_codes(copy.deepcopy(model))
    assert givers(after) == ["0", "3", "7", "10"]
    check_same(model, after, images(4, 3, 12, 12))


class Shared(nn.Module):
    """A ReLU that is called twice, one that is a function, and a shortcut."""

    def __init__(self, relu=torch.relu) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.third = nn.Conv2d(6, 6, 1)
        self.last = nn.Linear(6, 4)
        self.act = nn.ReLU()
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        y = self.act(self.second(x) + x)
        y = self.relu(self.third(y))
        return self.last(y.mean((2, 3)))


class Behind(Shared):
    """Functions and methods between two layers."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x), inplace=True)
        x = self.second(x).relu()
        x = self.act(self.third(x))
        return self.last(self.act(torch.flatten(x, 2).mean(2)))


def test_a_relu_that_stays():
    model = packed(Behind())
    after = qk.pass_codes(copy.deepcopy(model))
    assert givers(after) == ["first", "second"]
    assert type(after.act) is nn.ReLU
    check_same(model, after, images(2, 3, 12, 12))
    check_same(model, after, images(3, 12, 12)[None])


def test_a_relu_that_stays_before_levels_below_zero():
    model = packed(Behind(), activation=qk.MinMax(3))  # of a net with biases: not all its inputs are positive
    for layer in (model.second, model.third):
        layer.activation_grid[0, 0] = -0.5
    assert givers(qk.pass_codes(model)) == []


def test_outputs_that_others_read_stay():
    model = packed(Shared())
    assert givers(qk.pass_codes(copy.deepcopy(model))) == []  # a shortcut, a sum, a mean


class LeakyRelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.relu = nn.LeakyReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.relu(self.first(x)))


class Twice(LeakyRelu):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.second(self.first(x)))


class Doubles(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def with_hook(model: nn.Module, name: str) -> nn.Module:
    model.get_submodule(name).register_forward_hook(lambda *_: None)
    return model


UNFIT = {
    "another activation, whatever its name": lambda: packed(LeakyRelu()),
    "a layer that is called twice": lambda: packed(Twice()),
    "a subclass": lambda: packed(nn.Sequential(nn.Conv2d(3, 4, 3), Doubles(), nn.Conv2d(4, 4, 3))),
    "pooling": lambda: packed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3))),
    "a batch-norm that is not folded": lambda: packed(chain()[:4], fold=False),
    "padding that is not zeros": lambda: packed(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))
    ),
    "a hook on the giver": lambda: with_hook(packed(chain()[:4]), "0"),
    "a hook on the activation": lambda: with_hook(packed(chain()[:4]), "2"),
    "a hook on the taker": lambda: with_hook(packed(chain()[:4]), "3"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_cannot_have_codes_stays(name):
    model = UNFIT[name]()
    after = qk.pass_codes(copy.deepcopy(model))
    assert givers(after) == []
    check_same(model, after, images(2, 3, 12, 12))


@pytest.mark.parametrize("what", ACTIVATIONS)
def test_activations_become_part_of_a_layer_that_gives_values(what):
    activation = ACTIVATIONS[what]
    model = packed(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), activation, nn.MaxPool2d(2), nn.Conv2d(4, 4, 3))
    )
    after = qk.pass_codes(copy.deepcopy(model))
    assert givers(after) == [] and type(after[2]) is nn.Identity
    x = images(2, 3, 12, 12)
    x[0, 0, 0, 0], x[1, 1, 2, 3] = float("nan"), float("inf")
    check_same(model, after, x)
    for dtype in (torch.float16, torch.bfloat16):
        check_same(model.to(dtype), after.to(dtype), images(2, 3, 12, 12).to(dtype))


class ReluFirst(nn.Module):
    """A clamp that does not commute with the function before it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.clamp = nn.Conv2d(3, 4, 3), nn.Hardtanh(-2.0, -1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.clamp(torch.relu(self.conv(x))).sum(1)


def test_an_activation_behind_a_function_stays():
    model = packed(ReluFirst())
    after = qk.pass_codes(copy.deepcopy(model))
    assert type(after.clamp) is nn.Hardtanh
    check_same(model, after, images(2, 3, 12, 12))


def test_one_module_in_two_places_stays():
    conv = nn.Conv2d(3, 3, 1)
    model = packed(nn.Sequential(conv, nn.Conv2d(3, 3, 1), conv))
    assert givers(qk.pass_codes(model)) == []


def test_halves_are_passed_as_values():
    model = packed(chain(nn.ReLU6()))
    after = qk.pass_codes(copy.deepcopy(model))
    for dtype in (torch.float16, torch.bfloat16):
        x = images(4, 3, 12, 12).to(dtype)
        assert set(inputs_of(after.to(dtype), x).values()) == {dtype}
        check_same(model.to(dtype), after, x)


def test_float_inputs_and_nan():
    model = packed(chain())
    after = qk.pass_codes(copy.deepcopy(model))
    x = images(4, 3, 12, 12)
    x[0, 0, 0, 0], x[1, 1, 2, 3], x[2, 2, 2, 2] = float("nan"), float("inf"), -float("inf")
    check_same(model, after, x)


def test_again_and_after_a_copy():
    model = packed(chain(nn.ReLU6()))
    after = qk.pass_codes(qk.pass_codes(copy.deepcopy(model)))
    assert givers(after) == ["0", "3", "7", "10"]
    twin = copy.deepcopy(after)
    assert twin[0].taker[0] is twin[3]
    x = images(4, 3, 12, 12)
    check_same(model, after, x)
    check_same(model, twin, x)
    assert "gives codes" in repr(after[0]) and "gives codes" not in repr(after[12])
    assert list(after.state_dict()) == list(model.state_dict())


def test_files_hold_nothing_of_it(tmp_path):
    architecture = chain(nn.ReLU6())
    after = qk.pass_codes(packed(copy.deepcopy(architecture)))
    qk.save(after, tmp_path / "net.safetensors")
    loaded = qk.load(tmp_path / "net.safetensors", architecture)
    assert givers(loaded) == []
    x = images(4, 3, 12, 12)
    check_same(after, loaded, x)
    check_same(after, qk.pass_codes(loaded), x)


def test_several_bit_widths():
    prepared = qk.prepare(chain(), weight=qk.ModifiedDoReFa(8), activation=qk.PACT(8, alpha=2.0))
    model = qk.convert(calibrated(prepared), bit_widths=[8, 4, 2])
    after = qk.pass_codes(copy.deepcopy(model))
    assert givers(after) == ["0", "3", "7", "10"]
    for bits in (8, 2, 4, {"3": (8, 2)}, {"0": (2, 8), "10": (None, 4)}):
        check_same(qk.set_bits(model, bits), qk.set_bits(after, bits), images(4, 3, 12, 12))


@pytest.mark.parametrize("name, count", [("resnet18", 8), ("mobilenet_v2", 36)])
def test_networks(name, count):
    torch.manual_seed(0)
    model = packed(build_model(name, 10, stem="cifar"), qk.MinMax(2), qk.PACT(4))
    after = qk.pass_codes(copy.deepcopy(model))
    assert len(givers(after)) == count
    assert sum(type(m) is ReluOfValues for m in after.modules()) == (8 if name == "resnet18" else 0)
    assert len(givers(qk.pass_codes(after))) == count
    x = images(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    check_same(model, after, x)


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = chain()[:4], nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)) if x.sum() > 0 else self.head(self.body(-x))


def test_children_of_what_cannot_be_traced():
    model = packed(DataDependent())
    after = qk.pass_codes(copy.deepcopy(model))
    assert givers(after) == ["body.0"]
    check_same(model, after, images(2, 3, 12, 12))


def test_under_compile():
    model = packed(chain())
    after = torch.compile(qk.pass_codes(copy.deepcopy(model)), fullgraph=True, dynamic=False)
    check_same(model, after, images(4, 3, 12, 12))


def test_a_float_network_is_an_error():
    with pytest.raises(ValueError, match="pass_codes: Sequential has no packed layers; call convert"):
        qk.pass_codes(chain())

"""One packed network for several bit-widths: each equals the fake-quantized one, in memory and from one file."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from safetensors import safe_open
from test_checkpoint import edit, rewrite
from torch import Tensor, nn

import quantkernels as qk
from quantkernels.nn import PackedLayer, SwitchableBatchNorm2d, calibrate_batch_norm

WIDTHS = [8, 6, 5, 4, 2]


class Net(nn.Module):
    def __init__(self, width: int = 9) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.last_norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.last_norm(self.depthwise(x)) + x)
        return self.head(x.mean((2, 3)))


def trained(weight=None, activation="pact", **options) -> nn.Module:
    """An adaptive network after some joint steps: batch-norms and clipping levels of all bit-widths differ."""
    torch.manual_seed(3)
    weight = qk.ModifiedDoReFa(8) if weight is None else weight
    activation = qk.PACT(8, alpha=2.0, per_bit=WIDTHS) if activation == "pact" else activation
    model = qk.prepare(Net(), weight=weight, activation=activation, **options)
    qk.switch_batch_norms(model, WIDTHS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        x = torch.randn(8, 3, 6, 6)
        optimizer.zero_grad()
        with qk.shared_statistics():
            sum(qk.set_bits(model, bits)(x + bits).square().mean() for bits in WIDTHS).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(1))


CASES = {
    "modified": {},
    "centred, rescaled head": {
        "weight": qk.CentredDoReFa(8),
        "overrides": {"head": {"weight": qk.CentredDoReFa(8, rescale=True)}},
    },
    "weights only": {"activation": None},
    "a float weight, a float input": {"overrides": {"head": {"weight": qk.Identity()}, "stem": {"activation": None}}},
    "lsq activations": {"activation": qk.LSQ(8, per_bit=WIDTHS)},
    "a float layer": {"skip": ["stem"]},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fold", [True, False])
def test_one_file_is_every_bit_width(case, fold, x, tmp_path):
    model = trained(**CASES[case])
    packed = qk.convert(model, fold=fold, bit_widths=WIDTHS)
    qk.save(packed, tmp_path / "net.safetensors")
    loaded = [qk.load(tmp_path / "net.safetensors", architecture) for architecture in (Net(), model)]
    logits = []
    with torch.no_grad():
        for bits in [*WIDTHS, *reversed(WIDTHS)]:
            logits.append(qk.set_bits(model, bits)(x))
            for network in (packed, *loaded):
                assert torch.equal(qk.set_bits(network, bits)(x), logits[-1])
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(logits[: len(WIDTHS)]))


def test_the_planes_are_there_once_and_the_first_ones_are_in_use():
    model = trained()
    packed = qk.convert(model, bit_widths=WIDTHS)
    assert packed.stem.planes.shape[0] == 8 and packed.stem.weight_bits == 8
    qk.set_bits(model, 4)
    single = qk.convert(model, fold=False)
    qk.set_bits(packed, 4)
    for name in ("stem", "depthwise", "head"):
        layer, alone = getattr(packed, name), getattr(single, name)
        assert torch.equal(layer.active_planes, alone.planes)
        assert layer.active_planes.data_ptr() == layer.planes.data_ptr()
        assert (layer.weight_bits, layer.activation_bits) == (4, 4)
        assert torch.equal(layer.weight_planes().decode(), alone.weight_planes().decode())
    assert type(single.norm) is nn.BatchNorm2d


def test_the_present_precision_alone_is_packed_and_folded(x):
    model = qk.set_bits(trained(), 2)
    packed = qk.convert(model)
    assert packed.stem.folded == "norm" and isinstance(packed.norm, nn.Identity)
    with torch.no_grad():
        assert torch.equal(packed(x), model(x))
    with pytest.raises(ValueError, match="has 2 weight bits, not 4"):
        qk.set_bits(packed, 4)


def test_some_of_the_bit_widths(x):
    model = trained()
    packed = qk.convert(model, fold=False, bit_widths=[2, 4])
    assert packed.stem.planes.shape[0] == 4 and packed.norm.widths == [4, 2] and packed.norm.bits == 4
    with torch.no_grad():
        for bits in (4, 2):
            assert torch.equal(qk.set_bits(packed, bits)(x), qk.set_bits(model, bits)(x))


def test_batch_norms_are_folded_for_each_bit_width():
    model = trained()
    packed = qk.convert(model, bit_widths=WIDTHS)
    assert packed.stem.folded == "norm" and isinstance(packed.norm, nn.Identity)
    assert packed.stem.scale.shape == packed.stem.shift.shape == (5, 9)
    qk.set_bits(packed, 4)
    norm = model.norm.norms["4"]
    torch.testing.assert_close(packed.stem.epilogue.scale, norm.weight / (norm.running_var + norm.eps).sqrt())


def test_a_batch_norm_that_goes_with_another_layer_is_not_folded():
    class Backwards(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = self._modules.pop("norm")  # registered last: a policy switches it with the head

    model = qk.prepare(Backwards(), weight=qk.ModifiedDoReFa(8), activation=None)
    packed = qk.convert(qk.switch_batch_norms(model, WIDTHS), bit_widths=WIDTHS)
    assert packed.stem.folded is None and packed.depthwise.folded == "last_norm"


@pytest.mark.parametrize("fold", [True, False])
def test_a_policy(x, fold):
    model = trained()
    packed = qk.convert(model, fold=fold, bit_widths=WIDTHS)
    policy = {"stem": (8, 6), "depthwise": (2, 4), "head": (4, None)}
    for network in (model, packed):
        qk.set_bits(qk.set_bits(network, 8), policy)
    assert fold or (packed.norm.bits, packed.last_norm.bits) == (8, 2)
    assert (packed.head.weight_bits, packed.head.activation_bits) == (4, 8)
    with torch.no_grad():
        assert torch.equal(packed(x), model(x))
    with pytest.raises(ValueError, match="'tail' matches no layer; the nearest are"):
        qk.set_bits(packed, {"tail": (2, 2)})
    with pytest.raises(ValueError, match=r"has \[8, 6, 5, 4, 2\] activation bits, not 3"):
        qk.set_bits(packed, {"head": (4, 3)})


def test_a_bit_width_that_was_not_trained(x):
    """Nearest trained batch-norm and clipping level, then calibration: also of the packed network itself."""
    model = trained()
    qk.copy_bits(model, 6, 5)
    packed = qk.convert(model, fold=False, bit_widths=WIDTHS)
    batches = [torch.randn(8, 3, 6, 6) for _ in range(3)]
    for network in (model, packed):
        calibrate_batch_norm(qk.set_bits(network, 5), batches)
    assert torch.equal(model.stem.activation_quantizer.alpha[2], model.stem.activation_quantizer.alpha[1])
    with torch.no_grad():
        assert torch.equal(packed(x), model(x))


def test_errors():
    model = trained()
    for widths, message in (([8, 3], "not for 3"), ([], "at least one"), ([9], "1 to 8"), ([4, 4], "different")):
        with pytest.raises(ValueError, match=message):
            qk.convert(model, bit_widths=widths)
    plain = qk.prepare(Net(), weight=qk.MinMax(8), activation=qk.PACT(8))
    with pytest.raises(ValueError, match="codes are nested, such as ModifiedDoReFa's, got MinMax"):
        qk.convert(plain, bit_widths=[8, 4])


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "net.safetensors"
    qk.save(qk.convert(trained(), fold=False, bit_widths=WIDTHS), file)
    return file


def test_the_records_are_the_documented_ones(path):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        grids = {name: file.get_slice(name).get_shape() for name in file.keys() if "grid" in name}  # noqa: SIM118
    assert metadata["format_version"] == "2"
    records = json.loads(metadata["layers"])
    several = {"kind": "uniform", "bits": 8, "levels": 255, "bit_widths": WIDTHS}
    assert records["head"]["weight"] == records["head"]["activation"] == several
    assert records["norm"] == {"type": "switchable_batch_norm2d", "features": 9, "bit_widths": WIDTHS}
    assert grids["head.weight_grid"] == grids["head.activation_grid"] == [5, 1, 3]


@pytest.mark.parametrize(
    "layers",
    [
        edit("stem", "weight", "bit_widths", value=[8, 4, 6, 5, 2]),
        edit("stem", "weight", "bit_widths", value=[8, 6, 4, 2]),
        edit("stem", "weight", "bit_widths", value=[]),
        edit("stem", "weight", "bit_widths", value=[6, 5, 4, 3, 2]),
        edit("stem", "weight", "bit_widths", value=[9, 6, 5, 4, 2]),
        edit("stem", "weight", "bit_widths", value=[8, 6, 6, 4, 2]),
        edit("stem", "weight", "bit_widths", value=3),
        edit("stem", "weight", value={"kind": "uniform", "bits": 8, "levels": 255}),
        edit("stem", "activation", value={"kind": "uniform", "bits": 8, "levels": 255}),
        edit("stem", "weight", "kind", value="binary"),
        edit("norm", "bit_widths", value=[2, 8]),
        edit("norm", "features", value="9"),
        edit("norm", "more", value=1),
    ],
)
def test_records_that_are_not_consistent(path, layers):
    rewrite(path, layers=layers)
    with pytest.raises(qk.CorruptCheckpointError, match="save the network again"):
        qk.load(path, Net())


def test_several_bit_widths_are_no_version_1(path):
    rewrite(path, metadata={"format_version": "1"})
    with pytest.raises(qk.CorruptCheckpointError, match="not one this library understands"):
        qk.load(path, Net())


def test_another_architecture(path):
    class NoNorm(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.Identity()

    with pytest.raises(qk.CheckpointArchitectureError, match="'norm' is a batch-norm of 9 channels in the file"):
        qk.load(path, NoNorm())
    with pytest.raises(qk.CheckpointArchitectureError, match=r"norms\.5\.weight' is in the model and not in the file"):
        rewrite(path, layers=edit("norm", "bit_widths", value=[8, 5, 2]), tensors={"norm.norms.5.weight": None})
        qk.load(path, Net())


def test_copies_and_kinds(path):
    loaded = qk.load(path, Net())
    assert isinstance(loaded.norm, SwitchableBatchNorm2d)
    twin = copy.deepcopy(qk.set_bits(loaded, 2))
    assert {m.weight_bits for m in twin.modules() if isinstance(m, PackedLayer)} == {2}
    assert "of [8, 6, 5, 4, 2]" in repr(twin.head)

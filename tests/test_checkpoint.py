"""save and load: round trips, and files that are damaged, old, foreign or hostile."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import quantkernels as qk
from quantkernels import checkpoint
from quantkernels.nn import PackedLayer


class Net(nn.Module):
    def __init__(self, width: int = 8, classes: int = 5, padding_mode: str = "zeros") -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False, padding_mode=padding_mode)
        self.norm = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.last_norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.last_norm(torch.relu(self.depthwise(x)))
        return self.head(x.mean((2, 3)))


def contents(file) -> tuple[dict, dict]:
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name).tolist() for name in opened.keys()}  # noqa: SIM118
        return opened.metadata(), tensors


def trained(**changes) -> nn.Module:
    torch.manual_seed(14)
    arguments = {"weight": qk.MinMax(3, axis=0), "activation": qk.PACT(4, alpha=2.0)} | changes
    model = qk.prepare(Net(), **arguments)
    for _ in range(2):
        model(torch.randn(4, 3, 6, 6))
    return model.eval()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "net.safetensors"
    qk.save(qk.convert(trained()), file)
    return file


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight": qk.BWN()},
        {"weight": qk.TWN(axis=0), "activation": qk.MinMax(8)},
        {"activation": None},
        {"weight": None},
        {"skip": qk.first_and_last},
        {"overrides": {"head": {"weight": None}, "stem": {"activation": None}, "depthwise": None}},
        {"weight": qk.Attention([qk.SAWB(1), qk.SAWB(2)]).select(0)},
    ],
    ids=str,
)
def test_round_trip(tmp_path, x, changes, fold):
    model = trained(**changes)
    packed = qk.convert(model, fold=fold)
    qk.save(packed, tmp_path / "net.safetensors")
    architecture = Net()
    before = copy.deepcopy(architecture.state_dict())
    for target in (architecture, model):
        loaded = qk.load(tmp_path / "net.safetensors", target)
        assert not loaded.training
        with torch.no_grad():
            assert torch.equal(loaded(x), packed(x))
    assert all(torch.equal(v, before[k]) for k, v in architecture.state_dict().items())
    qk.save(loaded, tmp_path / "again.safetensors")
    assert contents(tmp_path / "again.safetensors") == contents(tmp_path / "net.safetensors")


def test_the_file_is_as_small_as_its_bits(tmp_path):
    model = qk.prepare(nn.Linear(4096, 256, bias=False), weight=qk.MinMax(2), activation=qk.PACT(2))
    qk.save(qk.convert(model), tmp_path / "net.safetensors")
    assert (tmp_path / "net.safetensors").stat().st_size < 4096 * 256 * 2 / 8 + 2000


def test_metadata_is_the_documented_one(path):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "quantkernels" and metadata["format_version"] == "1"
    layers = json.loads(metadata["layers"])
    assert layers["stem"] == {
        "type": "conv2d",
        "shape": [8, 3, 3, 3],
        "stride": [1, 1],
        "padding": [1, 1, 1, 1],
        "dilation": [1, 1],
        "groups": 1,
        "padding_mode": "zeros",
        "weight": {"kind": "uniform", "bits": 3, "levels": 7},
        "activation": {"kind": "uniform", "bits": 4, "levels": 15},
        "folded": "norm",
    }
    assert layers["depthwise"]["folded"] is None


def test_saving_replaces_the_file_in_one_step(path, monkeypatch):
    good = path.read_bytes()

    def fail(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        qk.save(qk.convert(trained()), path)
    assert path.read_bytes() == good
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_save_refuses_what_is_not_packed(tmp_path):
    for model, message in ((Net(), "no packed layers"), (trained(), "'stem' is not packed")):
        with pytest.raises(ValueError, match=rf"{message}; call convert\(\) first"):
            qk.save(model, tmp_path / "net.safetensors")


def refused(
    path, model: nn.Module | None = None, error: type = qk.CorruptCheckpointError, match: str | None = None
) -> None:
    model = model or Net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match) as caught:
        qk.load(path, model)
    assert isinstance(caught.value, qk.CheckpointError)
    assert str(path) in str(caught.value)
    assert not any(isinstance(m, PackedLayer) for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_truncation_at_every_offset_class(path):
    content = path.read_bytes()
    offsets = sorted({*range(0, 40), *range(40, len(content), 97), len(content) - 1})
    for offset in offsets:
        path.write_bytes(content[:offset])
        refused(path, match="damaged or was cut short")


def test_any_flipped_byte_is_noticed(path, x):
    content = bytearray(path.read_bytes())
    for offset in [*range(0, 64), *range(64, len(content), 61)]:
        damaged = bytearray(content)
        damaged[offset] ^= 1 << (offset % 8)
        path.write_bytes(damaged)
        with pytest.raises(qk.CheckpointError):
            qk.load(path, Net())


def test_appended_bytes_and_empty_and_foreign_files(path, tmp_path):
    path.write_bytes(path.read_bytes() + b"more")
    refused(path)
    path.write_bytes(b"")
    refused(path)
    path.write_bytes(b"\x80\x04K\x01." * 100)
    refused(path)
    save_file({"a": torch.zeros(3)}, path)
    refused(path, match="not a packed network of quantkernels")
    with pytest.raises(FileNotFoundError, match="no file at"):
        qk.load(tmp_path / "missing.safetensors", Net())


def rewrite(path, *, metadata: dict | None = None, layers=None, tensors: dict | None = None) -> None:
    """Write the file again with changes and a digest that fits them: damage that only the checks can find."""
    with safe_open(path, framework="pt") as file:
        old = dict(file.metadata())
        values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    records = json.loads(old["layers"])
    if layers is not None:
        records = layers(records) or records
    for name, value in (tensors or {}).items():
        if value is None:
            del values[name]
        else:
            values[name] = value(values[name]).contiguous()
    text = records if isinstance(records, str) else checkpoint.canonical(records)
    fitting = {"layers": text, "sha256": checkpoint.digest(text, values)}
    save_file(values, path, metadata={**old, **fitting, **(metadata or {})})


@pytest.mark.parametrize("version", ["0", "4", "1.5", "new"])
def test_wrong_version(path, version):
    rewrite(path, metadata={"format_version": version})
    refused(
        path, error=qk.CheckpointVersionError, match=f"format version {version}, this library reads versions 1 to 3"
    )


def edit(*keys, value):
    def change(records):
        target = records
        for key in keys[:-1]:
            target = target[key]
        target[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "layers",
    [
        edit("stem", "weight", "bits", value=9),
        edit("stem", "weight", "levels", value=511),
        edit("stem", "weight", value={"kind": "uniform", "bits": 9, "levels": 511}),
        edit("stem", "weight", value={"kind": "uniform", "bits": 2, "levels": 3}),
        edit("stem", "weight", "kind", value="identity"),
        edit("stem", "weight", "kind", value=0),
        edit("stem", "weight", "levels", value=7.0),
        edit("stem", "weight", value={"kind": "ternary", "bits": 2, "levels": 2}),
        edit("stem", "activation", value={"kind": "uniform", "bits": 0, "levels": 0}),
        edit("stem", "activation", value=None),
        edit("stem", "weight", value=None),
        edit("stem", "folded", value=None),
        edit("stem", "folded", value=3),
        edit("head", "folded", value="norm"),
        edit("stem", "type", value="conv3d"),
        edit("stem", "extra", value=1),
        edit("stem", value=[]),
        lambda records: "[]",
        lambda records: "{",
        lambda records: "{}",
        lambda records: '"stem"',
    ],
)
def test_records_that_are_not_consistent(path, layers):
    rewrite(path, layers=layers)
    refused(path, match="save the network again")


@pytest.mark.parametrize(
    "tensors",
    [
        {"stem.planes": lambda t: t[:2]},
        {"stem.planes": lambda t: t[:, :, :0]},
        {"stem.planes": lambda t: t[:, :4]},
        {"stem.planes": lambda t: t.float()},
        {"stem.planes": lambda t: t | (1 << 30)},
        {"stem.planes": None},
        {"head.planes": lambda t: t[:, :3]},
        {"stem.weight_grid": lambda t: t[:3]},
        {"stem.weight_grid": lambda t: t.half()},
        {"stem.activation_grid": lambda t: t.repeat(8, 1)},
        {"stem.activation_grid": None},
        {"stem.scale": lambda t: t[:2]},
        {"stem.shift": None},
        {"depthwise.bias": None},
        {"depthwise.bias": lambda t: t[:1]},
    ],
    ids=str,
)
def test_tensors_that_kernels_could_not_run(path, tensors):
    rewrite(path, tensors=tensors)
    refused(path, match="is not consistent")


def test_ternary_planes_must_be_a_thermometer(tmp_path):
    file = tmp_path / "net.safetensors"
    qk.save(qk.convert(trained(weight=qk.TWN())), file)
    rewrite(file, tensors={"stem.planes": lambda t: t.flip(0)})
    refused(file, match="second plane set without the first")


class Deeper(Net):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(5, 5)


class NoNorm(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Net(width=16), r"'stem' differs: shape \[8, 3, 3, 3\] \(model: \[16, 3, 3, 3\]\)"),
        (lambda: Net(classes=7), "'head' differs"),
        (lambda: Net(padding_mode="reflect"), "padding_mode zeros"),
        (Deeper, "'extra.weight' is in the model and not in the file"),
        (NoNorm, "batch-norm 'norm' folded in, which the model does not have"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), "no such module"),
        (lambda: nn.ModuleDict({"stem": nn.Linear(3, 3)}), "'stem' differs|type"),
        (lambda: nn.ModuleDict({"stem": nn.ReLU()}), "a ReLU"),
    ],
)
def test_wrong_architecture(path, make, match):
    refused(path, make(), qk.CheckpointArchitectureError, match)


def test_a_prepared_model_with_a_layer_that_is_floating_in_the_file(tmp_path):
    file = tmp_path / "net.safetensors"
    qk.save(qk.convert(trained(skip=["head"])), file)
    with pytest.raises(qk.CheckpointArchitectureError, match="'head' is quantized in the model and floating"):
        qk.load(file, trained())


def test_float_tensors_of_another_shape(path):
    rewrite(path, tensors={"last_norm.weight": lambda t: t[:3]})
    refused(path, error=qk.CheckpointArchitectureError, match=r"'last_norm.weight' has shape \[3\]")

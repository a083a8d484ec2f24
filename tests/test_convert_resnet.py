"""The net that was trained is the net that runs: ResNet-18 on digits, 1 to 8 bits, prepared, trained a little,
converted, saved, loaded. Not folded, its logits are bit-identical; folded, the differences are counted and bounded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import quantkernels as qk
from quantkernels.nn import PackedConv2d, PackedLayer, QuantizedLayer

models = pytest.importorskip("training.models")
datasets = pytest.importorskip("sklearn.datasets")

# One network has all bits from 1 to 8, weights and activations, a pair a layer; others have the same everywhere.
EVERY_BITS = {n: (qk.MinMax(1 + n % 8, axis=0), qk.PACT(8 - n % 7, alpha=3.0)) for n in range(21)}
CASES = {
    "min-max, 1 to 8 bits": (qk.MinMax(2), 2, EVERY_BITS),
    "min-max, 2 bits": (qk.MinMax(2), 2, {}),
    "sawb, 1 to 8 bits": (qk.SAWB(4), 4, {n: (qk.SAWB(8 - n % 8), qk.PACT(1 + n % 8, alpha=3.0)) for n in range(21)}),
    "bwn": (qk.BWN(axis=0), 3, {}),
    "twn": (qk.TWN(), 8, {}),
}


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor]:
    data = datasets.load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return images[:1437], torch.tensor(data.target[:1437]), images[1437:]


@pytest.fixture(scope="module")
def start(digits) -> nn.Module:
    """A float ResNet-18 after some steps, so that batch-norm has statistics and the logits mean something."""
    torch.manual_seed(15)
    model = models.build_model("resnet18", 10, in_channels=1, stem="imagenet")
    train(model, digits, steps=12)
    return model


def train(model: nn.Module, digits: tuple[Tensor, Tensor, Tensor], steps: int) -> None:
    images, labels, _ = digits
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    model.train()
    for step in range(steps):
        chosen = torch.arange(step * 64, step * 64 + 64) % len(images)
        optimizer.zero_grad()
        functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    model.eval()


def quantized(start: nn.Module, digits, weight: qk.Quantizer, activation_bits: int, special) -> nn.Module:
    model = models.build_model("resnet18", 10, in_channels=1, stem="imagenet")
    model.load_state_dict(start.state_dict())
    # The input is in [-1, 1]: PACT, which starts at 0, would drop half of it.
    names = [name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    overrides = {names[n]: {"weight": w, "activation": a} for n, (w, a) in special.items()}
    overrides["conv1"] = {"activation": qk.MinMax(8)}
    model = qk.prepare(model, weight=weight, activation=qk.PACT(activation_bits, alpha=3.0), overrides=overrides)
    train(model, digits, steps=4)
    return model


class Recorder:
    """What every layer of some types gets and gives in one forward."""

    def __init__(self, model: nn.Module, kinds: tuple[type, ...]) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.handles = [
            m.register_forward_hook(
                lambda _, x, y, n=n: (self.inputs.update({n: x[0]}), self.outputs.update({n: y}), None)[2]
            )
            for n, m in model.named_modules()
            if isinstance(m, kinds)
        ]

    def _record(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.inputs[name], self.outputs[name] = inputs[0], output

        return hook

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def count_differing(
    packed: nn.Module, images: Tensor, inputs: dict[str, Tensor], restart: bool
) -> tuple[Tensor, float]:
    """Logits, and the share of all activation codes that differ from those of `inputs`, what the trained layers got.

    restart: each layer is then given that input, so that differences are counted where they arise and not carried on.
    """
    differing = total = 0

    def hook(name: str) -> Callable[..., object]:
        def compare(layer: PackedLayer, given: tuple[Tensor, ...]) -> object:
            nonlocal differing, total
            assert layer.activation is not None
            mine, theirs = (qk.ops.encode(x, *layer.activation) for x in (given[0], inputs[name]))
            differing += int((mine != theirs).sum())
            total += mine.numel()
            return (inputs[name],) if restart else None

        return compare

    layers = [(name, m) for name, m in packed.named_modules() if isinstance(m, PackedLayer)]
    handles = [m.register_forward_pre_hook(hook(name)) for name, m in layers]
    logits = packed(images)
    for handle in handles:
        handle.remove()
    return logits, differing / total


@pytest.mark.parametrize("case", CASES)
def test_resnet18(tmp_path, start, digits, case):
    model = quantized(start, digits, *CASES[case])
    architecture = models.build_model("resnet18", 10, in_channels=1, stem="imagenet")
    images = digits[2]
    kinds = (QuantizedLayer, PackedLayer, nn.BatchNorm2d)
    with torch.no_grad():
        recorded = Recorder(model, kinds)
        logits = model(images)
        recorded.close()

        qk.save(qk.convert(model, fold=False), tmp_path / "exact.safetensors")
        exact = qk.load(tmp_path / "exact.safetensors", architecture)
        assert torch.equal(exact(images), logits)

        qk.save(qk.convert(model), tmp_path / "folded.safetensors")
        folded = qk.load(tmp_path / "folded.safetensors", architecture)
        layers = {name: m for name, m in folded.named_modules() if isinstance(m, PackedLayer)}
        assert sum(m.folded is not None for m in layers.values()) == 20
        for name, layer in layers.items():
            expected = recorded.outputs[layer.folded or name]
            # Equal input codes: the layer gets what the trained network's layer got.
            difference = (layer(recorded.inputs[name]) - expected).abs().max()
            assert difference <= 1e-6 * expected.abs().max(), name

        folded_logits, carried = count_differing(folded, images, recorded.inputs, restart=False)
        _, crossed = count_differing(folded, images, recorded.inputs, restart=True)
    print(f"{case}: share of codes across a tie {crossed:.1e}, with what follows from them {carried:.1e}")
    assert crossed < 1e-5
    assert carried < 1e-5
    assert torch.equal(folded_logits.argmax(1), logits.argmax(1))
    assert logits.argmax(1).unique().numel() > 1, "a network that always says the same shows nothing"
    assert sum(isinstance(m, PackedConv2d) for m in folded.modules()) == 20

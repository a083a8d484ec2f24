"""State dicts have the names and shapes of torchvision's networks, so that its checkpoints load.

torchvision is not needed: the names are written out here from the architectures, apart from the networks' code, and
held to the published numbers of parameters.
"""

from itertools import pairwise

import pytest
import torch

from training.config import UserError
from training.models import build_model
from training.run_folder import load_state


def norm(name, channels):
    vector = (channels,)
    names = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{key}": vector for key in names} | {f"{name}.num_batches_tracked": ()}


def conv(name, inputs, outputs, kernel, bias=False):
    return {f"{name}.weight": (outputs, inputs, kernel, kernel)} | ({f"{name}.bias": (outputs,)} if bias else {})


def linear(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def resnet(blocks, bottleneck):
    names = conv("conv1", 3, 64, 7) | norm("bn1", 64)
    inputs = 64
    for stage, (count, width) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True), start=1):
        outputs = width * (4 if bottleneck else 1)
        for block in range(count):
            at = f"layer{stage}.{block}"
            if bottleneck:
                convs = [(inputs, width, 1), (width, width, 3), (width, outputs, 1)]
            else:
                convs = [(inputs, width, 3), (width, width, 3)]
            for i, shape in enumerate(convs, start=1):
                names |= conv(f"{at}.conv{i}", *shape) | norm(f"{at}.bn{i}", shape[1])
            if block == 0 and (stage > 1 or bottleneck):
                names |= conv(f"{at}.downsample.0", inputs, outputs, 1) | norm(f"{at}.downsample.1", outputs)
            inputs = outputs
    return names | linear("fc", inputs, 1000)


def alexnet():
    names = {}
    places = {0: 11, 3: 5, 6: 3, 8: 3, 10: 3}
    for (inputs, outputs), (i, kernel) in zip(pairwise((3, 64, 192, 384, 256, 256)), places.items(), strict=True):
        names |= conv(f"features.{i}", inputs, outputs, kernel, bias=True)
    for i, sizes in {1: (9216, 4096), 4: (4096, 4096), 6: (4096, 1000)}.items():
        names |= linear(f"classifier.{i}", *sizes)
    return names


INCEPTIONS = """3a 192 64 96 128 16 32 32
3b 256 128 128 192 32 96 64
4a 480 192 96 208 16 48 64
4b 512 160 112 224 24 64 64
4c 512 128 128 256 24 64 64
4d 512 112 144 288 32 64 64
4e 528 256 160 320 32 128 128
5a 832 256 160 320 32 128 128
5b 832 384 192 384 48 128 128"""


def googlenet():
    def unit(name, inputs, outputs, kernel):
        return conv(f"{name}.conv", inputs, outputs, kernel) | norm(f"{name}.bn", outputs)

    names = unit("conv1", 3, 64, 7) | unit("conv2", 64, 64, 1) | unit("conv3", 64, 192, 3)
    for line in INCEPTIONS.splitlines():
        name, *channels = line.split()
        inputs, one, reduce3, three, reduce5, five, pooled = map(int, channels)
        at = f"inception{name}"
        names |= unit(f"{at}.branch1", inputs, one, 1) | unit(f"{at}.branch4.1", inputs, pooled, 1)
        names |= unit(f"{at}.branch2.0", inputs, reduce3, 1) | unit(f"{at}.branch2.1", reduce3, three, 3)
        names |= unit(f"{at}.branch3.0", inputs, reduce5, 1) | unit(f"{at}.branch3.1", reduce5, five, 3)
    return names | linear("fc", 1024, 1000)


def googlenet_auxiliary():
    names = {}
    for name, inputs in (("aux1", 512), ("aux2", 528)):
        names |= conv(f"{name}.conv.conv", inputs, 128, 1) | norm(f"{name}.conv.bn", 128)
        names |= linear(f"{name}.fc1", 2048, 1024) | linear(f"{name}.fc2", 1024, 1000)
    return names


def mobilenet_v2():
    names = conv("features.0.0", 3, 32, 3) | norm("features.0.1", 32)
    inputs, place = 32, 1
    stages = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
    for expansion, outputs, count in stages:
        for _ in range(count):
            at, hidden, i = f"features.{place}.conv", inputs * expansion, 0
            if expansion > 1:
                names |= conv(f"{at}.0.0", inputs, hidden, 1) | norm(f"{at}.0.1", hidden)
                i = 1
            names |= conv(f"{at}.{i}.0", 1, hidden, 3) | norm(f"{at}.{i}.1", hidden)
            names |= conv(f"{at}.{i + 1}", hidden, outputs, 1) | norm(f"{at}.{i + 2}", outputs)
            inputs, place = outputs, place + 1
    names |= conv("features.18.0", 320, 1280, 1) | norm("features.18.1", 1280)
    return names | linear("classifier.1", 1280, 1000)


NETWORKS = {
    "resnet18": (resnet([2, 2, 2, 2], False), 11_689_512),
    "resnet34": (resnet([3, 4, 6, 3], False), 21_797_672),
    "resnet50": (resnet([3, 4, 6, 3], True), 25_557_032),
    "mobilenet_v2": (mobilenet_v2(), 3_504_872),
    "googlenet": (googlenet(), 6_624_904),
    "alexnet": (alexnet(), 61_100_840),
}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def count_parameters(names):
    shapes = [shape for name, shape in names.items() if not name.endswith(STATISTICS)]
    return sum(torch.Size(shape).numel() for shape in shapes)


@pytest.mark.parametrize("name", NETWORKS)
def test_names_and_shapes(name):
    expected, parameters = NETWORKS[name]
    with torch.device("meta"):
        model = build_model(name, 1000)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected
    assert count_parameters(expected) == parameters == sum(p.numel() for p in model.parameters())


def test_auxiliary_classifiers_of_a_checkpoint_are_left_out(tmp_path):
    names = googlenet() | googlenet_auxiliary()
    assert count_parameters(names) == 13_004_888
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.rand(shape, generator=generator) for name, shape in names.items()}
    torch.save(state, tmp_path / "googlenet.pth")
    model = build_model("googlenet", 1000)
    load_state(model, tmp_path / "googlenet.pth")
    assert torch.equal(model.inception4d.branch3[1].conv.weight, state["inception4d.branch3.1.conv.weight"])


class Surprise:
    def __reduce__(self):
        return print, ("code that a checkpoint must not run",)


def test_a_checkpoint_that_holds_other_objects_is_refused(tmp_path, capsys):
    torch.save({"conv1.weight": Surprise()}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=r"bad\.pth cannot be read as a PyTorch file"):
        load_state(build_model("resnet20", 10), tmp_path / "bad.pth")
    assert capsys.readouterr().out == ""


def test_googlenet_takes_images_normalised_like_all_others():
    from training.models.googlenet import from_imagenet_statistics

    pixels = torch.rand(2, 3, 4, 4)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(from_imagenet_statistics((pixels - mean) / std), (pixels - 0.5) / 0.5)

"""Networks: parameter counts, shapes, names."""

import pytest
import torch
from torch import nn

from training.config import ConfigError
from training.models import build_model

CASES = [
    ("resnet18", {}, 1000, 3, 224, 11_689_512),
    ("resnet18", {"stem": "cifar"}, 10, 3, 32, 11_173_962),
    ("mobilenet_v2", {}, 1000, 3, 224, 3_504_872),
    ("mobilenet_v2", {"stem": "cifar"}, 10, 3, 32, 2_236_682),
    ("resnet20", {}, 10, 3, 32, 269_722),
    ("resnet20", {"shortcut": "B"}, 10, 3, 32, 272_474),
    ("resnet34", {}, 10, 3, 64, 21_289_802),
    ("resnet50", {"stem": "cifar"}, 10, 3, 32, 23_520_842),
    ("preact_resnet20", {}, 10, 3, 32, 270_394),
    ("preact_resnet18", {"stem": "cifar", "shortcut": "A"}, 10, 3, 32, 11_003_978),
    ("mobilenet_v1", {}, 1000, 3, 224, 4_231_976),
    ("mobilenet_v1", {"stem": "cifar", "width": 0.5}, 10, 3, 32, 823_722),
    ("vgg_small", {}, 10, 3, 32, 4_660_106),
    ("googlenet", {}, 1000, 3, 224, 6_624_904),
    ("googlenet_bn", {}, 1000, 3, 224, 12_268_808),
    ("alexnet_bn", {"width": 0.25}, 1000, 3, 227, 4_680_352),
    ("tiny_convnet", {"in_channels": 1}, 10, 1, 8, 14_458),
]


@pytest.mark.parametrize(("name", "options", "classes", "channels", "size", "parameters"), CASES)
def test_shape_and_parameters(name, options, classes, channels, size, parameters):
    model = build_model(name, classes, **options).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    with torch.no_grad():
        assert model(torch.zeros(1, channels, size, size)).shape == (1, classes)


@pytest.mark.parametrize(("name", "size"), [("resnet18", 4), ("mobilenet_v2", 4), ("resnet20", 8)])
def test_cifar_networks_keep_resolution(name, size):
    options = {"stem": "cifar"} if name != "resnet20" else {}
    model = build_model(name, 10, **options).eval()
    seen = []
    model.avgpool.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1]))
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert seen == [size]


def test_names_are_torchvisions():
    resnet = build_model("resnet18", 1000).state_dict()
    for key in ("conv1.weight", "bn1.running_var", "layer1.0.conv2.weight", "layer4.1.bn2.bias", "fc.bias"):
        assert key in resnet
    assert resnet["layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)
    assert "layer2.0.downsample.1.running_mean" in resnet
    assert len(resnet) == 122
    mobilenet = build_model("mobilenet_v2", 1000).state_dict()
    assert mobilenet["features.0.0.weight"].shape == (32, 3, 3, 3)
    assert mobilenet["features.1.conv.1.weight"].shape == (16, 32, 1, 1)
    assert mobilenet["features.2.conv.1.0.weight"].shape == (96, 1, 3, 3)
    assert mobilenet["features.17.conv.3.running_mean"].shape == (320,)
    assert mobilenet["features.18.1.weight"].shape == (1280,)
    assert mobilenet["classifier.1.weight"].shape == (1000, 1280)
    assert len(mobilenet) == 314


def test_kaiming_initialisation():
    conv = build_model("resnet18", 10, stem="cifar").layer3[1].conv1
    assert conv.weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)


def test_tiny_convnet_without_batch_norm():
    model = build_model("tiny_convnet", 10, in_channels=1, batch_norm=False)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet19", {}, r"model\.name = 'resnet19' is not known; did you mean 'resnet18'"),
        ("resnet20", {"shortcut": "C"}, r"model\.shortcut = 'C' is not known"),
        ("resnet18", {"stm": "cifar"}, r"unknown key model\.stm; did you mean 'stem'"),
        ("resnet18", {"stem": "mnist"}, r"model\.stem = 'mnist' is not known"),
        ("tiny_convnet", {"width": 0}, r"model\.width must be an integer of at least 1, got 0"),
        ("tiny_convnet", {"batch_norm": "yes"}, r"model\.batch_norm must be true or false, got 'yes'"),
        ("vgg_small", {"width": 0}, r"model\.width must be a positive number, got 0"),
        ("preact_resnet18", {"shortcut": "C"}, r"model\.shortcut = 'C' is not known"),
        ("googlenet", {"transform_input": 1}, r"model\.transform_input must be true or false, got 1"),
        ("mobilenet_v2", {"dropout": 1}, r"model\.dropout must be a number in \[0, 1\)"),
    ],
)
def test_mistakes_are_named(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build_model(name, 10, **options)

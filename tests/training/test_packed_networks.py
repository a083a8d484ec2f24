"""Every network goes through prepare and convert: the packed network's logits are those of eval mode."""

import pytest
import torch
from torch import nn

import quantkernels as qk
from training.models import MODELS, build_model

# options and the side of a small image
SIZES = {
    "tiny_convnet": ({"width": 4}, 8),
    "resnet20": ({"width": 0.5}, 16),
    "resnet18": ({"width": 0.125}, 32),
    "resnet34": ({"width": 0.125}, 32),
    "resnet50": ({"width": 0.125}, 32),
    "preact_resnet20": ({"width": 0.5}, 16),
    "preact_resnet18": ({"width": 0.125, "shortcut": "A"}, 32),
    "preact_resnet34": ({"width": 0.125}, 32),
    "preact_resnet50": ({"width": 0.125}, 32),
    "mobilenet_v1": ({"width": 0.25}, 32),
    "mobilenet_v2": ({}, 16),
    "vgg_small": ({"width": 0.125}, 16),
    "vgg_variant": ({"width": 0.02}, 64),
    "alexnet": ({"width": 0.1}, 63),
    "alexnet_bn": ({"width": 0.05}, 67),
    "googlenet": ({"width": 0.25}, 32),
    "googlenet_bn": ({"width": 0.125}, 32),
    "video_resnet18": ({"width": 0.125}, 32),
    "video_resnet50": ({"width": 0.125}, 32),
}


def test_every_network_is_here():
    ours = {name for name, build in MODELS.items() if build.__module__.startswith("training.")}  # tests add their own
    assert SIZES.keys() == ours


@pytest.mark.parametrize("name", SIZES)
def test_packed_logits_are_those_of_the_trained_network(name):
    options, size = SIZES[name]
    # PACT would cut off what the linear bottlenecks of MobileNetV2 let through below 0
    activation = qk.MinMax(2) if name == "mobilenet_v2" else qk.PACT(2, alpha=2.0)
    torch.manual_seed(0)
    model = build_model(name, 10, in_channels=3, **options)
    layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())
    model = qk.prepare(model, weight=qk.MinMax(2), activation=activation, skip=qk.first_and_last, strict=True)
    shape = (2, 3) if name.startswith("video") else (6,)
    images = torch.randn(*shape, 3, size, size)
    with torch.no_grad():
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)):
            norm.momentum = None  # the plain mean over the passes that follow
        for _ in range(3):
            model(images)
        logits = model.eval()(images)
        assert torch.equal(qk.convert(model, fold=False)(images), logits)
        folded = qk.convert(model)
        torch.testing.assert_close(folded(images), logits, rtol=1e-5, atol=1e-5)
    assert logits.unique(dim=0).shape[0] > 1, "a network that says the same of all images shows nothing"
    packed = [m for m in folded.modules() if isinstance(m, qk.nn.PackedConv2d | qk.nn.PackedLinear)]
    assert len(packed) == layers - 2

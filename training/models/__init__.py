"""Networks of plain `nn.Conv2d` and `nn.Linear` layers, built by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from training.config import choose
from training.models.alexnet import alexnet, alexnet_bn
from training.models.googlenet import googlenet, googlenet_bn
from training.models.mobilenet import mobilenet_v1, mobilenet_v2
from training.models.preactivation import preact_resnet18, preact_resnet20, preact_resnet34, preact_resnet50
from training.models.resnet import resnet18, resnet20, resnet34, resnet50
from training.models.tiny import tiny_convnet
from training.models.vgg import vgg_small, vgg_variant
from training.models.video import video_resnet18, video_resnet50
from training.options import call_with_options

MODELS: dict[str, Callable[..., nn.Module]] = {
    function.__name__: function
    for function in (
        tiny_convnet,
        resnet20,
        resnet18,
        resnet34,
        resnet50,
        preact_resnet20,
        preact_resnet18,
        preact_resnet34,
        preact_resnet50,
        mobilenet_v1,
        mobilenet_v2,
        vgg_small,
        vgg_variant,
        alexnet,
        alexnet_bn,
        googlenet,
        googlenet_bn,
        video_resnet18,
        video_resnet50,
    )
}


def build_model(name: str, num_classes: int, *, in_channels: int = 3, **options: Any) -> nn.Module:
    """A freshly initialised network: [N, in_channels, H, W] (clips: [N, T, ...]) -> logits [N, num_classes].

    Raises `training.config.ConfigError` for an unknown name (see `MODELS`), option or value of an option.
    """
    function = MODELS[choose(name, MODELS, "model.name")]
    return call_with_options(function, options, "model", num_classes, in_channels)

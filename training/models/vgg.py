"""The two VGG networks of HWGQ (Cai et al., 2017) and LQ-Nets: convolution, (pooling,) batch-norm, ReLU."""

from __future__ import annotations

from torch import nn

from training.models.layers import initialise, scaled


def conv_pool_norm_relu(inputs: int, outputs: int, kernel: int = 3, pool: nn.Module | None = None) -> list[nn.Module]:
    """A convolution that keeps the image's size, pooling where given, batch-norm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return [conv, *([pool] if pool is not None else []), nn.BatchNorm2d(outputs), nn.ReLU()]


def linear_norm_relu(inputs: int, outputs: int) -> list[nn.Module]:
    """A linear layer, batch-norm, ReLU."""
    return [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]


def vgg_small(num_classes: int, in_channels: int, width: float = 1.0) -> nn.Sequential:
    """VGG-Small for 32x32 images: pairs of 128, 256 and 512 channels, each pair pooled, and one linear layer."""
    layers: list[nn.Module] = []
    inputs = in_channels
    for channels in (128, 256, 512):
        outputs = scaled(channels, width)
        layers += conv_pool_norm_relu(inputs, outputs)
        layers += conv_pool_norm_relu(outputs, outputs, pool=nn.MaxPool2d(2))
        inputs = outputs
    # as in the paper 4x4 pixels reach the linear layer; images of other sizes are averaged to that
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * inputs, num_classes))
    initialise(model)
    return model


def vgg_variant(num_classes: int, in_channels: int, width: float = 1.0) -> nn.Sequential:
    """VGG-Variant for 224x224 images: model A of He et al. (2015, "Delving deep") without its pyramid pooling.

    A 7x7 convolution of stride 2, then three convolutions each of 256, 512 and 512 channels, two layers of 4096.
    """
    first, hidden = scaled(96, width), scaled(4096, width)
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, first, 7, 2, padding=3, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(first),
        nn.ReLU(),
    ]
    inputs = first
    for channels in (256, 512, 512):
        outputs = scaled(channels, width)
        layers += conv_pool_norm_relu(inputs, outputs)
        layers += conv_pool_norm_relu(outputs, outputs)
        layers += conv_pool_norm_relu(outputs, outputs, pool=nn.MaxPool2d(2))
        inputs = outputs
    model = nn.Sequential(
        *layers,
        nn.AdaptiveAvgPool2d(7),
        nn.Flatten(),
        *linear_norm_relu(49 * inputs, hidden),
        *linear_norm_relu(hidden, hidden),
        nn.Linear(hidden, num_classes),
    )
    initialise(model)
    return model

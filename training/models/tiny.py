"""A convolutional network small enough for the 8x8 digits, for demos and tests."""

from __future__ import annotations

from torch import nn

from training.config import require
from training.models.layers import initialise


def tiny_convnet(num_classes: int, in_channels: int, width: int = 16, batch_norm: bool = True) -> nn.Sequential:
    """Three 3x3 convolutions of width, 2 width and 2 width channels (the second strided), and a linear layer.

    `batch_norm=False` gives a network whose samples do not influence each other, so that training on several
    processes computes what one process computes.
    """
    require(type(width) is int and width >= 1, "model.width", "an integer of at least 1", width)
    require(type(batch_norm) is bool, "model.batch_norm", "true or false", batch_norm)

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=not batch_norm)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()] if batch_norm else [conv, nn.ReLU()]

    model = nn.Sequential(
        *block(in_channels, width, 1),
        *block(width, 2 * width, 2),
        *block(2 * width, 2 * width, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, num_classes),
    )
    initialise(model)
    return model

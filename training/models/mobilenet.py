"""MobileNetV1 (Howard et al., 2017, table 1) and MobileNetV2 (Sandler et al., 2018, table 2).

MobileNetV2 has torchvision's parameter names; torchvision has no MobileNetV1.
"""

from __future__ import annotations

import torch
from torch import nn

from training.config import choose
from training.models.layers import check_dropout, initialise, scaled

# expansion, output channels, blocks, stride of the first one
STAGES = [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]


def conv_norm_relu(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, batch-norm, ReLU6."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


class InvertedResidual(nn.Module):
    """Expansion (1x1), depthwise (3x3), linear projection (1x1); a shortcut where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [conv_norm_relu(inputs, hidden, 1)] if expansion != 1 else []
        self.conv = nn.Sequential(
            *expand,
            conv_norm_relu(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.use_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""
        return x + self.conv(x) if self.use_shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """``features`` (stem, inverted residuals, 1x1 convolution) and ``classifier`` (dropout, linear)."""

    def __init__(self, num_classes: int, in_channels: int, stem: str, dropout: float) -> None:
        super().__init__()
        small = stem == "cifar"
        features: list[nn.Module] = [conv_norm_relu(in_channels, 32, 3, 1 if small else 2)]
        inputs = 32
        for expansion, outputs, blocks, stride in STAGES:
            if small and outputs == 24:  # 32x32 images are halved three times, not five
                stride = 1
            for i in range(blocks):
                features.append(InvertedResidual(inputs, outputs, 1 if i else stride, expansion))
                inputs = outputs
        features.append(conv_norm_relu(inputs, 1280, 1))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(1280, num_classes))
        initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, in_channels, H, W] -> logits [N, num_classes]."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def mobilenet_v2(num_classes: int, in_channels: int, stem: str = "imagenet", dropout: float = 0.2) -> MobileNetV2:
    """MobileNetV2, width 1; stem "imagenet" (224x224 images) or "cifar" (32x32, two strides of 2 less)."""
    choose(stem, ("imagenet", "cifar"), "model.stem")
    check_dropout(dropout)
    return MobileNetV2(num_classes, in_channels, stem, dropout)


# MobileNetV1: output channels and stride of the depthwise convolution before them
SEPARABLE = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]


class MobileNetV1(nn.Module):
    """``features`` (stem, pairs of depthwise 3x3 and 1x1 convolutions) and ``classifier`` (dropout, linear)."""

    def __init__(self, num_classes: int, in_channels: int, stem: str, dropout: float, width: float) -> None:
        super().__init__()
        small = stem == "cifar"
        inputs = scaled(32, width)
        features: list[nn.Module] = [conv_norm_relu(in_channels, inputs, 3, 1 if small else 2)]
        for channels, stride in SEPARABLE:
            if small and channels == 128:  # 32x32 images are halved three times, not five
                stride = 1
            outputs = scaled(channels, width)
            depthwise = conv_norm_relu(inputs, inputs, 3, stride, groups=inputs)
            features.append(nn.Sequential(depthwise, conv_norm_relu(inputs, outputs, 1)))
            inputs = outputs
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(inputs, num_classes))
        initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, in_channels, H, W] -> logits [N, num_classes]."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def mobilenet_v1(
    num_classes: int, in_channels: int, stem: str = "imagenet", dropout: float = 0.001, width: float = 1.0
) -> MobileNetV1:
    """MobileNetV1; stem "imagenet" (224x224 images) or "cifar" (32x32, two strides of 2 less)."""
    choose(stem, ("imagenet", "cifar"), "model.stem")
    check_dropout(dropout)
    return MobileNetV1(num_classes, in_channels, stem, dropout, width)

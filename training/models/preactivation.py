"""Residual networks in the order batch-norm, ReLU, (quantizer,) convolution, as LQ-Nets trains them.

He et al., "Identity Mappings in Deep Residual Networks" (2016), with two changes of LQ-Nets' published networks:
a stage ends in batch-norm and ReLU, so that the first block of the next one takes activated input on its shortcut too;
and a block ends in a batch-norm of its own, before the sum.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from training.config import choose
from training.models.layers import initialise, scaled


class PoolShortcut(nn.Module):
    """Type A: average pooling, and zeros for the new channels; no parameters."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, C + new_channels, H / stride, W / stride], rounded up, the zeros behind."""
        x = F.avg_pool2d(x, self.stride, ceil_mode=True) if self.stride > 1 else x
        return F.pad(x, (0, 0, 0, 0, 0, self.new_channels))


def basic_body(inputs: int, width: int, stride: int) -> nn.Sequential:
    """Two 3x3 convolutions."""
    return nn.Sequential(
        nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
    )


def bottleneck_body(inputs: int, width: int, stride: int) -> nn.Sequential:
    """1x1, 3x3 (which has the stride) and 1x1 convolutions."""
    return nn.Sequential(
        nn.Conv2d(inputs, width, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 4 * width, 1, bias=False),
        nn.BatchNorm2d(4 * width),
    )


class PreactivationBlock(nn.Module):
    """Batch-norm and ReLU (not in the first block of a stage, whose input has passed them), convolutions, shortcut."""

    def __init__(
        self, inputs: int, width: int, stride: int, shortcut: str, first: bool, bottleneck: bool = False
    ) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        self.preactivation = nn.Identity() if first else nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.body = (bottleneck_body if bottleneck else basic_body)(inputs, width, stride)
        self.shortcut: nn.Module = nn.Identity()
        if (stride != 1 or inputs != outputs) and shortcut == "A":
            self.shortcut = PoolShortcut(outputs - inputs, stride)
        elif stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""
        return self.body(self.preactivation(x)) + self.shortcut(x)


class PreactivationResNet(nn.Module):
    """``stem``, then ``stages`` that each end in batch-norm and ReLU and halve the image but for the first; ``fc``."""

    def __init__(
        self,
        widths: list[int],
        blocks: list[int],
        bottleneck: bool,
        num_classes: int,
        in_channels: int,
        stem: str,
        shortcut: str,
    ) -> None:
        super().__init__()
        large = stem == "imagenet"
        kernel, stride = (7, 2) if large else (3, 1)
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], kernel, stride, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, padding=1) if large else nn.Identity(),
        )
        stages: list[nn.Module] = []
        inputs = widths[0]
        for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            members: list[nn.Module] = []
            for j in range(count):
                stride = 2 if i and not j else 1
                members.append(PreactivationBlock(inputs, width, stride, shortcut, j == 0, bottleneck))
                inputs = 4 * width if bottleneck else width
            stages.append(nn.Sequential(*members, nn.BatchNorm2d(inputs), nn.ReLU()))
        self.stages = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, in_channels, H, W] -> logits [N, num_classes]."""
        return self.fc(torch.flatten(self.avgpool(self.stages(self.stem(x))), 1))


DEPTHS = {18: ([2, 2, 2, 2], False), 34: ([3, 4, 6, 3], False), 50: ([3, 4, 6, 3], True)}


def _resnet(
    depth: int, num_classes: int, in_channels: int, stem: str, shortcut: str, width: float
) -> PreactivationResNet:
    choose(stem, ("imagenet", "cifar"), "model.stem")
    choose(shortcut, ("A", "B"), "model.shortcut")
    blocks, bottleneck = DEPTHS[depth]
    widths = [scaled(channels, width) for channels in (64, 128, 256, 512)]
    return PreactivationResNet(widths, blocks, bottleneck, num_classes, in_channels, stem, shortcut)


def preact_resnet20(num_classes: int, in_channels: int, shortcut: str = "A", width: float = 1.0) -> PreactivationResNet:
    """ResNet-20 for 32x32 images; shortcut "A" (pooling and zero channels) or "B" (1x1 convolution)."""
    choose(shortcut, ("A", "B"), "model.shortcut")
    widths = [scaled(channels, width) for channels in (16, 32, 64)]
    return PreactivationResNet(widths, [3, 3, 3], False, num_classes, in_channels, "cifar", shortcut)


def preact_resnet18(
    num_classes: int, in_channels: int, stem: str = "imagenet", shortcut: str = "B", width: float = 1.0
) -> PreactivationResNet:
    """ResNet-18; stem as in `training.models.resnet.resnet18`, shortcut as in `preact_resnet20`."""
    return _resnet(18, num_classes, in_channels, stem, shortcut, width)


def preact_resnet34(
    num_classes: int, in_channels: int, stem: str = "imagenet", shortcut: str = "B", width: float = 1.0
) -> PreactivationResNet:
    """ResNet-34; options as in `preact_resnet18`."""
    return _resnet(34, num_classes, in_channels, stem, shortcut, width)


def preact_resnet50(
    num_classes: int, in_channels: int, stem: str = "imagenet", shortcut: str = "B", width: float = 1.0
) -> PreactivationResNet:
    """ResNet-50; options as in `preact_resnet18`."""
    return _resnet(50, num_classes, in_channels, stem, shortcut, width)

"""Residual networks (He et al., 2016): ResNet-20 and ResNet-18, with torchvision's parameter names."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from training.config import choose
from training.models.layers import initialise


class PadShortcut(nn.Module):
    """Option A: every second pixel, and zeros for the new channels; no parameters."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, C + new_channels, H / stride, W / stride], the zeros on both sides."""
        before = self.new_channels // 2
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch-norm, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            if shortcut == "A":
                self.downsample = PadShortcut(outputs - inputs, stride)
            else:
                projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
                self.downsample = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + identity)


class ResNet(nn.Module):
    """Stem; stages ``layer1``, ... of basic blocks, each but the first halves the image; ``fc``."""

    def __init__(
        self, widths: list[int], blocks: int, num_classes: int, in_channels: int, stem: str, shortcut: str
    ) -> None:
        super().__init__()
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, widths[0], 7, 2, padding=3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(3, 2, padding=1)
        else:
            self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        inputs = widths[0]
        self.stages = [f"layer{i + 1}" for i in range(len(widths))]
        for i, (stage, outputs) in enumerate(zip(self.stages, widths, strict=True)):
            first = BasicBlock(inputs, outputs, 2 if i else 1, shortcut)
            rest = [BasicBlock(outputs, outputs, 1, shortcut) for _ in range(blocks - 1)]
            self.add_module(stage, nn.Sequential(first, *rest))
            inputs = outputs
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], num_classes)
        initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, in_channels, H, W] -> logits [N, num_classes]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet20(num_classes: int, in_channels: int, shortcut: str = "A") -> ResNet:
    """ResNet-20 for 32x32 images, 0.27 M parameters; shortcut "A" (padding) or "B" (1x1 convolution)."""
    choose(shortcut, ("A", "B"), "model.shortcut")
    return ResNet([16, 32, 64], 3, num_classes, in_channels, "cifar", shortcut)


def resnet18(num_classes: int, in_channels: int, stem: str = "imagenet") -> ResNet:
    """ResNet-18; stem "imagenet" (7x7, stride 2, max-pooling, for 224x224) or "cifar" (3x3, for 32x32)."""
    choose(stem, ("imagenet", "cifar"), "model.stem")
    return ResNet([64, 128, 256, 512], 2, num_classes, in_channels, stem, "B")

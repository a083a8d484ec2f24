"""Residual networks (He et al., 2016) with torchvision's parameter names: ResNet-18, -34, -50, and ResNet-20."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from training.config import choose
from training.models.layers import initialise, scaled


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


def make_shortcut(inputs: int, outputs: int, stride: int, shortcut: str) -> nn.Module | None:
    """What takes a block's input to the shape of its output; None where it has that shape."""
    if stride == 1 and inputs == outputs:
        return None
    if shortcut == "A":
        return PadShortcut(outputs - inputs, stride)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch-norm, and a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = make_shortcut(inputs, width, stride, shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, inputs, H, W] -> [N, width, H / stride, W / stride]."""
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + identity)


class Bottleneck(nn.Module):
    """1x1, 3x3 (which has the stride) and 1x1 convolutions with batch-norm, and a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, shortcut: str) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.downsample = make_shortcut(inputs, outputs, stride, shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, inputs, H, W] -> [N, 4 width, H / stride, W / stride]."""
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + identity)


Block = type[BasicBlock] | type[Bottleneck]


class ResNet(nn.Module):
    """Stem; stages ``layer1``, ... of blocks, each but the first halves the image; ``fc``."""

    def __init__(
        self,
        block: Block,
        widths: list[int],
        blocks: list[int],
        num_classes: int,
        in_channels: int,
        stem: str,
        shortcut: str = "B",
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
        for i, (stage, width, count) in enumerate(zip(self.stages, widths, blocks, strict=True)):
            members = []
            for j in range(count):
                members.append(block(inputs, width, 2 if i and not j else 1, shortcut))
                inputs = width * block.expansion
            self.add_module(stage, nn.Sequential(*members))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, in_channels, H, W] -> logits [N, num_classes]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


DEPTHS: dict[int, tuple[Block, list[int]]] = {
    18: (BasicBlock, [2, 2, 2, 2]),
    34: (BasicBlock, [3, 4, 6, 3]),
    50: (Bottleneck, [3, 4, 6, 3]),
}


def resnet20(num_classes: int, in_channels: int, shortcut: str = "A", width: float = 1.0) -> ResNet:
    """ResNet-20 for 32x32 images, 0.27 M parameters; shortcut "A" (padding) or "B" (1x1 convolution)."""
    choose(shortcut, ("A", "B"), "model.shortcut")
    widths = [scaled(channels, width) for channels in (16, 32, 64)]
    return ResNet(BasicBlock, widths, [3, 3, 3], num_classes, in_channels, "cifar", shortcut)


def resnet_of_depth(
    depth: int, num_classes: int, in_channels: int, stem: str, width: float, kind: type[ResNet] = ResNet
) -> ResNet:
    """ResNet-18, -34 or -50 as a `kind`; see `resnet18` for the options."""
    choose(stem, ("imagenet", "cifar"), "model.stem")
    block, blocks = DEPTHS[depth]
    widths = [scaled(channels, width) for channels in (64, 128, 256, 512)]
    return kind(block, widths, blocks, num_classes, in_channels, stem)


def resnet18(num_classes: int, in_channels: int, stem: str = "imagenet", width: float = 1.0) -> ResNet:
    """ResNet-18; stem "imagenet" (7x7, stride 2, max-pooling, for 224x224) or "cifar" (3x3, for 32x32)."""
    return resnet_of_depth(18, num_classes, in_channels, stem, width)


def resnet34(num_classes: int, in_channels: int, stem: str = "imagenet", width: float = 1.0) -> ResNet:
    """ResNet-34; stems as in `resnet18`."""
    return resnet_of_depth(34, num_classes, in_channels, stem, width)


def resnet50(num_classes: int, in_channels: int, stem: str = "imagenet", width: float = 1.0) -> ResNet:
    """ResNet-50, the stride on the 3x3 convolutions as in torchvision; stems as in `resnet18`."""
    return resnet_of_depth(50, num_classes, in_channels, stem, width)

"""GoogLeNet (Szegedy et al., 2015): torchvision's, and the one with three branches that HWGQ and LQ-Nets quantize."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from training.config import require
from training.models.layers import check_dropout, initialise, scaled
from training.models.vgg import conv_pool_norm_relu

# name -> channels: 1x1; reduction and 3x3; reduction and "5x5"; after pooling
INCEPTIONS = {
    "inception3a": (64, 96, 128, 16, 32, 32),
    "inception3b": (128, 128, 192, 32, 96, 64),
    "inception4a": (192, 96, 208, 16, 48, 64),
    "inception4b": (160, 112, 224, 24, 64, 64),
    "inception4c": (128, 128, 256, 24, 64, 64),
    "inception4d": (112, 144, 288, 32, 64, 64),
    "inception4e": (256, 160, 320, 32, 128, 128),
    "inception5a": (256, 160, 320, 32, 128, 128),
    "inception5b": (384, 192, 384, 48, 128, 128),
}
AUXILIARY = ("aux1.", "aux2.")  # classifiers that help torchvision's training; the networks here have none


class ConvNorm(nn.Module):
    """Convolution, batch-norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""
        return self.relu(self.bn(self.conv(x)))


class Inception(nn.Module):
    """Four branches on the same input, one after the other in the channels."""

    def __init__(self, inputs: int, channels: list[int]) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, pooled = channels
        self.branch1 = ConvNorm(inputs, one, 1)
        self.branch2 = nn.Sequential(ConvNorm(inputs, reduce3, 1), ConvNorm(reduce3, three, 3))
        # 3x3 where the paper has 5x5: torchvision's checkpoints were trained so
        self.branch3 = nn.Sequential(ConvNorm(inputs, reduce5, 1), ConvNorm(reduce5, five, 3))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, padding=1, ceil_mode=True), ConvNorm(inputs, pooled, 1))
        self.outputs = one + three + five + pooled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, inputs, H, W] -> [N, outputs, H, W]."""
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class GoogLeNet(nn.Module):
    """torchvision's names, without the auxiliary classifiers: those of a checkpoint are left out when it is loaded."""

    def __init__(self, num_classes: int, in_channels: int, dropout: float, transform_input: bool, width: float) -> None:
        super().__init__()
        first, inputs = scaled(64, width), scaled(192, width)
        self.transform_input = transform_input
        self.conv1 = ConvNorm(in_channels, first, 7, 2)
        self.maxpool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2 = ConvNorm(first, first, 1)
        self.conv3 = ConvNorm(first, inputs, 3)
        self.maxpool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        for name, channels in INCEPTIONS.items():
            block = Inception(inputs, [scaled(count, width) for count in channels])
            self.add_module(name, block)
            inputs = block.outputs
        self.maxpool3 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.maxpool4 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(inputs, num_classes)
        initialise(self)
        self.register_load_state_dict_pre_hook(drop_auxiliary)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, in_channels, H, W] -> logits [N, num_classes]."""
        if self.transform_input:
            x = from_imagenet_statistics(x)
        x = self.maxpool2(self.conv3(self.conv2(self.maxpool1(self.conv1(x)))))
        x = self.maxpool3(self.inception3b(self.inception3a(x)))
        x = self.inception4c(self.inception4b(self.inception4a(x)))
        x = self.maxpool4(self.inception4e(self.inception4d(x)))
        x = self.inception5b(self.inception5a(x))
        return self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))


def drop_auxiliary(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    """Take the auxiliary classifiers out of a state dict that is about to be loaded."""
    for key in [key for key in state if key.startswith(tuple(prefix + name for name in AUXILIARY))]:
        del state[key]


def from_imagenet_statistics(x: torch.Tensor) -> torch.Tensor:
    """Images [N, 3, H, W] normalised by ImageNet's mean and deviation -> normalised by 0.5 and 0.5."""
    mean = torch.tensor([0.485, 0.456, 0.406], device=x.device, dtype=x.dtype).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], device=x.device, dtype=x.dtype).view(3, 1, 1)
    return (x * std + mean - 0.5) / 0.5


def googlenet(
    num_classes: int, in_channels: int, dropout: float = 0.2, transform_input: bool = False, width: float = 1.0
) -> GoogLeNet:
    """GoogLeNet with batch-norm for 224x224 images, as torchvision has it.

    `transform_input`: torchvision's checkpoint was trained on images normalised by 0.5 and 0.5, so a run that starts
    from it needs true.
    """
    check_dropout(dropout)
    require(type(transform_input) is bool, "model.transform_input", "true or false", transform_input)
    return GoogLeNet(num_classes, in_channels, dropout, transform_input, width)


# 1x1, 3x3 and 5x5 channels, the reductions as wide as what follows them; whether the image is halved behind it
BRANCHES = [
    (96, 128, 32, False),
    (192, 192, 96, True),
    (256, 208, 48, False),
    (224, 224, 64, False),
    (192, 256, 64, False),
    (176, 288, 64, False),
    (384, 320, 128, True),
    (384, 320, 128, False),
    (512, 384, 128, False),
]


class ThreeBranches(nn.Module):
    """1x1, 3x3 and 5x5 convolutions (the latter two behind 1x1 reductions), each pooled before its batch-norm."""

    def __init__(self, inputs: int, channels: tuple[int, int, int], halve: bool) -> None:
        super().__init__()
        self.branches = nn.ModuleList()
        for outputs, kernel in zip(channels, (1, 3, 5), strict=True):
            reduction = conv_pool_norm_relu(inputs, outputs, 1) if kernel > 1 else []
            pool = nn.MaxPool2d(3, 2, padding=1) if halve else None
            main = conv_pool_norm_relu(outputs if kernel > 1 else inputs, outputs, kernel, pool)
            self.branches.append(nn.Sequential(*reduction, *main))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, inputs, H, W] -> [N, sum of channels, H, W], or half of H and W."""
        return torch.cat([branch(x) for branch in self.branches], 1)


def googlenet_bn(num_classes: int, in_channels: int, width: float = 1.0) -> nn.Sequential:
    """GoogLeNet for 224x224 images in the order convolution, pooling, batch-norm, ReLU: of HWGQ and LQ-Nets.

    Without the pooled branches and the auxiliary classifiers, and with wider 1x1 convolutions.
    """
    first, second = scaled(64, width), scaled(192, width)
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, first, 7, 2, padding=3, bias=False),
        nn.MaxPool2d(3, 2, padding=1),
        nn.BatchNorm2d(first),
        nn.ReLU(),
        *conv_pool_norm_relu(first, second, 1),
        *conv_pool_norm_relu(second, second, 3, nn.MaxPool2d(3, 2, padding=1)),
    ]
    inputs = second
    for *channels, halve in BRANCHES:
        one, three, five = (scaled(count, width) for count in channels)
        layers.append(ThreeBranches(inputs, (one, three, five), bool(halve)))
        inputs = one + three + five
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes))
    initialise(model)
    return model

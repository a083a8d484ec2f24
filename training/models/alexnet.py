"""AlexNet: torchvision's (Krizhevsky, 2014), and the one with batch-norm that HWGQ and LQ-Nets quantize."""

from __future__ import annotations

import torch
from torch import nn

from training.models.layers import check_dropout, initialise, scaled
from training.models.vgg import linear_norm_relu


class AlexNet(nn.Module):
    """``features``, average pooling to 6x6, ``classifier``; torchvision's parameter names."""

    def __init__(self, num_classes: int, in_channels: int, dropout: float, width: float) -> None:
        super().__init__()
        c1, c2, c3, c4, hidden = (scaled(channels, width) for channels in (64, 192, 384, 256, 4096))
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, c1, 11, 4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(c1, c2, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(c2, c3, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(c3, c4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(c4, c4, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(36 * c4, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes),
        )
        initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, in_channels, H, W], at least 63x63 -> logits [N, num_classes]."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def alexnet(num_classes: int, in_channels: int, dropout: float = 0.5, width: float = 1.0) -> AlexNet:
    """AlexNet for 224x224 images, as torchvision has it: 64 to 384 channels, no normalisation."""
    check_dropout(dropout)
    return AlexNet(num_classes, in_channels, dropout, width)


def alexnet_bn(num_classes: int, in_channels: int, width: float = 1.0) -> nn.Sequential:
    """AlexNet for 227x227 images in the order convolution, pooling, batch-norm, ReLU; no groups, no dropout.

    The network of HWGQ and LQ-Nets: 96, 256, 384, 384 and 256 channels, two layers of 4096.
    """
    c1, c2, c3, hidden = (scaled(channels, width) for channels in (96, 256, 384, 4096))
    model = nn.Sequential(
        nn.Conv2d(in_channels, c1, 11, 4, bias=False),
        nn.MaxPool2d(3, 2),
        nn.BatchNorm2d(c1),
        nn.ReLU(),
        nn.Conv2d(c1, c2, 5, padding=2, bias=False),
        nn.MaxPool2d(3, 2),
        nn.BatchNorm2d(c2),
        nn.ReLU(),
        nn.Conv2d(c2, c3, 3, padding=1, bias=False),
        nn.BatchNorm2d(c3),
        nn.ReLU(),
        nn.Conv2d(c3, c3, 3, padding=1, bias=False),
        nn.BatchNorm2d(c3),
        nn.ReLU(),
        nn.Conv2d(c3, c2, 3, padding=1, bias=False),
        nn.MaxPool2d(3, 2),
        nn.BatchNorm2d(c2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(6),  # 227x227 images come out at 6x6: then it changes nothing
        nn.Flatten(),
        *linear_norm_relu(36 * c2, hidden),
        *linear_norm_relu(hidden, hidden),
        nn.Linear(hidden, num_classes),
    )
    initialise(model)
    return model

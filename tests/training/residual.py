"""The smallest network with residual blocks, for tests of what swaps them: known as "tiny_residual" once imported."""

from __future__ import annotations

from torch import nn

from training.models import MODELS
from training.models.resnet import BasicBlock


def tiny_residual(num_classes: int, in_channels: int, width: int = 4, batch_norm: bool = True) -> nn.Sequential:
    """A stem, three basic blocks of `width` channels, a linear layer; without batch-norm samples are independent."""
    blocks = [BasicBlock(width, width, 2 if i == 1 else 1, "B") for i in range(3)]
    stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)]
    model = nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU(), *blocks, *tail)
    if not batch_norm:
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(parent, name, nn.Identity())
    return model


MODELS["tiny_residual"] = tiny_residual

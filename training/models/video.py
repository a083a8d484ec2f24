"""Two-dimensional residual networks on clips: each frame on its own, and the mean of the frames' logits."""

from __future__ import annotations

import torch

from training.models.resnet import ResNet, resnet_of_depth


class VideoResNet(ResNet):
    """A `ResNet` (with its parameter names, so that its checkpoints load) that is given clips."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Clips [B, T, C, H, W] -> logits [B, num_classes], the mean over the T frames."""
        frames = x.shape[1]
        return super().forward(x.flatten(0, 1)).unflatten(0, (-1, frames)).mean(1)


def video_resnet18(num_classes: int, in_channels: int, stem: str = "imagenet", width: float = 1.0) -> ResNet:
    """ResNet-18 on clips; options as in `training.models.resnet.resnet18`."""
    return resnet_of_depth(18, num_classes, in_channels, stem, width, VideoResNet)


def video_resnet50(num_classes: int, in_channels: int, stem: str = "imagenet", width: float = 1.0) -> ResNet:
    """ResNet-50 on clips; options as in `training.models.resnet.resnet18`."""
    return resnet_of_depth(50, num_classes, in_channels, stem, width, VideoResNet)

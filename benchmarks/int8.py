"""torch's own int8 kernels (``torch.ops.quantized``): what a user runs on a CPU today.

The scales are arbitrary: they do not change the time, and accuracy is no subject here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

SCALE, ZERO_POINT = 0.05, 64


def activation(x: Tensor) -> Tensor:
    """x as quint8."""
    return torch.quantize_per_tensor(x, SCALE, ZERO_POINT, torch.quint8)


def weight(w: Tensor) -> Tensor:
    """w as qint8, one scale an output channel."""
    scales = w.abs().flatten(1).amax(1).clamp(min=1e-6) / 127
    return torch.quantize_per_channel(w, scales, torch.zeros(len(w), dtype=torch.int64), 0, torch.qint8)


def linear(w: Tensor) -> Callable[[Tensor], Tensor]:
    """quint8 [M, K] -> quint8 [M, N] for a float weight [N, K]."""
    packed = torch.ops.quantized.linear_prepack(weight(w), None)
    return lambda x: torch.ops.quantized.linear(x, packed, SCALE, ZERO_POINT)


def conv2d(
    w: Tensor, stride: Any, padding: Any, bias: Tensor | None = None, relu: bool = False
) -> Callable[[Tensor], Tensor]:
    """quint8 [N, C, H, W] channels_last -> the same."""
    pair = [list(v) if isinstance(v, tuple) else [v, v] for v in (stride, padding)]
    packed = torch.ops.quantized.conv2d_prepack(weight(w), bias, *pair, [1, 1], 1)
    op = torch.ops.quantized.conv2d_relu if relu else torch.ops.quantized.conv2d
    return lambda x: op(x, packed, SCALE, ZERO_POINT)


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d, relu: bool) -> Callable[[Tensor], Tensor]:
    """Convolution and batch-norm (and ReLU) as one int8 convolution."""
    w, b = fuse_conv_bn_weights(
        conv.weight, None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    return conv2d(w.detach(), conv.stride, conv.padding, b.detach(), relu)


def resnet(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The whole of a `training.models.resnet.ResNet` in int8: float images in, float logits out."""
    stem = folded(model.conv1, model.bn1, True)
    blocks = []
    for stage in model.stages:
        for block in getattr(model, stage):
            shortcut = None if block.downsample is None else folded(block.downsample[0], block.downsample[1], False)
            blocks.append((folded(block.conv1, block.bn1, True), folded(block.conv2, block.bn2, False), shortcut))
    head = linear(model.fc.weight.detach())

    def run(image: Tensor) -> Tensor:
        x = model.maxpool(stem(activation(image)))
        for first, second, shortcut in blocks:
            identity = x if shortcut is None else shortcut(x)
            x = torch.ops.quantized.add_relu(second(first(x)), identity, SCALE, ZERO_POINT)
        return head(torch.flatten(model.avgpool(x), 1)).dequantize()

    return run

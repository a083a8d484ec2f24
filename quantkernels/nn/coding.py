"""The functions that a layer in eval and its packed form both call; that they are the same is why logits are
the same."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .. import ops
from ..quantizers import Identity, Mixture, Quantizer


class Coding(NamedTuple):
    """How codes become values: grid float32 [C, 3] (of a learned basis [C, 1 + bits]), kind and levels as the ops take
    them."""

    grid: Tensor
    kind: int
    levels: int


class Widths(NamedTuple):
    """Bit-widths of a layer that has several, highest first: of its weight, of its activation (None: it floats)."""

    weight: list[int]
    activation: list[int] | None


class Epilogue(NamedTuple):
    """What follows the dot product, each float32 [out_channels] or None: + bias, * scale + shift."""

    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None


NO_EPILOGUE = Epilogue()


class Output(NamedTuple):
    """What a layer gives: its results clamped to [lower, upper], or their codes where there is a coding."""

    coding: Coding | None = None
    lower: float = -math.inf
    upper: float = math.inf

    def arguments(self) -> dict[str, Any]:
        """As the ops take them."""
        grid, kind, levels = self.coding or (None, 0, 0)
        return {
            "lower": self.lower,
            "upper": self.upper,
            "out_grid": grid,
            "out_kind": kind,
            "out_levels": levels,
        }


RESULTS = Output()


@dataclass(frozen=True)
class Geometry:
    """Shape of a convolution. padding: (top, bottom, left, right), zeros contribute nothing."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str = "zeros"

    @property
    def row_length(self) -> int:
        """Weights of one output channel."""
        return self.kernel_size[0] * self.kernel_size[1] * (self.in_channels // self.groups)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Shape of the weight of nn.Conv2d."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def pad(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] padded by a mode other than zeros."""
        top, bottom, left, right = self.padding
        return functional.pad(x, (left, right, top, bottom), mode=self.padding_mode)


def pad_sides(
    padding: str | Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of nn.Conv2d's padding. "same" puts the odd one at the bottom and right, as
    torch does."""
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
        top, left = total[0] // 2, total[1] // 2
        return top, total[0] - top, left, total[1] - left
    vertical, horizontal = (int(n) for n in padding)
    return vertical, vertical, horizontal, horizontal


def conv_on_codes(
    x: Tensor,
    activation: Coding,
    planes: Tensor,
    weight: Coding,
    geometry: Geometry,
    epilogue: Epilogue,
    output: Output = RESULTS,
    prepacked: Tensor | None = None,
) -> Tensor:
    """x [N, C, H, W] or [C, H, W], values or uint8 codes: encoded, convolved exactly, one epilogue.

    In the dtype of x, float32 where x is codes; or uint8 codes. prepacked: of the planes, by `ops.prepack_weight`.
    """
    if x.dim() == 3:
        return conv_on_codes(x[None], activation, planes, weight, geometry, epilogue, output, prepacked)[0]
    padding = geometry.padding
    if geometry.padding_mode != "zeros":
        x, padding = geometry.pad(x), (0, 0, 0, 0)
    rest: dict[str, Any] = {**epilogue._asdict(), **output.arguments()}
    return ops.lowbit_conv2d(
        x,
        *activation,
        planes,
        *weight,
        kernel_size=geometry.kernel_size,
        stride=geometry.stride,
        padding=padding,
        dilation=geometry.dilation,
        groups=geometry.groups,
        prepacked=prepacked,
        **rest,
    )


def conv_on_floats(x: Tensor, weight: Tensor, geometry: Geometry, epilogue: Epilogue) -> Tensor:
    """The same layer for an activation that is not quantized: a float convolution with the decoded weight."""
    top, bottom, left, right = geometry.padding
    padding = (top, left)
    if geometry.padding_mode != "zeros" or top != bottom or left != right:
        mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
        x, padding = functional.pad(x, (left, right, top, bottom), mode=mode), (0, 0)
    bias = None if epilogue.bias is None else epilogue.bias.to(weight.dtype)
    # The same strides on both sides, those of 1 x 1 kernels too: others could choose another algorithm, and with it
    # other roundings.
    weight = weight.contiguous().view(-1).view(weight.shape)
    y = functional.conv2d(x, weight, bias, geometry.stride, padding, geometry.dilation, geometry.groups)
    return affine(y, epilogue, -3)


def linear_on_codes(
    x: Tensor,
    activation: Coding,
    planes: Tensor,
    weight: Coding,
    epilogue: Epilogue,
    output: Output = RESULTS,
    prepacked: Tensor | None = None,
) -> Tensor:
    """x [..., in_features], values or uint8 codes: encoded, multiplied exactly, one epilogue; the rest as above."""
    rest: dict[str, Any] = {**epilogue._asdict(), **output.arguments()}
    return ops.lowbit_linear(x, *activation, planes, *weight, prepacked=prepacked, **rest)


def linear_on_floats(x: Tensor, weight: Tensor, epilogue: Epilogue) -> Tensor:
    """The same layer for an activation that is not quantized."""
    bias = None if epilogue.bias is None else epilogue.bias.to(weight.dtype)
    return affine(functional.linear(x, weight.contiguous(), bias), epilogue, -1)


def affine(y: Tensor, epilogue: Epilogue, axis: int) -> Tensor:
    """y * scale + shift along `axis`, as torch's batch-norm rounds it; y itself where there is neither."""
    scale, shift = epilogue.scale, epilogue.shift
    if scale is None or shift is None:
        return y
    # A batch-norm of mean 0 and variance 1 is this multiply-add, by the very kernel of the batch-norm that was folded.
    lanes = y.movedim(axis, 1) if y.dim() > 1 else y[None]
    mean, variance = torch.zeros_like(scale), torch.ones_like(scale)
    out = functional.batch_norm(lanes, mean, variance, scale, shift, eps=0.0)
    return out.movedim(1, axis) if y.dim() > 1 else out[0]


class Substitute(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradient: Tensor) -> Tensor:
        """value; backward gives its gradient to `gradient`."""
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        """Everything to `gradient`."""
        return None, grads[0]


def adopt(quantizer: Quantizer | None, layer: str, role: str, like: Tensor) -> Quantizer | None:
    """A layer's own copy of the quantizer it was given, on the device of `like`; None for None and Identity.

    Raises TypeError for anything else, ValueError where a grid per channel or a transform cannot be used.
    """
    if quantizer is None or isinstance(quantizer, Identity):
        return None
    if not isinstance(quantizer, Quantizer):
        raise TypeError(f"{layer}: {role} must be a Quantizer or None, got {type(quantizer).__name__}")
    if role == "activation" and quantizer.axis is not None:
        raise ValueError(
            f"{layer}: the activation quantizer must be per tensor (axis=None), got axis={quantizer.axis}: "
            "the integer dot product needs one step for all the values it sums"
        )
    if role == "activation" and quantizer.transforms:
        raise ValueError(
            f"{layer}: the activation quantizer must give codes of its input itself, got {type(quantizer).__name__}, "
            "which transforms it first: that one is for weights; use PACT, LSQ or MinMax"
        )
    if role == "weight" and quantizer.axis not in (None, 0):
        raise ValueError(
            f"{layer}: the weight quantizer must be per tensor (axis=None) or per output channel (axis=0), "
            f"got axis={quantizer.axis}"
        )
    own = copy.deepcopy(quantizer).to(like.device)
    if role == "activation" and not own.tracking:
        own.track()
    own.bind(like)
    return own


def has_codes(quantizer: Quantizer | None) -> bool:
    """Whether the quantizer gives codes now: not None, and not a mixture before its selection."""
    return quantizer is not None and not (isinstance(quantizer, Mixture) and quantizer.current is None)

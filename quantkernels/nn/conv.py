"""Quantized and packed 2-d convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..quantizers import Quantizer
from .coding import NO_EPILOGUE, Coding, Epilogue, Geometry, Widths, conv_on_codes, conv_on_floats, pad_sides
from .layer import QuantizedLayer
from .packed import PackedLayer


class QConv2d(QuantizedLayer, nn.Conv2d):  # type: ignore[misc]
    """nn.Conv2d with a quantizer for its weight and one for its input.

    Takes what nn.Conv2d takes (x [N, in_channels, H, W] or [in_channels, H, W]), and by keyword
        weight: Quantizer or None; per tensor or axis=0. activation: Quantizer or None; per tensor.
        exact: compute on codes in training too (QuantizedLayer).
    Quantizers are templates: the layer keeps its own copies, `weight_quantizer` and `activation_quantizer`.
    A state dict of nn.Conv2d loads: quantizers then keep what they were made with.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        weight: Quantizer | None = None,
        activation: Quantizer | None = None,
        exact: bool = False,
    ) -> None:
        nn.Conv2d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip
        self.attach(weight, activation, exact)

    @classmethod
    def from_float(
        cls, layer: nn.Conv2d, weight: Quantizer | None, activation: Quantizer | None, exact: bool = False
    ) -> QConv2d:
        """The same layer with quantizers; weight and bias are the same Parameters, not copies."""
        size: dict[str, Any] = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation")}
        made = cls(
            layer.in_channels, layer.out_channels, **size, groups=layer.groups, bias=layer.bias is not None,
            padding_mode=layer.padding_mode, device="meta",
        )  # fmt: skip
        made.weight, made.bias = layer.weight, layer.bias
        made.attach(weight, activation, exact)
        return made.train(layer.training)

    @property
    def geometry(self) -> Geometry:
        """The layer's shape with its padding spelled out."""
        (height, width), (down, right), (tall, wide) = self.kernel_size, self.stride, self.dilation
        padding = pad_sides(self.padding, self.kernel_size, self.dilation)
        return Geometry(
            self.in_channels, self.out_channels, (height, width), (down, right), padding, (tall, wide), self.groups,
            self.padding_mode,
        )  # fmt: skip

    def float_operation(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution of nn.Conv2d."""
        return self._conv_forward(x, weight, self.bias)

    def on_floats(self, x: Tensor, weight: Tensor, epilogue: Epilogue) -> Tensor:
        """The float convolution that PackedConv2d runs."""
        return conv_on_floats(x, weight, self.geometry, epilogue)

    def operation(self, x: Tensor, activation: Coding, planes: Tensor, weight: Coding, epilogue: Epilogue) -> Tensor:
        """The convolution on codes that PackedConv2d runs."""
        return conv_on_codes(x, activation, planes, weight, self.geometry, epilogue)

    def extra_repr(self) -> str:
        """As nn.Conv2d, and exact where it is set."""
        return nn.Conv2d.extra_repr(self) + (", exact=True" if self.exact else "")


class PackedConv2d(PackedLayer):
    """A convolution whose weight is bit-planes only; made by `convert`, `load` or `PackedConv2d.pack`.

    planes int32 [bits, out_channels, words], a row in (kh, kw, cin / groups) order; the rest is in
    PackedLayer. x [N, in_channels, H, W] or [in_channels, H, W]; the output has the dtype of x (`pass_codes` apart).
    """

    def __init__(
        self,
        geometry: Geometry,
        planes: Tensor,
        weight: Coding,
        activation: Coding | None,
        epilogue: Epilogue = NO_EPILOGUE,
        widths: Widths | None = None,
    ) -> None:
        super().__init__(geometry.out_channels, geometry.row_length, planes, weight, activation, epilogue, widths)
        self.geometry = geometry

    @classmethod
    def pack(cls, layer: QConv2d, bit_widths: Sequence[int] | None = None) -> PackedConv2d:
        """The packed form of a layer, as it is now or of several bit-widths. Raises what `parts_of` raises."""
        return cls(layer.geometry, *cls.parts_of(layer, bit_widths)).train(layer.training)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the float weight that the planes stand for."""
        return self.geometry.weight_shape

    @property
    def window(self) -> tuple[int, tuple[int, int], int]:
        """Codes of a tap, kernel size and groups."""
        g = self.geometry
        return g.in_channels // g.groups, g.kernel_size, g.groups

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of x."""
        activation = self.activation
        if activation is None:
            return conv_on_floats(x, self.decode_for(x), self.geometry, self.epilogue)
        weight, output, prepacked = self.weight_coding, self.output_for(x), self.prepacked
        return conv_on_codes(x, activation, self.active_planes, weight, self.geometry, self.epilogue, output, prepacked)

    def extra_repr(self) -> str:
        """Shape, bits and what is folded in."""
        g = self.geometry
        text = f"{g.in_channels}, {g.out_channels}, kernel_size={g.kernel_size}, stride={g.stride}"
        if any(g.padding):
            text += f", padding={g.padding}" + ("" if g.padding_mode == "zeros" else f" ({g.padding_mode})")
        if g.dilation != (1, 1):
            text += f", dilation={g.dilation}"
        if g.groups != 1:
            text += f", groups={g.groups}"
        return f"{text}, {super().extra_repr()}"

"""Quantized and packed linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..quantizers import Quantizer
from .coding import NO_EPILOGUE, Coding, Epilogue, Widths, linear_on_codes, linear_on_floats
from .layer import QuantizedLayer
from .packed import PackedLayer


class QLinear(QuantizedLayer, nn.Linear):  # type: ignore[misc]
    """nn.Linear with a quantizer for its weight and one for its input; x [..., in_features].

    Keyword arguments weight, activation and exact are those of QConv2d.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        weight: Quantizer | None = None,
        activation: Quantizer | None = None,
        exact: bool = False,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self.attach(weight, activation, exact)

    @classmethod
    def from_float(
        cls, layer: nn.Linear, weight: Quantizer | None, activation: Quantizer | None, exact: bool = False
    ) -> QLinear:
        """The same layer with quantizers; weight and bias are the same Parameters, not copies."""
        made = cls(layer.in_features, layer.out_features, layer.bias is not None, "meta")
        made.weight, made.bias = layer.weight, layer.bias
        made.attach(weight, activation, exact)
        return made.train(layer.training)

    def float_operation(self, x: Tensor, weight: Tensor) -> Tensor:
        """The product of nn.Linear."""
        return functional.linear(x, weight, self.bias)

    def on_floats(self, x: Tensor, weight: Tensor, epilogue: Epilogue) -> Tensor:
        """The float product that PackedLinear runs."""
        return linear_on_floats(x, weight, epilogue)

    def operation(self, x: Tensor, activation: Coding, planes: Tensor, weight: Coding, epilogue: Epilogue) -> Tensor:
        """The product on codes that PackedLinear runs."""
        return linear_on_codes(x, activation, planes, weight, epilogue)

    def extra_repr(self) -> str:
        """As nn.Linear, and exact where it is set."""
        return nn.Linear.extra_repr(self) + (", exact=True" if self.exact else "")


class PackedLinear(PackedLayer):
    """A linear layer whose weight is bit-planes only; made by `convert`, `load` or `PackedLinear.pack`.

    planes int32 [bits, out_features, words]; x [..., in_features]; the output has the dtype of x (`pass_codes` apart).
    """

    def __init__(
        self,
        in_features: int,
        planes: Tensor,
        weight: Coding,
        activation: Coding | None,
        epilogue: Epilogue = NO_EPILOGUE,
        widths: Widths | None = None,
    ) -> None:
        super().__init__(planes.shape[1], in_features, planes, weight, activation, epilogue, widths)
        self.in_features = in_features
        self.out_features = planes.shape[1]

    @classmethod
    def pack(cls, layer: QLinear, bit_widths: Sequence[int] | None = None) -> PackedLinear:
        """The packed form of a layer, as it is now or of several bit-widths. Raises what `parts_of` raises."""
        return cls(layer.in_features, *cls.parts_of(layer, bit_widths)).train(layer.training)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the float weight that the planes stand for."""
        return self.out_features, self.in_features

    @property
    def window(self) -> tuple[int, tuple[int, int], int]:
        """That of a convolution of one tap."""
        return self.in_features, (1, 1), 1

    def forward(self, x: Tensor) -> Tensor:
        """x times the weight."""
        activation = self.activation
        if activation is None:
            return linear_on_floats(x, self.decode_for(x), self.epilogue)
        weight, output = self.weight_coding, self.output_for(x)
        return linear_on_codes(x, activation, self.active_planes, weight, self.epilogue, output, self.prepacked)

    def extra_repr(self) -> str:
        """Shape and bits."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {super().extra_repr()}"

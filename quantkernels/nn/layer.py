"""What QConv2d and QLinear share: two quantizers, and when to compute on codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.planes import to_rows
from ..quantizers import Quantizer
from .coding import Coding, Epilogue, Substitute, adopt, has_codes
from .saved import requantized


class QuantizedLayer(nn.Module):
    """A layer y = f(q_a(x), q_w(weight)) + bias.

    In training f is the float operation on quantized values. In eval, and with exact=True in training as
    well, both operands become codes, f is an exact integer sum, and a float32 epilogue gives it its value;
    the gradient is that of the float operation (which then runs too, if a gradient is wanted). Where one
    operand has no quantizer, or one that is a mixture still, f is the float operation always.
    """

    weight: Tensor
    bias: Tensor | None
    weight_quantizer: Quantizer | None
    activation_quantizer: Quantizer | None
    exact: bool

    def attach(self, weight: Quantizer | None, activation: Quantizer | None, exact: bool = False) -> None:
        """Take copies of the quantizers; None or Identity leaves that operand in floating point."""
        name = type(self).__name__
        self.weight_quantizer = adopt(weight, name, "weight", self.weight)
        self.activation_quantizer = adopt(activation, name, "activation", self.weight)
        self.exact = exact

    @property
    def on_codes(self) -> bool:
        """Whether both operands have codes now."""
        return has_codes(self.weight_quantizer) and has_codes(self.activation_quantizer)

    def forward(self, x: Tensor) -> Tensor:
        """The layer on x, in the dtype of x."""
        if self.on_codes and (self.exact or not self.training):
            return self._exact_forward(x)
        if not self.training and self.activation_quantizer is None and has_codes(self.weight_quantizer):
            assert self.weight_quantizer is not None
            return self.on_floats(x, self.weight_quantizer(self.weight), Epilogue(self.bias))
        return self._float_forward(x)

    def _float_forward(self, x: Tensor) -> Tensor:
        if self.activation_quantizer is None:
            return self.float_operation(x, self._quantized_weight())
        if not self.training:
            return self.float_operation(self.activation_quantizer(x), self._quantized_weight())
        quantized, again = self.activation_quantizer.quantize(x)
        weight = self._quantized_weight()
        with requantized(x, quantized, again):
            return self.float_operation(quantized, weight)

    def _quantized_weight(self) -> Tensor:
        return self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)

    def _exact_forward(self, x: Tensor) -> Tensor:
        # The smooth branch comes first: in training it is what updates the running statistics.
        smooth = self._float_forward(x) if self.training or self._wants_gradient(x) else None
        with torch.no_grad():
            planes, weight = self.pack()
            bias = None if self.bias is None else self.bias.float()
            value = self.operation(x, self.activation_coding(x), planes, weight, Epilogue(bias))
        return value if smooth is None or not smooth.requires_grad else Substitute.apply(value, smooth)

    def _wants_gradient(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))

    def activation_coding(self, x: Tensor) -> Coding:
        """How x is encoded. Raises RuntimeError where it has no codes or no statistics yet."""
        quantizer = self.activation_quantizer
        assert quantizer is not None
        return Coding(quantizer.grid(x, update=False), quantizer.kind, quantizer.levels)

    def pack(self) -> tuple[Tensor, Coding]:
        """The bit-planes of the weight, int32 [bits, out, words], and how they decode."""
        quantizer = self.weight_quantizer
        assert quantizer is not None
        value, grid = quantizer.operands(self.weight)
        axis = None if quantizer.axis is None else 0
        planes, _ = ops.quantize_pack(to_rows(value), grid, quantizer.kind, quantizer.levels, axis)
        return planes, Coding(grid, quantizer.kind, quantizer.levels)

    def float_operation(self, x: Tensor, weight: Tensor) -> Tensor:
        """f on values, as the float layer computes it."""
        raise TypeError(f"{type(self).__name__} must define float_operation")

    def on_floats(self, x: Tensor, weight: Tensor, epilogue: Epilogue) -> Tensor:
        """f on a float activation and a decoded weight, as the packed layer computes it."""
        raise TypeError(f"{type(self).__name__} must define on_floats")

    def operation(self, x: Tensor, activation: Coding, planes: Tensor, weight: Coding, epilogue: Epilogue) -> Tensor:
        """f on codes, as the packed layer computes it."""
        raise TypeError(f"{type(self).__name__} must define operation")

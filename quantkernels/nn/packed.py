"""What PackedConv2d and PackedLinear share: planes, grids, and the checks that make them safe to run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import Kind
from ..ops.planes import BitPlanes
from .coding import Coding, Epilogue
from .layer import QuantizedLayer

WORD = 32


def plane_count(kind: int, levels: int) -> int:
    """Planes a code has. Raises ValueError for a kind or a number of levels that is none."""
    if kind == Kind.UNIFORM and levels in [2**n - 1 for n in range(1, 9)]:
        return int(levels).bit_length()
    if kind == Kind.BINARY and levels == 1:
        return 1
    if kind == Kind.TERNARY and levels == 2:
        return 2
    raise ValueError(
        f"kind and levels must be (0, 2^n - 1 with n from 1 to 8), (1, 1) or (2, 2), got ({kind}, {levels})"
    )


def check_tensor(name: str, value: Tensor, dtype: torch.dtype, *shapes: tuple[int, ...]) -> None:
    """Raises ValueError unless value has the dtype and one of the shapes."""
    if value.dtype != dtype or tuple(value.shape) not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name} must be {dtype} {wanted}, got {value.dtype} {list(value.shape)}")


class PackedLayer(nn.Module):
    """A layer that holds no float weight.

    Buffers: planes int32 [bits, out, words]; weight_grid float32 [1, 3] or [out, 3]; activation_grid float32
    [1, 3] or None (the activation stays floating, and the weight is decoded at each call); bias, scale,
    shift float32 [out] or None. They keep their dtypes whatever the model is cast to; the output has the
    dtype of the input.

    Raises ValueError where a buffer does not have the shape that the kernels rely on.
    """

    planes: Tensor
    weight_grid: Tensor
    activation_grid: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        out: int,
        row_length: int,
        planes: Tensor,
        weight: Coding,
        activation: Coding | None,
        epilogue: Epilogue,
    ) -> None:
        super().__init__()
        bits = plane_count(weight.kind, weight.levels)
        check_tensor("planes", planes, torch.int32, (bits, out, -(-row_length // WORD)))
        check_tensor("weight grid", weight.grid, torch.float32, (1, 3), (out, 3))
        for name, value in epilogue._asdict().items():
            if value is not None:
                check_tensor(name, value, torch.float32, (out,))
        self.weight_kind, self.weight_levels = int(weight.kind), int(weight.levels)
        self.activation_kind, self.activation_levels = -1, 0
        if activation is not None:
            plane_count(activation.kind, activation.levels)
            check_tensor("activation grid", activation.grid, torch.float32, (1, 3))
            self.activation_kind, self.activation_levels = int(activation.kind), int(activation.levels)
        self.folded: str | None = None
        self.register_buffer("planes", planes)
        self.register_buffer("weight_grid", weight.grid)
        self.register_buffer("activation_grid", None if activation is None else activation.grid)
        for name, value in epilogue._asdict().items():
            self.register_buffer(name, value)

    @staticmethod
    def parts_of(layer: QuantizedLayer) -> tuple[Tensor, Coding, Coding | None, Epilogue]:
        """planes, weight coding, activation coding and epilogue of a quantized layer as it is now.

        Raises RuntimeError for a mixture that was not selected or an activation quantizer without statistics.
        """
        with torch.no_grad():
            planes, weight = layer.pack()
            activation = None
            if layer.activation_quantizer is not None:
                was_training = layer.activation_quantizer.training
                layer.activation_quantizer.eval()
                try:
                    activation = layer.activation_coding(layer.weight)  # eval grids do not depend on the tensor
                finally:
                    layer.activation_quantizer.train(was_training)
                activation = activation._replace(grid=activation.grid.clone())
            bias = None if layer.bias is None else layer.bias.detach().float().clone()
            return planes, weight._replace(grid=weight.grid.clone()), activation, Epilogue(bias)

    @property
    def weight_coding(self) -> Coding:
        """How the planes decode."""
        return Coding(self.weight_grid, self.weight_kind, self.weight_levels)

    @property
    def activation(self) -> Coding | None:
        """How the input is encoded, or None where it stays floating."""
        if self.activation_grid is None:
            return None
        return Coding(self.activation_grid, self.activation_kind, self.activation_levels)

    @property
    def epilogue(self) -> Epilogue:
        """Bias, scale and shift."""
        return Epilogue(self.bias, self.scale, self.shift)

    @property
    def weight_bits(self) -> int:
        """Planes of the weight."""
        return self.planes.shape[0]

    @property
    def activation_bits(self) -> int | None:
        """Bits of an input code, None where the input stays floating."""
        return None if self.activation_grid is None else plane_count(self.activation_kind, self.activation_levels)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the float weight that the planes stand for."""
        raise TypeError(f"{type(self).__name__} must define weight_shape")

    def weight_planes(self) -> BitPlanes:
        """The weight as BitPlanes; `.decode()` is the float weight."""
        axis = None if self.weight_grid.shape[0] == 1 else 0
        shape = torch.Size(self.weight_shape)
        return BitPlanes(self.planes, self.weight_grid, self.weight_kind, self.weight_levels, shape, axis)

    def decode_for(self, x: Tensor) -> Tensor:
        """The float weight in the dtype of x."""
        return self.weight_planes().decode(x.dtype)

    def fold(self, scale: Tensor, shift: Tensor) -> None:
        """Append y * scale + shift, each float32 [out], to the epilogue. Raises ValueError if one is there
        already."""
        if self.scale is not None:
            raise ValueError("fold: this layer already has a scale and a shift")
        out = self.planes.shape[1]
        check_tensor("scale", scale, torch.float32, (out,))
        check_tensor("shift", shift, torch.float32, (out,))
        self.scale, self.shift = scale, shift

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLayer:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype != tensor.dtype else moved

        return super()._apply(keep_dtype, recurse)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        """Bits, grids and what is folded in."""
        activation = "float" if self.activation_bits is None else f"{self.activation_bits} bits"
        text = f"weight={self.weight_bits} bits, activation={activation}, bias={self.bias is not None}"
        return text + (", folded" if self.scale is not None else "")

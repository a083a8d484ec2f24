"""What PackedConv2d and PackedLinear share: planes, grids, and the checks that make them safe to run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import Kind
from ..ops.planes import BitPlanes
from ..quantizers import Quantizer
from .coding import RESULTS, Coding, Epilogue, Output, Widths
from .layer import QuantizedLayer

WORD = 32


def plane_count(kind: int, levels: int) -> int:
    """Planes a code has. Raises ValueError for a kind or a number of levels that is none."""
    if kind in (Kind.UNIFORM, Kind.LEARNED) and levels in [2**n - 1 for n in range(1, 9)]:
        return int(levels).bit_length()
    if kind == Kind.BINARY and levels == 1:
        return 1
    if kind == Kind.TERNARY and levels == 2:
        return 2
    raise ValueError(
        f"kind and levels must be (0 or 4, 2^n - 1 with n from 1 to 8), (1, 1) or (2, 2), got ({kind}, {levels})"
    )


def grid_columns(kind: int, levels: int) -> int:
    """3, or 1 + bits for a learned basis."""
    return 1 + plane_count(kind, levels) if kind == Kind.LEARNED else 3


def check_tensor(name: str, value: Tensor, dtype: torch.dtype, *shapes: tuple[int, ...]) -> None:
    """Raises ValueError unless value has the dtype and one of the shapes."""
    if value.dtype != dtype or tuple(value.shape) not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name} must be {dtype} {wanted}, got {value.dtype} {list(value.shape)}")


class PackedLayer(nn.Module):
    """A layer that holds no float weight.

    Buffers: planes int32 [bits, out, words]; weight_grid float32 [1, 3] or [out, 3]; activation_grid float32
    [1, 3] or None (the activation stays floating, and the weight is decoded at each call); grids of a learned basis
    have 1 + bits columns; bias, scale, shift float32 [out] or None. They keep their dtypes whatever the model is cast
    to; the output has the dtype of the input.

    widths: bit-widths that the layer can be switched to (`set_bits`), for uniform codes. The planes are then those of
    the highest one, of which each uses its first; grids have a leading dimension, one entry a bit-width, and so may
    scale and shift (one entry a bit-width of the weight).

    prepacked: uint8 [n], in no state dict: after `prepack` the planes in use as the kernels read them; None takes it
    back.

    Raises ValueError where a buffer does not have the shape that the kernels rely on.
    """

    planes: Tensor
    weight_grid: Tensor
    activation_grid: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    prepacked: Tensor | None

    def __init__(
        self,
        out: int,
        row_length: int,
        planes: Tensor,
        weight: Coding,
        activation: Coding | None,
        epilogue: Epilogue,
        widths: Widths | None = None,
    ) -> None:
        super().__init__()
        self.widths = widths
        bits = plane_count(weight.kind, weight.levels)
        check_tensor("planes", planes, torch.int32, (bits, out, -(-row_length // WORD)))
        several = () if widths is None else (len(widths.weight),)
        columns = grid_columns(weight.kind, weight.levels)
        check_tensor("weight grid", weight.grid, torch.float32, (*several, 1, columns), (*several, out, columns))
        for name, value in epilogue._asdict().items():
            if value is not None:
                check_tensor(name, value, torch.float32, *self._epilogue_shapes(name, out))
        self.weight_kind, self.weight_levels = int(weight.kind), int(weight.levels)
        self.activation_kind, self.activation_levels = -1, 0
        if activation is not None:
            several = () if widths is None else (len(widths.activation or ()),)
            columns = grid_columns(activation.kind, activation.levels)
            check_tensor("activation grid", activation.grid, torch.float32, (*several, 1, columns))
            self.activation_kind, self.activation_levels = int(activation.kind), int(activation.levels)
        self.folded: str | None = None
        self.taker: tuple[PackedLayer, ...] = ()  # in a tuple it is no submodule
        self.clamp: Output = RESULTS
        self.weight_bits = bits
        """Bits of a weight code in use; there may be more planes where there are several `widths`."""
        self.activation_bits = None if activation is None else plane_count(activation.kind, activation.levels)
        """Bits of an input code in use, None where the input stays floating."""
        self.register_buffer("planes", planes)
        self.register_buffer("weight_grid", weight.grid)
        self.register_buffer("activation_grid", None if activation is None else activation.grid)
        for name, value in epilogue._asdict().items():
            self.register_buffer(name, value)
        self.register_buffer("prepacked", None, persistent=False)

    @staticmethod
    @torch.no_grad()
    def parts_of(
        layer: QuantizedLayer, bit_widths: Sequence[int] | None = None
    ) -> tuple[Tensor, Coding, Coding | None, Epilogue, Widths | None]:
        """planes, weight coding, activation coding, epilogue and widths of a quantized layer as it is now.

        bit_widths: highest first, to have them all in one layer; None for the present bits alone.
        Raises RuntimeError for a mixture that was not selected or an activation quantizer without statistics,
        ValueError where the weight's codes of different bit-widths are not nested or codes are not uniform.
        """
        planes, weight = weight_at(layer, bit_widths)
        activation = None if layer.activation_quantizer is None else activation_at(layer, bit_widths)
        widths = None
        if bit_widths is not None:
            widths = Widths(list(bit_widths), None if activation is None else list(bit_widths))
        bias = None if layer.bias is None else layer.bias.detach().float().clone()
        return planes, weight, activation, Epilogue(bias), widths

    @property
    def weight_coding(self) -> Coding:
        """How the planes in use decode."""
        if self.widths is None:
            return Coding(self.weight_grid, self.weight_kind, self.weight_levels)
        grid = self.weight_grid[self.widths.weight.index(self.weight_bits)]
        return Coding(grid, self.weight_kind, 2**self.weight_bits - 1)

    @property
    def active_planes(self) -> Tensor:
        """int32 [weight_bits, out, words]: the planes in use."""
        return self.planes if self.widths is None else self.planes[: self.weight_bits]  # a slice costs microseconds

    @property
    def activation(self) -> Coding | None:
        """How the input is encoded, or None where it stays floating."""
        if self.activation_grid is None or self.activation_bits is None:
            return None
        if self.widths is None or self.widths.activation is None:
            return Coding(self.activation_grid, self.activation_kind, self.activation_levels)
        grid = self.activation_grid[self.widths.activation.index(self.activation_bits)]
        return Coding(grid, self.activation_kind, 2**self.activation_bits - 1)

    def give_codes(self, taker: PackedLayer | None, lower: float, upper: float) -> None:
        """From now on clamp to [lower, upper], and give the codes that the next layer makes of that (`pass_codes`), or
        values where there is no such layer."""
        self.taker, self.clamp = (() if taker is None else (taker,)), Output(None, lower, upper)

    def output_for(self, x: Tensor) -> Output:
        """What to give for an input x. What is float32 becomes the same codes here as in the next layer; of halves it
        makes codes when they are rounded, so it is given halves."""
        if self.taker and x.dtype in (torch.float32, torch.uint8):
            return self.clamp._replace(coding=self.taker[0].activation)
        return self.clamp

    def prepack(self) -> None:
        """Arrange the weight bits in use for the kernels once, not at each call: `ops.prepack_weight`. Nothing happens
        where the input stays floating or has a learned basis (its kernels read planes), or the device has no use for
        it."""
        if self.activation_kind in (-1, Kind.LEARNED):
            return
        channels, kernel_size, groups = self.window
        _, kind, levels = self.weight_coding
        made = ops.prepack_weight(self.active_planes, kind, levels, channels, kernel_size, groups)
        self.prepacked = made if made.numel() else None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.prepacked is not None:  # of other planes
            self.prepack()

    def check_bits(self, role: str, bits: int) -> None:
        """Raises ValueError unless `set_bits(role, bits)` is possible."""
        present = self.weight_bits if role == "weight" else self.activation_bits
        several = None if self.widths is None else getattr(self.widths, role)
        if present is not None and bits not in (several or [present]):
            raise ValueError(f"set_bits: the packed layer has {several or present} {role} bits, not {bits}")

    def set_bits(self, role: str, bits: int) -> None:
        """Use that many bits of the "weight" or "activation" codes; an activation that floats goes on floating."""
        self.check_bits(role, bits)
        if role == "weight":
            self.weight_bits = bits
            if self.prepacked is not None:
                self.prepack()
        elif self.activation_bits is not None:
            self.activation_bits = bits

    @property
    def epilogue(self) -> Epilogue:
        """Bias, and the scale and shift of the weight bits in use."""
        scale, shift = self.scale, self.shift
        if self.widths is not None and scale is not None and shift is not None and scale.dim() == 2:
            index = self.widths.weight.index(self.weight_bits)
            scale, shift = scale[index], shift[index]
        return Epilogue(self.bias, scale, shift)

    def _epilogue_shapes(self, name: str, out: int) -> list[tuple[int, ...]]:
        several = [] if self.widths is None or name == "bias" else [(len(self.widths.weight), out)]
        return [(out,), *several]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the float weight that the planes stand for."""
        raise TypeError(f"{type(self).__name__} must define weight_shape")

    @property
    def window(self) -> tuple[int, tuple[int, int], int]:
        """Codes of a tap, kernel size and groups; a linear layer is a convolution of one tap."""
        raise TypeError(f"{type(self).__name__} must define window")

    def weight_planes(self) -> BitPlanes:
        """The weight as BitPlanes; `.decode()` is the float weight."""
        grid, kind, levels = self.weight_coding
        axis = None if grid.shape[0] == 1 else 0
        return BitPlanes(self.active_planes, grid, kind, levels, torch.Size(self.weight_shape), axis)

    def decode_for(self, x: Tensor) -> Tensor:
        """The float weight in the dtype of x."""
        return self.weight_planes().decode(x.dtype)

    def fold(self, scale: Tensor, shift: Tensor) -> None:
        """Append y * scale + shift to the epilogue, each float32 [out], or [bit-widths, out] where there are several.
        Raises ValueError if one is there already."""
        if self.scale is not None:
            raise ValueError("fold: this layer already has a scale and a shift")
        out = self.planes.shape[1]
        check_tensor("scale", scale, torch.float32, *self._epilogue_shapes("scale", out))
        check_tensor("shift", shift, torch.float32, *self._epilogue_shapes("shift", out))
        if scale.shape != shift.shape:
            raise ValueError(f"fold: scale and shift must have one shape, got {list(scale.shape)}, {list(shift.shape)}")
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
        several = "" if self.widths is None else f", of {self.widths.weight}"
        folded = ", folded" if self.scale is not None else ""
        prepacked = "" if self.prepacked is None else ", prepacked"
        return text + several + folded + prepacked + (", gives codes" if self.taker else "")


class ReluOfValues(nn.ReLU):
    """A ReLU that codes pass as they are: those of a quantizer whose levels begin at 0 or above (`pass_codes`)."""

    def forward(self, x: Tensor) -> Tensor:
        """x where it is codes, else max(x, 0)."""
        return x if x.dtype == torch.uint8 else super().forward(x)


def weight_at(layer: QuantizedLayer, bit_widths: Sequence[int] | None) -> tuple[Tensor, Coding]:
    """Planes and coding of a layer's weight; of several bit-widths the planes of the highest and all the grids."""
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    if bit_widths is None:
        planes, coding = layer.pack()
        return planes, coding._replace(grid=coding.grid.clone())
    if not quantizer.nested:
        raise ValueError(
            f"convert: bit_widths needs weights whose codes are nested, such as ModifiedDoReFa's, got "
            f"{type(quantizer).__name__}: convert without it packs the precision that the network has now"
        )
    with present_bits(quantizer):
        grids = []
        for bits in reversed(bit_widths):  # ends with the highest
            quantizer.set_bits(bits)
            planes, coding = layer.pack()
            grids.append(coding.grid)
        return planes, coding._replace(grid=torch.stack(grids[::-1]))


def activation_at(layer: QuantizedLayer, bit_widths: Sequence[int] | None) -> Coding:
    """The coding of a layer's input in eval; of several bit-widths that of the highest, with all the grids."""
    quantizer = layer.activation_quantizer
    assert quantizer is not None
    with present_bits(quantizer):
        codings = []
        for bits in bit_widths or [quantizer.bits]:
            if bit_widths is not None:
                quantizer.set_bits(bits)
            codings.append(layer.activation_coding(layer.weight))  # eval grids do not depend on the tensor
        if bit_widths is None:
            return codings[0]._replace(grid=codings[0].grid.clone())
        if any(coding.kind != Kind.UNIFORM for coding in codings):
            raise ValueError(f"convert: bit_widths needs uniform activation codes, got {type(quantizer).__name__}")
        return codings[0]._replace(grid=torch.stack([coding.grid for coding in codings]))


@contextmanager
def present_bits(quantizer: Quantizer) -> Iterator[None]:
    """In eval inside; afterwards the mode and the bits are as they were."""
    bits, training = quantizer.bits, quantizer.training
    quantizer.eval()
    try:
        yield
    finally:
        quantizer.train(training)
        if quantizer.bits != bits:
            quantizer.set_bits(bits)

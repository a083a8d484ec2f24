"""Problems for lowbit_linear and lowbit_conv2d."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import Kind, prepack_weight
from ..reference import pack_bitplanes
from ..reference.learned_basis import levels_of_grid
from .inputs import lay_out, make_grid, make_values

INF = float("inf")


@dataclass(frozen=True)
class LowbitProblem:
    """Arguments of ``lowbit_conv2d``, or of ``lowbit_linear`` where ``kernel`` is None.

    ``dtype`` uint8 gives x as codes. ``special``: NaN, infinities and degenerate grids among the inputs, hence NaN
    among the outputs. ``extras`` are the optional parts of the epilogue: letters of b(ias), s(cale and shift), c(lamp),
    o(utput codes), l(earned output codes).
    """

    shape: tuple[int, ...]
    out_channels: int
    kernel: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    x_quantizer: tuple[int, int] = (Kind.UNIFORM, 255)
    w_quantizer: tuple[int, int] = (Kind.UNIFORM, 255)
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    per_channel: bool = True
    extras: str = ""
    out_dtype: torch.dtype | None = None
    special: bool = True

    def __str__(self) -> str:
        def quantizer(kind: int, levels: int) -> str:
            return Kind(kind).name.lower() + (str(levels) if kind in (Kind.UNIFORM, Kind.LEARNED) else "")

        def joined(numbers: tuple[int, ...]) -> str:
            return "x".join(map(str, numbers))

        window = ""
        if self.kernel is not None:
            window = f"-k{joined(self.kernel)}s{joined(self.stride)}p{joined(self.padding)}d{joined(self.dilation)}"
            window += f"g{self.groups}"
        types = str(self.dtype).removeprefix("torch.")
        types += f"-to-{str(self.out_dtype).removeprefix('torch.')}" if self.out_dtype else ""
        grids = "channels" if self.per_channel else "tensor"
        return (
            f"{joined(self.shape)}-{self.layout}-to{self.out_channels}{window}-a_{quantizer(*self.x_quantizer)}"
            f"-w_{quantizer(*self.w_quantizer)}-per_{grids}-{types}-{self.extras}{'' if self.special else '-tame'}"
        )

    @property
    def columns(self) -> int:
        """Codes a weight row."""
        if self.kernel is None:
            return self.shape[-1]
        return self.kernel[0] * self.kernel[1] * self.shape[1] // self.groups

    @property
    def geometry(self) -> tuple[Any, ...]:
        """kernel_size, stride, padding, dilation and groups; nothing for a linear layer."""
        if self.kernel is None:
            return ()
        return [*self.kernel], [*self.stride], [*self.padding], [*self.dilation], self.groups

    def generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self}-{purpose}".encode()))

    def _grid(self, channels: int, quantizer: tuple[int, int], generator: torch.Generator) -> Tensor:
        kind, levels = quantizer
        if kind == Kind.LEARNED:
            return self._learned_grid(channels, levels.bit_length(), generator)
        if self.special or kind != Kind.UNIFORM:
            return make_grid(channels, kind, generator)
        low, high = torch.rand(2, channels, generator=generator)
        return torch.stack((-low, (low + high) / levels, torch.zeros(channels)), 1)

    def _learned_grid(self, channels: int, bits: int, generator: torch.Generator) -> Tensor:
        steps = 0.2 * 2.0 ** torch.arange(bits) * (0.5 + torch.rand(channels, bits, generator=generator))
        if self.special:
            steps[2::7] *= -1
            steps[3::7] = 0.0
            steps[5::7] = 3e38
        return torch.cat((torch.randn(channels, 1, generator=generator), steps), 1)

    def x_grid(self) -> Tensor:
        """float32 [1, 3], of a learned basis [1, 1 + bits]."""
        return self._grid(1, self.x_quantizer, self.generator("x_grid"))

    def x(self) -> Tensor:
        kind, levels = self.x_quantizer
        generator = self.generator("x")
        if self.dtype == torch.uint8:
            values = torch.randint(levels + 1, self.shape, generator=generator, dtype=torch.uint8)
        elif kind == Kind.LEARNED:
            values = self._learned_values(generator).to(self.dtype)
        else:
            values = make_values(self.shape, self.x_grid(), kind, levels, None, self.special, generator).to(self.dtype)
        return lay_out(values, self.layout)

    def _learned_values(self, generator: torch.Generator) -> Tensor:
        """At ties between levels, at levels, anywhere; with ``special`` not all finite."""
        levels = levels_of_grid(self.x_grid())[0].sort().values
        chosen = torch.cat(
            (levels, (levels[1:] + levels[:-1]) * 0.5, torch.randn(len(levels), generator=generator) * 3)
        )
        if self.special:
            chosen = torch.cat((chosen, torch.tensor([INF, -INF, float("nan")])))
        return chosen[torch.randint(len(chosen), self.shape, generator=generator)]

    def w_grid(self) -> Tensor:
        """float32 [1, 3] or [out_channels, 3], of a learned basis with 1 + bits columns."""
        channels = self.out_channels if self.per_channel else 1
        return self._grid(channels, self.w_quantizer, self.generator("w_grid"))

    def w_codes(self) -> Tensor:
        """uint8 [out_channels, columns]."""
        shape = (self.out_channels, self.columns)
        return torch.randint(self.w_quantizer[1] + 1, shape, generator=self.generator("w"), dtype=torch.uint8)

    def planes(self) -> Tensor:
        return pack_bitplanes(self.w_codes(), *self.w_quantizer)

    def prepacked(self, device: str = "cpu") -> Tensor:
        """What ``prepack_weight`` makes of the planes: the arguments' last, after those of :meth:`arguments`."""
        kernel = self.kernel or (1, 1)
        kind, levels = self.w_quantizer
        channels = self.columns // (kernel[0] * kernel[1])
        return prepack_weight(self.planes().to(device), int(kind), levels, channels, kernel, self.groups)

    def epilogue(self) -> tuple[Any, ...]:
        """The arguments from bias on."""
        generator = self.generator("epilogue")
        bias, scale, shift = (torch.randn(self.out_channels, generator=generator) for _ in range(3))
        folded = (scale, shift) if "s" in self.extras else (None, None)
        clamp = (0.0, 1.5) if "c" in self.extras else (-INF, INF)
        codes = (torch.tensor([[-0.25, 0.125, 0.0]]), int(Kind.UNIFORM), 15) if "o" in self.extras else (None, 0, 0)
        if "l" in self.extras:
            codes = torch.tensor([[-0.5, 2.0, 0.75, 0.3]]), int(Kind.LEARNED), 7
        return bias if "b" in self.extras else None, *folded, *clamp, *codes, self.out_dtype

    def arguments(self, device: str = "cpu") -> list[Any]:
        """All arguments, in the order of the schema."""
        x_quantizer, w_quantizer = ([int(v) for v in q] for q in (self.x_quantizer, self.w_quantizer))
        arguments = [self.x(), self.x_grid(), *x_quantizer, self.planes(), self.w_grid(), *w_quantizer]
        arguments += [*self.geometry, *self.epilogue()]
        return [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]

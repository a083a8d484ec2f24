"""The products that are measured on a GPU: random operands, the library's op, its rivals, and whether it is right.

The op takes codes or floats of the activation; float products of packed weights it does not know. So a linear layer is
measured from codes to bf16, and beside it from codes to codes and, with the encoding inside, from bf16 to bf16; a
convolution from codes to codes, with a folded batch-norm.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import quantkernels as qk
from benchmarks.compare import OURS
from benchmarks.contestants import INT_MM, WEIGHT_RANGE, coding, packed_weight, random_codes
from benchmarks.device import SETS, Run, draw
from benchmarks.goals import AtMost, Faster, Goal, OfPeak
from benchmarks.workloads import GPU_ROWS, ConvLayer
from quantkernels import reference
from quantkernels.ops import Kind

CUBLAS, CUDNN = "cuBLAS bf16", "cuDNN bf16"
CODES, FLOATS = "codes to codes", "bf16 to bf16"
ROWS_LOOKED_AT, CHANNELS_LOOKED_AT = 4, 8
OF_PEAK, FEW_ROWS_SECONDS, OF_CUDNN = 0.55, 25e-6, 1.3  # goals

Quantizer = tuple[Tensor, int, int]  # grid, kind, levels


class Format(NamedTuple):
    """Bits of weights and activations; one bit is binary, +1 and -1."""

    w_bits: int
    a_bits: int

    @property
    def name(self) -> str:
        """For instance w4a8."""
        return f"w{self.w_bits}a{self.a_bits}"

    def activation(self, device: str) -> Quantizer:
        """The quantizer of the activation."""
        if self.a_bits == 1:
            return torch.tensor([[-1.0, 2.0, 0.0]], device=device), Kind.BINARY, 1
        grid, kind, levels = coding(self.a_bits)
        return grid.to(device), kind, levels


@dataclass
class Operands:
    """One set: an activation as codes or floats, its quantizer, a packed weight, and what ends the product."""

    x: Tensor
    activation: Quantizer
    weight: tuple[Tensor, Tensor, int, int]
    epilogue: dict[str, Any]

    def part(self, x: Tensor, channels: Sequence[int]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments, on the CPU, for some of x and some output channels."""
        planes, grid, kind, levels = self.weight
        chosen = [x, *self.activation, planes[:, channels], grid[channels], kind, levels]
        epilogue = {k: v[channels] if k in ("scale", "shift") else v for k, v in self.epilogue.items()}
        return [on_cpu(a) for a in chosen], {k: on_cpu(v) for k, v in epilogue.items()}


def on_cpu(value: Any) -> Any:
    """A tensor there; anything else as it is."""
    return value.cpu() if isinstance(value, Tensor) else value


class Problem(ABC):
    """A product of some shape."""

    family: str
    job: str
    variants: Sequence[str]  # of the library's op; the first is what is judged
    judged = False  # whether it is one of those that have a goal

    @property
    @abstractmethod
    def name(self) -> str:
        """For a file of results."""

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Output channels."""

    @property
    @abstractmethod
    def row_length(self) -> int:
        """Depth of the product."""

    @property
    @abstractmethod
    def x_shape(self) -> tuple[int, ...]:
        """Of the activation as it lies in memory, the channels last."""

    @property
    @abstractmethod
    def operations(self) -> int:
        """Two a multiply-add."""

    @abstractmethod
    def plan(self, of: Format, **device: int) -> dict[str, Any]:
        """The kernel it gets on a device."""

    @abstractmethod
    def run(self, o: Operands) -> Tensor:
        """The library's op."""

    @abstractmethod
    def rivals(self, device: str) -> Iterator[tuple[str, list[Run]]]:
        """What a user would pick instead, on sets of inputs."""

    @abstractmethod
    def differing(self, o: Operands, out: Tensor) -> tuple[int, int]:
        """Outputs of a slice that are not the reference's, and how many there are."""

    def goals(self, of: Format) -> list[Goal]:
        """Of this product in this format."""
        return []

    def lay_out(self, x: Tensor) -> Tensor:
        """x with torch's order of dimensions."""
        return x

    def operands(self, of: Format, variant: str, device: str, seed: int) -> Operands:
        """Random ones; the outputs spread over what their codes can tell apart."""
        activation = of.activation(device)
        grid, _, levels = activation
        weight = packed_weight(self.outputs, self.row_length, of.w_bits, device, seed)
        x = random_codes(self.x_shape, of.a_bits, device, seed)
        if variant == FLOATS:
            noise = torch.rand(self.x_shape, generator=draw(seed, device), device=device)
            x = (grid[0, 0] + grid[0, 1] * levels * noise).to(torch.bfloat16)
        low, high = float(grid[0, 0]), float(grid[0, 0] + grid[0, 1] * levels)
        # Means of squares: of the activation, and of a weight with this many levels on both sides of zero.
        square = (low * low + low * high + high * high) / 3 if of.a_bits > 1 else 1.0
        w_square = WEIGHT_RANGE**2 * (weight[3] + 2) / (3 * weight[3])
        deviation = sqrt(self.row_length * square * w_square)
        if variant != CODES:
            return Operands(self.lay_out(x), activation, weight, {"out_dtype": torch.bfloat16})
        generator = draw(seed, device)
        scale = torch.rand(self.outputs, generator=generator, device=device) + 0.5
        shift = torch.randn(self.outputs, generator=generator, device=device) * deviation / 4
        out_grid = torch.tensor([[-2 * deviation, 4 * deviation / levels, 0.0]], device=device)
        epilogue = {"scale": scale, "shift": shift, "out_grid": out_grid}
        return Operands(
            self.lay_out(x), activation, weight, {**epilogue, "out_kind": activation[1], "out_levels": levels}
        )


def some(count: int, of: int) -> list[int]:
    """Random indices below ``of``, and the last one."""
    return sorted({of - 1, *random.Random(of).sample(range(of), min(count, of))})


def unlike(got: Tensor, want: Tensor) -> tuple[int, int]:
    """Elements that differ, and how many there are."""
    return int((got.cpu() != want).sum()), want.numel()


@dataclass(frozen=True)
class Linear(Problem):
    """[rows, features] by [features, features]."""

    rows: int
    features: int
    family = "matmul"
    job = "lowbit_linear"
    variants = (OURS, CODES, FLOATS)

    @property
    def name(self) -> str:
        """For instance linear-m128."""
        return f"linear-m{self.rows}"

    @property
    def outputs(self) -> int:
        """Of the layer."""
        return self.features

    @property
    def row_length(self) -> int:
        """Depth of the product."""
        return self.features

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Rows of codes."""
        return self.rows, self.features

    @property
    def operations(self) -> int:
        """Two a multiply-add."""
        return 2 * self.rows * self.features**2

    def plan(self, of: Format, **device: int) -> dict[str, Any]:
        """The kernel it gets on a device."""
        return qk.plan(self.x_shape, self.features, x_bits=of.a_bits, w_bits=of.w_bits, **device)

    def run(self, o: Operands) -> Tensor:
        """The library's op."""
        return qk.ops.lowbit_linear(o.x, *o.activation, *o.weight, **o.epilogue)

    def rivals(self, device: str) -> Iterator[tuple[str, list[Run]]]:
        """cuBLAS in bf16, and in int8 where its shape rules admit."""
        weight_shape = self.features, self.features
        for name in (CUBLAS, INT_MM):
            runs: list[Run] = []
            for seed in range(SETS):
                generator = draw(seed, device)
                if name == CUBLAS:
                    x, w = (normal(shape, generator, device) for shape in (self.x_shape, weight_shape))
                    runs.append(partial(functional.linear, x, w))
                else:
                    x, w = (
                        torch.randint(-128, 128, shape, generator=generator, device=device, dtype=torch.int8)
                        for shape in (self.x_shape, weight_shape)
                    )
                    runs.append(partial(torch._int_mm, x, w.t()))
            yield name, runs

    def differing(self, o: Operands, out: Tensor) -> tuple[int, int]:
        """Outputs of a slice that are not the reference's, and how many there are."""
        rows, channels = some(ROWS_LOOKED_AT, self.rows), some(CHANNELS_LOOKED_AT, self.features)
        arguments, epilogue = o.part(o.x[rows], channels)
        return unlike(out[rows][:, channels], reference.lowbit_linear(*arguments, **epilogue))

    def goals(self, of: Format) -> list[Goal]:
        """8192 rows at W8A8 and W4A8, and one row at W4A8."""
        if self.rows == GPU_ROWS[0] and of in (Format(8, 8), Format(4, 8)):
            return [OfPeak(OF_PEAK)]
        return [AtMost(FEW_ROWS_SECONDS)] if self.rows == 1 and of == Format(4, 8) else []


@dataclass(frozen=True)
class Conv(Problem):
    """A convolution of a batch of images, channels_last."""

    batch: int
    layer: ConvLayer
    judged: bool = False  # one of those that have a goal
    family = "conv"
    job = "lowbit_conv2d"
    variants = (CODES,)

    @property
    def name(self) -> str:
        """For instance conv-64-64-k3-s1-56-b32."""
        return f"conv-{self.layer.name}-b{self.batch}"

    @property
    def outputs(self) -> int:
        """Channels."""
        return self.layer.outputs

    @property
    def row_length(self) -> int:
        """Depth of the product."""
        return self.layer.row_length

    @property
    def x_shape(self) -> tuple[int, ...]:
        """The images."""
        return self.batch, self.layer.image, self.layer.image, self.layer.inputs

    @property
    def operations(self) -> int:
        """Two a multiply-add."""
        return self.layer.operations(self.batch)

    def lay_out(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width], channels_last."""
        return x.permute(0, 3, 1, 2)

    @property
    def geometry(self) -> tuple[int, int, int, int, int]:
        """kernel, stride, padding, dilation, groups."""
        return self.layer.kernel, self.layer.stride, self.layer.padding, 1, self.layer.groups

    def plan(self, of: Format, **device: int) -> dict[str, Any]:
        """The kernel it gets on a device."""
        shape = self.batch, self.layer.inputs, self.layer.image, self.layer.image
        return qk.plan(shape, self.outputs, *self.geometry, x_bits=of.a_bits, w_bits=of.w_bits, **device)

    def run(self, o: Operands) -> Tensor:
        """The library's op."""
        return qk.ops.lowbit_conv2d(o.x, *o.activation, *o.weight, *self.geometry, **o.epilogue)

    def rivals(self, device: str) -> Iterator[tuple[str, list[Run]]]:
        """cuDNN in bf16, channels_last."""
        kernel = self.layer.kernel
        shape = self.outputs, kernel, kernel, self.layer.inputs // self.layer.groups
        runs: list[Run] = []
        for seed in range(SETS):
            generator = draw(seed, device)
            x, w = (self.lay_out(normal(s, generator, device)) for s in (self.x_shape, shape))
            runs.append(partial(functional.conv2d, x, w, None, *self.geometry[1:]))
        yield CUDNN, runs

    def differing(self, o: Operands, out: Tensor) -> tuple[int, int]:
        """Outputs of some channels of the last image that are not the reference's, and how many there are."""
        channels, image = some(CHANNELS_LOOKED_AT, self.outputs), slice(self.batch - 1, None)
        depthwise = self.layer.groups > 1
        arguments, epilogue = o.part(o.x[image][:, channels] if depthwise else o.x[image], channels)
        geometry = (*self.geometry[:-1], len(channels) if depthwise else 1)
        return unlike(out[image][:, channels], reference.lowbit_conv2d(*arguments, *geometry, **epilogue))

    def goals(self, of: Format) -> list[Goal]:
        """The 3 x 3 layers of ResNet-18 at W4A8."""
        return [Faster(CUDNN, OF_CUDNN)] if self.judged and of == Format(4, 8) else []


def normal(shape: Sequence[int], generator: torch.Generator, device: str) -> Tensor:
    """Normal random values in bf16."""
    return torch.randn(*shape, generator=generator, device=device).to(torch.bfloat16)

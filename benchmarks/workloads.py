"""Every job that is measured: its shape, the bytes and operations it cannot do without, and its goals.

Shapes are listed here and nowhere else. `workloads()` makes the list; a workload's `build` makes its inputs and gives
the contestants of benchmarks/contestants.py. ``quick`` keeps the form and shrinks the shapes, to try the code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import contestants
from benchmarks.contestants import (
    AS_FLOAT32,
    COMPILE,
    COPY,
    EAGER,
    FAKE_QUANTIZE,
    FP32,
    FP32_COMPILED,
    INT8,
    PER_TENSOR,
    SUM,
)
from benchmarks.goals import Faster, Goal, OfPeak, PerCore, Within

SIZES = (1 << 20, 1 << 22)
CHANNELS = 512
AXES = {"tensor": None, "outer": 0, "inner": 1}  # no channels; each channel one run of memory; channels side by side
DQA_BITS = (2, 4, 8)
UNIFORM_BITS = 4
BASIS_BITS = (2, 3, 4)
PACK_BITS = (1, 2, 4, 8)

FEATURES = 4096
ROWS = (1, 16, 256)
LINEAR_BITS = ((8, 8), (4, 8), (2, 8), (1, 8), (2, 2), (1, 1))  # weight, activation
# (rows, weight bits, activation bits) -> how many times as fast as torch's int8 layer
LINEAR_GOALS = {
    (256, 8, 8): 1.05,
    (256, 4, 8): 1.0,
    (256, 2, 8): 1.2,
    (256, 1, 8): 1.5,
    (256, 2, 2): 1.3,
    (1, 4, 8): 1.6,
    (1, 2, 8): 2.5,
    (1, 1, 8): 3.5,
}

# ResNet-18 at 224 x 224: in, out, kernel, stride, size of the input image. The stem stays float in a quantized network.
RESNET18 = {
    "layer1": (64, 64, 3, 1, 56),
    "layer2.0": (64, 128, 3, 2, 56),
    "layer2.down": (64, 128, 1, 2, 56),
    "layer2": (128, 128, 3, 1, 28),
    "layer3.0": (128, 256, 3, 2, 28),
    "layer3.down": (128, 256, 1, 2, 28),
    "layer3": (256, 256, 3, 1, 14),
    "layer4.0": (256, 512, 3, 2, 14),
    "layer4.down": (256, 512, 1, 2, 14),
    "layer4": (512, 512, 3, 1, 7),
}
BATCHES = (1, 32)
CONV_BITS = ((8, 8), (4, 8), (2, 2))

# On a GPU.
GPU_FEATURES = 8192
GPU_ROWS = (8192, 1, 128, 1024, 16)  # the goals' first
GPU_LINEAR_BITS = (*((w_bits, 8) for w_bits in (4, 8, 2, 1, 3, 5, 6, 7)), (2, 2), (1, 1))
GPU_BATCHES = (256, 32)
GPU_NETWORK_BATCHES = (1, 32, 256)
GPU_TRAINING_BATCH = 128


class ConvLayer(NamedTuple):
    """A convolution of a square image, with a square kernel."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    padding: int
    groups: int
    image: int

    @property
    def name(self) -> str:
        """For instance 64-128-k3-s2-56."""
        text = f"{self.inputs}-{self.outputs}-k{self.kernel}-s{self.stride}-{self.image}"
        return text if self.groups == 1 else f"{text}-g{self.groups}"

    @property
    def out_image(self) -> int:
        """Pixels along a side of the output."""
        return (self.image + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def row_length(self) -> int:
        """Taps of an output channel."""
        return self.kernel**2 * self.inputs // self.groups

    def operations(self, batch: int) -> int:
        """Two a multiply-add."""
        return 2 * batch * self.outputs * self.out_image**2 * self.row_length


def conv_layers(network: str, image: int = 224) -> Counter[ConvLayer]:
    """The convolutions that a network of training.models computes for an image, and how often each."""
    from training.models import build_model

    found: Counter[ConvLayer] = Counter()

    def note(layer: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        kernel, stride, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
        channels = layer.in_channels, layer.out_channels
        found[ConvLayer(*channels, kernel, stride, padding, layer.groups, inputs[0].shape[-1])] += 1

    with torch.device("meta"), torch.no_grad():
        model = build_model(network, 1000).eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        model(torch.empty(1, 3, image, image))
    return found


@dataclass(frozen=True)
class Workload:
    """One job. The seconds of `build()`'s contestants are compared; the rest is for judging them."""

    name: str
    family: str
    shape: tuple[int, ...]
    build: Callable[[], contestants.Contestants]
    dtype: str = "float32"
    goals: Sequence[Goal] = ()
    bytes: int = 0  # that must move
    operations: int = 0  # two a multiply-add
    unit: str = ""  # the limit that counts: "copy", "int8", "popcount" or "lookup"
    times: int = 1  # that it does its work for one multiply-add
    tags: Mapping[str, Any] = field(default_factory=dict)

    def limit_seconds(self, seconds: Mapping[str, float], limits: Mapping[str, float]) -> float | None:
        """The time below which the job cannot be done here, or None where nothing measured says so.

        Element-wise jobs move bytes at the pace of the copy that was timed in turns with them; the others do arithmetic
        at the peak of their unit.
        """
        if self.unit == "copy" and COPY in seconds:
            copied = 2 * prod(self.shape) * contestants.DTYPES[self.dtype].itemsize
            return seconds[COPY] * self.bytes / copied
        if self.unit in ("int8", "popcount", "lookup"):
            return self.operations * self.times / (limits[f"{self.unit}_gops"] * 1e9)
        return None


def workloads(quick: bool = False) -> list[Workload]:
    """All of them, in the order in which they run."""
    sizes = (CHANNELS * 32,) if quick else SIZES
    found = [*element_wise_workloads(sizes, quick), *bitplane_workloads(sizes)]
    found += linear_workloads(64 if quick else FEATURES, (2,) if quick else ROWS)
    found += conv_workloads({"tiny": (8, 16, 3, 1, 8)} if quick else RESNET18, (1,) if quick else BATCHES)
    found += network_workloads(quick)
    return [replace(w, goals=()) for w in found] if quick else found  # goals are set for the real sizes


@dataclass(frozen=True)
class Variant:
    """Size, type and channels of an element-wise job."""

    size: int
    dtype: str
    layout: str

    @property
    def name(self) -> str:
        """For instance 1Mi-float32-tensor (pytest's -k takes no ^)."""
        size = f"{self.size >> 20}Mi" if self.size >= 1 << 20 else f"{self.size >> 10}Ki"
        return f"{size}-{self.dtype}-{self.layout}"

    @property
    def shape(self) -> tuple[int, int]:
        """Two dimensions, the channels first or last."""
        rest = self.size // CHANNELS
        return (rest, CHANNELS) if self.layout == "inner" else (CHANNELS, rest)

    @property
    def base(self) -> bool:
        """Whether this is the one that is set against other people's code: float32 per tensor."""
        return self.dtype == "float32" and self.layout == "tensor"

    def goals(self, base: Sequence[Goal]) -> list[Goal]:
        """``base`` for the base variant; of the others, that they cost no more than it."""
        goals = list(base) if self.base else []
        if self.layout != "tensor":
            goals.append(Within(PER_TENSOR, 1.2))
        if self.dtype != "float32":
            goals.append(Within(AS_FLOAT32, 1.0))
        return goals

    def workload(
        self, family: str, job: str, build: Callable[..., contestants.Contestants], passes: float, goals: Sequence[Goal]
    ) -> Workload:
        """A job that moves ``passes`` times the bytes of its tensor."""
        moved = round(passes * self.size * contestants.DTYPES[self.dtype].itemsize)
        tags = {"job": job, "size": f"2^{self.size.bit_length() - 1}", "layout": self.layout}
        call = partial(build, self.shape, self.dtype, AXES[self.layout], plainly=self.base)
        return Workload(
            f"{job}-{self.name}", family, self.shape, call, self.dtype, self.goals(goals), moved, unit="copy", tags=tags
        )


def variants(sizes: Sequence[int]) -> Iterator[Variant]:
    """All sizes, types and layouts."""
    for size in sizes:
        for dtype in contestants.DTYPES:
            for layout in AXES:
                yield Variant(size, dtype, layout)


def element_wise_workloads(sizes: Sequence[int], quick: bool) -> Iterator[Workload]:
    """Statistics read their tensor once (n); a forward moves 2n and a backward 3n."""
    compiles = not quick
    stats = partial(contestants.channel_stats, compiles=compiles)
    uniform = partial(contestants.fake_quantize, UNIFORM_BITS, compiles=compiles)
    dqa = partial(contestants.attention, DQA_BITS, compiles=compiles)
    for v in variants(sizes):
        yield v.workload("stats", "channel_stats", stats, 1, [Within(SUM, 1.4)])
    for v in variants(sizes):
        yield v.workload("fake_quantize", "fake_quantize", uniform, 5, [Faster(FAKE_QUANTIZE, 14)])
    for v in variants(sizes):
        for bits in BASIS_BITS if v.base else (2,):
            build = partial(contestants.learned_basis, bits, compiles=compiles and bits == BASIS_BITS[0])
            yield v.workload("learned_basis", f"learned_basis_{bits}", build, 5, [])
    for v in variants(sizes):
        yield v.workload("attention", "dqa_2_4_8", dqa, 6, [Faster(EAGER, 30), Faster(COMPILE, 3)])


def bitplane_workloads(sizes: Sequence[int]) -> Iterator[Workload]:
    """quantize_pack reads its tensor once and writes its bits; four bits also in half types and with a grid a row."""
    for v in variants(sizes):
        if v.layout == "inner":
            continue  # rows are packed, so a channel is a row
        for bits in PACK_BITS if v.base else (4,):
            passes = 1 + bits / 8 / contestants.DTYPES[v.dtype].itemsize
            build = partial(contestants.quantize_pack, bits)
            yield v.workload("bitplanes", f"quantize_pack_{bits}", build, passes, [Within(COPY, 1.6)])


def linear_workloads(features: int, rows: Sequence[int]) -> Iterator[Workload]:
    """lowbit_linear from codes to codes, as torch's int8 layer; weight [features, features] with a grid a row."""
    for m in rows:
        for w_bits, a_bits in LINEAR_BITS:
            key = (m, w_bits, a_bits)
            goals: list[Goal] = [Faster(INT8, LINEAR_GOALS[key])] if key in LINEAR_GOALS else []
            goals += {(256, 8, 8): [OfPeak(0.88)], (256, 1, 1): [PerCore(1.5)]}.get(key, [])
            # Few rows are limited by reading the weight, from a cache or from memory: no measured limit fits.
            unit, times = unit_of(w_bits, a_bits) if m >= 64 else ("", 1)
            yield Workload(
                f"linear-w{w_bits}a{a_bits}-m{m}",
                "matmul",
                (m, features, features),
                partial(contestants.linear, m, features, w_bits, a_bits),
                "codes",
                goals,
                operations=2 * m * features * features,
                unit=unit,
                times=times,
                tags={"job": "lowbit_linear", "m": m, "w_bits": w_bits, "a_bits": a_bits},
            )


def unit_of(w_bits: int, a_bits: int) -> tuple[str, int]:
    """What has the highest peak, and how often it is done: popcounts of one pair of planes; sums found for a plane of
    the weight and four bits of the activation, twice at most; byte products.
    """
    if w_bits * a_bits == 1:
        return "popcount", 1
    lookups = w_bits * ceil(a_bits / 4)
    return ("lookup", lookups) if lookups <= 2 else ("int8", 1)


def conv_workloads(layers: Mapping[str, tuple[int, int, int, int, int]], batches: Sequence[int]) -> Iterator[Workload]:
    """lowbit_conv2d from codes to codes, channels_last, padding kernel // 2."""
    for batch in batches:
        for layer, (inputs, outputs, kernel, stride, image) in layers.items():
            x_shape = (batch, inputs, image, image)
            out_pixels = ((image - 1) // stride + 1) ** 2
            for w_bits, a_bits in CONV_BITS:
                unit, times = unit_of(w_bits, a_bits)
                yield Workload(
                    f"conv-{layer}-w{w_bits}a{a_bits}-b{batch}",
                    "conv",
                    (*x_shape, outputs, kernel, stride),
                    partial(contestants.conv, x_shape, outputs, kernel, stride, w_bits, a_bits),
                    "codes",
                    [Faster(INT8, 1.2), Faster(FP32, 2.5)],
                    operations=2 * batch * outputs * out_pixels * inputs * kernel**2,
                    unit=unit,
                    times=times,
                    tags={"job": "lowbit_conv2d", "layer": layer, "batch": batch, "w_bits": w_bits, "a_bits": a_bits},
                )


def network_workloads(quick: bool) -> Iterator[Workload]:
    """A training step of ResNet-18 with DQA weights on 32 x 32 images; packed networks on one image of 224 x 224."""
    batch = (4 if quick else 32, 3, 32, 32)
    image = (1, 3, 32, 32) if quick else (1, 3, 224, 224)
    yield Workload(
        "resnet18-train-dqa",
        "end_to_end",
        batch,
        partial(contestants.training_step, DQA_BITS, batch),
        tags={"job": "ResNet-18 training step, DQA weights"},
    )
    yield Workload(
        "resnet18-w2a2-packed",
        "end_to_end",
        image,
        partial(contestants.packed_inference, "resnet18", 2, 2, image, not quick),
        goals=[Faster(FP32_COMPILED, 3.0), Faster(INT8, 1.3)],
        tags={"job": "ResNet-18 inference, W2A2 packed"},
    )
    yield Workload(
        "mobilenet-v2-w4a4-packed",
        "end_to_end",
        image,
        partial(contestants.packed_inference, "mobilenet_v2", 4, 4, image, not quick),
        tags={"job": "MobileNetV2 inference, W4A4 packed"},
    )

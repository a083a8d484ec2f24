"""The CUDA kernels of lowbit_linear and lowbit_conv2d on the emulator, engine by engine and tile by tile.

tests/ops holds them against the reference on every kind of argument, mostly of sizes that one block computes; here are
the shapes that a plan treats apart. The rest of the arguments must not matter to it, so each shape meets few of them.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quantkernels as qk
from quantkernels import reference
from quantkernels._library import LIBRARIES
from quantkernels.ops import Kind
from quantkernels.testing import BACKENDS, LowbitProblem, assert_bit_equal

EMU = next(b for b in BACKENDS if b.name == "emu")
pytestmark = pytest.mark.skipif(EMU.missing is not None, reason=str(EMU.missing))

MULTIPROCESSORS = 2 + int(os.environ.get("QK_EMU_SEED", "0")) % 5  # of the emulated device
CONV = {"kernel": (3, 3), "padding": (1, 1, 1, 1)}
# Problems by the plan that they must get: engine, tile, bytes a copy, and whether the depth is split.
SHAPES: dict[tuple[Any, ...], list[dict[str, Any]]] = {
    ("dot product",): [{"shape": (1, 300), "out_channels": 70}, {"shape": (7, 1100), "out_channels": 5}],
    ("depthwise",): [
        {"shape": (2, 12, 9, 7), "out_channels": 12, "groups": 12, **CONV},
        {"shape": (1, 5, 9, 7), "out_channels": 15, "groups": 5, **CONV, "stride": (2, 1), "dilation": (1, 2)},
    ],
    ("bytes", (128, 32), 16, False): [{"shape": (9, 300), "out_channels": 200}],
    ("bytes", (128, 32), 16, True): [{"shape": (9, 2100), "out_channels": 100}],
    ("bytes", (128, 128), 16, False): [
        {"shape": (150, 200), "out_channels": 140},
        {"shape": (1, 16, 9, 11), "out_channels": 130, **CONV},
    ],
    ("bytes", (128, 128), 16, True): [{"shape": (1, 160, 7, 7), "out_channels": 66, **CONV}],
    ("bytes", (64, 128), 16, False): [
        {"shape": (200, 129), "out_channels": 33},
        {"shape": (2, 32, 9, 8), "out_channels": 6, "groups": 2, **CONV, "stride": (2, 1)},
    ],
    ("bytes", (64, 128), 1, False): [
        {"shape": (1, 3, 17, 13), "out_channels": 70, "kernel": (5, 3), "padding": (2, 2, 0, 3), "stride": (2, 2)},
        {"shape": (1, 10, 9, 7), "out_channels": 15, "groups": 5, **CONV, "dilation": (2, 1)},
    ],
    ("bits", (128, 32), 16, False): [{"shape": (20, 1408), "out_channels": 150}],
    ("bits", (128, 128), 16, False): [{"shape": (1, 128, 7, 6), "out_channels": 140, **CONV}],
    ("bits", (64, 128), 16, False): [{"shape": (1, 256, 8, 9), "out_channels": 20, "groups": 2, **CONV}],
    ("bits", (64, 128), 4, False): [
        {"shape": (150, 200), "out_channels": 80},
        {"shape": (1, 96, 9, 7), "out_channels": 20, **CONV, "stride": (1, 2)},
    ],
    ("bits", (64, 128), 4, True): [
        {"shape": (1, 96, 6, 6), "out_channels": 20, "kernel": (11, 11), "padding": (5,) * 4}
    ],
}
# The same where a basis is learned: planes always, and no tile of 128 by 128.
LEARNED_SHAPES: dict[tuple[Any, ...], list[dict[str, Any]]] = {
    ("plane product",): [{"shape": (1, 300), "out_channels": 70}, {"shape": (7, 1100), "out_channels": 5}],
    ("depthwise",): SHAPES[("depthwise",)],
    ("bits", (128, 32), 16, False): [{"shape": (9, 1408), "out_channels": 150}],
    ("bits", (64, 128), 16, False): [
        {"shape": (150, 128), "out_channels": 140},
        {"shape": (1, 128, 7, 6), "out_channels": 70, **CONV},
        {"shape": (1, 256, 8, 9), "out_channels": 20, "groups": 2, **CONV},
    ],
    ("bits", (64, 128), 4, False): [
        {"shape": (150, 200), "out_channels": 80},
        {"shape": (1, 3, 17, 13), "out_channels": 70, "kernel": (5, 3), "padding": (2, 2, 0, 3), "stride": (2, 2)},
        {"shape": (1, 50, 9, 7), "out_channels": 15, "groups": 5, **CONV, "dilation": (2, 1)},
        {"shape": (1, 75, 5, 6), "out_channels": 20, **CONV},
    ],
}
LEARNED = [
    ((Kind.LEARNED, 3), (Kind.LEARNED, 3)),
    ((Kind.LEARNED, 7), (Kind.TERNARY, 2)),
    ((Kind.UNIFORM, 15), (Kind.LEARNED, 1)),
]
BYTES = [((Kind.UNIFORM, 255), (Kind.UNIFORM, 15)), ((Kind.UNIFORM, 7), (Kind.TERNARY, 2))]
BITS = [
    ((Kind.UNIFORM, 1), (Kind.BINARY, 1)),
    ((Kind.UNIFORM, 3), (Kind.UNIFORM, 3)),
    ((Kind.UNIFORM, 15), (Kind.BINARY, 1)),
    ((Kind.TERNARY, 2), (Kind.UNIFORM, 3)),
]
CASES = [
    (expected, shape, x_quantizer, w_quantizer)
    for expected, shapes in SHAPES.items()
    for shape in shapes
    for x_quantizer, w_quantizer in (BITS if expected[0] == "bits" else BYTES)
] + [
    (expected, shape, x_quantizer, w_quantizer)
    for expected, shapes in LEARNED_SHAPES.items()
    for shape in shapes
    for x_quantizer, w_quantizer in LEARNED
]


def bits_of(quantizer: tuple[int, int]) -> int:
    kind, levels = quantizer
    return 2 if kind == Kind.TERNARY else int(levels).bit_length()


def planned(problem: LowbitProblem) -> dict[str, Any]:
    geometry = (problem.kernel, problem.stride, problem.padding, problem.dilation, problem.groups)
    return qk.plan(
        problem.shape,
        problem.out_channels,
        *(geometry if problem.kernel else ()),
        x_bits=bits_of(problem.x_quantizer),
        w_bits=bits_of(problem.w_quantizer),
        learned=Kind.LEARNED in (problem.x_quantizer[0], problem.w_quantizer[0]),
        multiprocessors=MULTIPROCESSORS,
    )


def run(problem: LowbitProblem, ops: Any) -> torch.Tensor:
    op = ops.lowbit_conv2d if problem.kernel else ops.lowbit_linear
    return op(*problem.arguments())


@pytest.mark.parametrize(("expected", "shape", "x_quantizer", "w_quantizer"), CASES)
@pytest.mark.parametrize(
    "rest",
    [
        {"extras": "bs", "dtype": torch.uint8, "layout": "channels_last"},
        {"extras": "co", "dtype": torch.float16, "per_channel": False},
    ],
    ids=["codes-channels_last", "floats-contiguous"],
)
def test_every_engine_and_tile(expected, shape, x_quantizer, w_quantizer, rest) -> None:
    if len(shape["shape"]) == 2:
        rest = rest | {"layout": "contiguous"}
    problem = LowbitProblem(**shape, **rest, x_quantizer=x_quantizer, w_quantizer=w_quantizer)
    plan = planned(problem)
    assert plan["engine"] == expected[0]
    if len(expected) > 1 and expected[3] == (plan["splits"] > 1):
        assert (plan["tile"], plan["copy_bytes"]) == expected[1:3]
    elif len(expected) > 1:  # a larger device splits more
        assert MULTIPROCESSORS > 2
    assert_bit_equal(run(problem, EMU.ops), run(problem, torch.ops.quantkernels))


ALL_BITS = [*((Kind.UNIFORM, 2**bits - 1) for bits in range(1, 9)), (Kind.BINARY, 1), (Kind.TERNARY, 2)]
LEARNED_BITS = [(Kind.LEARNED, 2**bits - 1) for bits in (1, 2, 3, 8)]


@pytest.mark.parametrize("w_quantizer", ALL_BITS, ids=str)
@pytest.mark.parametrize("rows", [1, 8, 9], ids=["dot-1", "dot-8", "tensor-cores"])
def test_every_width_of_the_weights(rows: int, w_quantizer: tuple[int, int]) -> None:
    """Each goes through a network of its own (csrc/cuda/tile/unpack.cuh)."""
    problem = LowbitProblem(
        (rows, 167), 37, x_quantizer=(Kind.UNIFORM, 255), w_quantizer=w_quantizer, dtype=torch.uint8
    )
    assert planned(problem)["engine"] == ("bytes" if rows == 9 else "dot product")
    assert_bit_equal(run(problem, EMU.ops), run(problem, torch.ops.quantkernels))


@pytest.mark.parametrize("w_quantizer", ALL_BITS, ids=str)
@pytest.mark.parametrize("x_quantizer", ALL_BITS, ids=str)
def test_every_pair_of_quantizers(x_quantizer: tuple[int, int], w_quantizer: tuple[int, int]) -> None:
    problem = LowbitProblem((9, 200), 5, x_quantizer=x_quantizer, w_quantizer=w_quantizer, dtype=torch.uint8)
    assert_bit_equal(run(problem, EMU.ops), reference.lowbit_linear(*problem.arguments()))


FLOATS = [
    ({"shape": (9, 1408), "out_channels": 20}, (Kind.UNIFORM, 3), torch.float32),
    ({"shape": (9, 200), "out_channels": 20}, (Kind.TERNARY, 2), torch.float16),
    ({"shape": (2, 128, 4, 5), "out_channels": 20, **CONV}, (Kind.UNIFORM, 3), torch.bfloat16),
    ({"shape": (2, 192, 4, 5), "out_channels": 20, "groups": 2, **CONV}, (Kind.BINARY, 1), torch.float32),
]


@pytest.mark.parametrize(("shape", "x_quantizer", "dtype"), FLOATS)
def test_floats_that_lie_right_become_planes_in_one_pass(shape, x_quantizer, dtype) -> None:
    """Whether their rows end with words or not, NaN and infinities among them."""
    layout = "channels_last" if "kernel" in shape else "contiguous"
    problem = LowbitProblem(
        **shape, x_quantizer=x_quantizer, w_quantizer=(Kind.BINARY, 1), dtype=dtype, layout=layout, extras="o"
    )
    assert planned(problem)["engine"] == "bits"
    assert_bit_equal(run(problem, EMU.ops), run(problem, torch.ops.quantkernels))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_product_is_that_of_the_cpu(data: st.DataObject) -> None:
    def draw(strategy: st.SearchStrategy[Any]) -> Any:
        return data.draw(strategy)

    groups = draw(st.sampled_from([1, 1, 2, 5]))
    channels, multiple = draw(st.sampled_from([1, 2, 3, 16, 20, 32, 64])), draw(st.integers(1, 9))
    size, kernel, stride, dilation = (
        (draw(st.integers(low, high)), draw(st.integers(low, high))) for low, high in ((4, 8), (1, 3), (1, 3), (1, 2))
    )
    padding = tuple(draw(st.integers(0, 3)) for _ in range(4))
    problem = LowbitProblem(
        (draw(st.integers(1, 2)), groups * channels, *size),
        groups * multiple,
        kernel,
        stride,
        tuple(p + 1 for p in padding),  # the dilated kernel fits
        dilation,
        groups,
        draw(st.sampled_from(ALL_BITS + LEARNED_BITS)),
        draw(st.sampled_from(ALL_BITS + LEARNED_BITS)),
        draw(st.sampled_from([torch.float32, torch.uint8])),
        draw(st.sampled_from(["contiguous", "channels_last"])),
        extras=draw(st.sampled_from(["", "bs", "o", "l"])),
    )
    assert_bit_equal(run(problem, EMU.ops), run(problem, torch.ops.quantkernels))


def bank_report(problem: LowbitProblem) -> dict[str, tuple[int, int, int]]:
    """Instructions, passes over the banks and conflicts of every place in the code that touches shared memory."""
    count = ctypes.CDLL(str(LIBRARIES / "quantkernels_emu.so")).qk_emu_count_banks
    count.restype = ctypes.c_char_p
    count(1)
    run(problem, EMU.ops)
    lines = count(0).decode().splitlines()
    return {place: tuple(map(int, numbers)) for place, *numbers in (line.split() for line in lines)}


# Weights of 8 bits have planes enough for every lane; rows of 256 codes are aligned for 16-byte copies.
BANKS = {
    "bytes-128x128": LowbitProblem((130, 256), 130, dtype=torch.uint8),
    "bytes-64x128": LowbitProblem((130, 256), 40, dtype=torch.uint8),
    "bytes-128x32": LowbitProblem((10, 256), 130, dtype=torch.uint8),
    "bytes-unaligned": LowbitProblem((130, 200), 130, dtype=torch.uint8),
    "bytes-gathered": LowbitProblem((1, 3, 12, 12), 40, **CONV, dtype=torch.uint8),
    "bits-128x128": LowbitProblem((130, 2048), 130, x_quantizer=(0, 3), w_quantizer=(0, 3), dtype=torch.uint8),
    "bits-128x32": LowbitProblem((10, 2048), 130, x_quantizer=(0, 3), w_quantizer=(0, 3), dtype=torch.uint8),
    "bits-words": LowbitProblem((1, 96, 9, 9), 40, **CONV, x_quantizer=(0, 3), w_quantizer=(0, 3), dtype=torch.uint8),
    "learned-64x128": LowbitProblem(
        (130, 2048), 130, x_quantizer=(4, 3), w_quantizer=(4, 3), special=False, dtype=torch.uint8
    ),
    "learned-channels-first": LowbitProblem((1, 128, 12, 11), 70, (1, 1), x_quantizer=(4, 1), w_quantizer=(4, 1)),
    "channels-first": LowbitProblem((1, 128, 12, 11), 130, (1, 1), dtype=torch.uint8),
}


@pytest.mark.parametrize("problem", BANKS.values(), ids=BANKS)
def test_no_access_to_shared_memory_has_a_bank_conflict(problem: LowbitProblem) -> None:
    report = bank_report(problem)
    assert sum(place.startswith("gemm.cuh") for place in report) >= 5, report
    assert {place: numbers for place, numbers in report.items() if numbers[2]} == {}

"""lowbit_conv2d on every backend: against the reference to the bit, and against a float64 convolution of the values,
zeros around them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from properties import assume, given, settings, st
from torch.library import opcheck
from torch.nn import functional

from quantkernels import build_info, ops, reference
from quantkernels.ops import Kind
from quantkernels.testing import LowbitProblem, assert_bit_equal, pairwise

pytestmark = pytest.mark.ops("lowbit_conv2d")
NAN, INF = float("nan"), float("inf")
KINDS = [(Kind.UNIFORM, 255), (Kind.UNIFORM, 1), (Kind.BINARY, 1), (Kind.TERNARY, 2)]
BITS = [(Kind.UNIFORM, 2**bits - 1) for bits in range(1, 9)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.uint8]
UNIT = torch.tensor([[0.0, 1.0, 0.0]])  # q = code
ONE = torch.tensor([[1.0, 0.0, 0.0]])  # q = 1

VARIED = [
    LowbitProblem(**row | geometry)
    for row in pairwise(
        geometry=[
            {"shape": (2, 16, 9, 11), "out_channels": 24, "kernel": (3, 3), "padding": (1, 1, 1, 1)},
            {"shape": (1, 3, 23, 20), "out_channels": 17, "kernel": (7, 7), "stride": (2, 2), "padding": (3, 3, 3, 3)},
            {"shape": (2, 67, 5, 6), "out_channels": 70, "kernel": (1, 1)},
            {"shape": (3, 64, 7, 7), "out_channels": 20, "kernel": (1, 1), "stride": (2, 3)},
            {"shape": (1, 5, 4, 4), "out_channels": 3, "kernel": (1, 1), "padding": (2, 0, 1, 1)},
            {"shape": (2, 12, 8, 9), "out_channels": 6, "kernel": (3, 2), "groups": 3, "padding": (0, 2, 1, 0)},
            {"shape": (2, 35, 9, 8), "out_channels": 35, "kernel": (3, 3), "groups": 35, "padding": (1, 1, 1, 1)},
            {
                "shape": (1, 130, 6, 7),
                "out_channels": 130,
                "kernel": (5, 5),
                "groups": 130,
                "stride": (2, 1),
                "padding": (2, 2, 2, 2),
            },
            {"shape": (1, 96, 5, 4), "out_channels": 96, "kernel": (3, 3), "groups": 96, "padding": (1, 0, 0, 2)},
            {"shape": (1, 6, 9, 9), "out_channels": 18, "kernel": (3, 3), "groups": 6, "padding": (1, 1, 1, 1)},
            {"shape": (2, 8, 12, 13), "out_channels": 9, "kernel": (3, 3), "dilation": (2, 3), "padding": (2, 2, 3, 3)},
            {"shape": (1, 1, 1, 1), "out_channels": 1, "kernel": (1, 1)},
            {"shape": (1, 2, 1, 3), "out_channels": 5, "kernel": (3, 3), "padding": (4, 4, 5, 3), "dilation": (2, 1)},
            {"shape": (0, 4, 5, 5), "out_channels": 8, "kernel": (3, 3)},
            {"shape": (2, 3, 0, 2), "out_channels": 4, "kernel": (2, 2), "padding": (1, 1, 0, 0)},
        ],
        x_quantizer=[*KINDS, *BITS[1:7]],
        w_quantizer=[*KINDS, *BITS[1:7]],
        dtype=DTYPES,
        layout=["contiguous", "channels_last", "sliced", "transposed"],
        per_channel=[True, False],
        extras=["", "b", "bs", "bsc", "co", "bsco"],
        out_dtype=[None, torch.float16],
    )
    for geometry in [row.pop("geometry")]
    if not ("o" in row["extras"] and row["out_dtype"])
]


@pytest.mark.parametrize("problem", VARIED, ids=str)
def test_is_bit_equal_to_the_reference(backend, problem):
    arguments = problem.arguments(backend.device)
    y = backend.ops.lowbit_conv2d(*arguments)
    assert_bit_equal(y, reference.lowbit_conv2d(*problem.arguments()))
    x = arguments[0]
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (3, 2, 1, 3)], ids=str)
@pytest.mark.parametrize(
    "channels, kernel, stride, dilation",
    [
        (3, (7, 7), (2, 2), (1, 1)),
        (3, (3, 3), (1, 1), (2, 1)),
        (1, (5, 3), (1, 2), (1, 1)),
        (9, (2, 7), (3, 1), (1, 1)),
        (13, (3, 5), (1, 1), (1, 1)),
    ],
    ids=str,
)
def test_short_lines(channels, kernel, stride, dilation, padding, dtype):
    # Lines of a window that are not whole steps of the CPU's kernels, of up to 32, up to 64 and more codes.
    window = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    for batch, size, layout in ((1, (9, 8), "contiguous"), (2, (23, 31), "channels_last")):
        problem = LowbitProblem((batch, channels, *size), 21, **window, dtype=dtype, layout=layout, extras="b")
        y = torch.ops.quantkernels.lowbit_conv2d(*problem.arguments())
        assert_bit_equal(y, reference.lowbit_conv2d(*problem.arguments()))


@pytest.mark.parametrize("w_quantizer", [*KINDS, *BITS[1:7]], ids=str)
@pytest.mark.parametrize("x_quantizer", [*KINDS, *BITS[1:7]], ids=str)
def test_every_pair_of_quantizers(x_quantizer, w_quantizer):
    problem = LowbitProblem(
        (1, 5, 6, 5), 7, (3, 3), padding=(1, 1, 1, 1), x_quantizer=x_quantizer, w_quantizer=w_quantizer, extras="b"
    )
    y = torch.ops.quantkernels.lowbit_conv2d(*problem.arguments())
    assert_bit_equal(y, reference.lowbit_conv2d(*problem.arguments()))


@st.composite
def conv_problems(draw: st.DrawFn) -> LowbitProblem:
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 8]))
    channels = draw(st.integers(1, 20)) if draw(st.booleans()) else 1
    multiple = draw(st.integers(1, 20)) if draw(st.booleans()) else 1
    size, kernel, stride, dilation = (
        (draw(st.integers(low, high)), draw(st.integers(low, high))) for low, high in ((1, 10), (1, 4), (1, 3), (1, 3))
    )
    padding = tuple(draw(st.integers(0, 5)) for _ in range(4))
    for axis in (0, 1):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        assume(size[axis] + padding[2 * axis] + padding[2 * axis + 1] >= reach)
    return LowbitProblem(
        (draw(st.integers(1, 3)), groups * channels, *size),
        groups * multiple,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        draw(st.sampled_from(KINDS + BITS)),
        draw(st.sampled_from(KINDS + BITS)),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(["contiguous", "channels_last", "sliced"])),
    )


def convolve(image: torch.Tensor, problem: LowbitProblem, weight: torch.Tensor) -> torch.Tensor:
    """float64, with an explicit border of zeros; weight [out_channels, columns] in (kh, kw, channel) order."""
    top, bottom, left, right = problem.padding
    padded = functional.pad(image.double(), (left, right, top, bottom))
    kernel = weight.double().reshape(len(weight), *problem.kernel, -1).permute(0, 3, 1, 2)
    return functional.conv2d(padded, kernel, None, problem.stride, 0, problem.dilation, problem.groups)


@settings(max_examples=80, deadline=None)
@given(problem=conv_problems())
def test_integer_sums_run_over_valid_taps_alone(problem):
    x = problem.x()
    x_grid = torch.tensor([[-0.3, 0.6 / problem.x_quantizer[1], 0.2]])
    codes = x if problem.dtype == torch.uint8 else reference.encode(x, x_grid, *problem.x_quantizer)
    weight = problem.w_codes()
    images, weights = (codes, torch.ones_like(codes)), (weight, torch.ones_like(weight))
    for image, a_grid in zip(images, (UNIT, ONE), strict=True):
        for taps, w_grid in zip(weights, (UNIT, ONE), strict=True):
            y = ops.lowbit_conv2d(
                codes, a_grid, *problem.x_quantizer, problem.planes(), w_grid, *problem.w_quantizer, *problem.geometry
            )
            assert torch.equal(y.double(), convolve(image, problem, taps).round())  # integers below 2^24


@settings(max_examples=80, deadline=None)
@given(problem=conv_problems())
def test_agrees_with_the_float_convolution_of_the_values(problem):
    x, w = problem.x(), problem.w_codes()
    x_grid = torch.tensor([[-0.3, 0.6 / problem.x_quantizer[1], 0.2]])
    generator = problem.generator("grid")
    w_grid = torch.stack([torch.randn(problem.out_channels, generator=generator) for _ in range(3)], 1)
    y = ops.lowbit_conv2d(
        x,
        x_grid,
        *problem.x_quantizer,
        problem.planes(),
        w_grid,
        *problem.w_quantizer,
        *problem.geometry,
        out_dtype=torch.float32,
    )
    codes = x if problem.dtype == torch.uint8 else reference.encode(x, x_grid, *problem.x_quantizer)

    def values(grid: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        return grid[:, :1].double() + grid[:, 1:2].double() * code

    def image(grid: torch.Tensor) -> torch.Tensor:
        return values(grid, codes.reshape(1, -1)).reshape(codes.shape)

    expected = convolve(image(x_grid), problem, values(w_grid, w))
    # Seven roundings of terms whose absolute values sum to at most this.
    magnitude = convolve(image(x_grid.abs()), problem, values(w_grid.abs(), w))
    assert ((y.double() - expected).abs() <= 8 * 2.0**-24 * magnitude).all()


@pytest.mark.parametrize("kind, levels, grid", [(1, 1, (-0.5, 1.0, 0.0)), (0, 3, (-0.75, 0.5, 0.0))])
def test_a_padded_tap_is_the_value_zero_though_no_code_is(backend, kind, levels, grid):
    """A single pixel under a 3 x 3 window of ones: only the tap in the middle counts."""
    x_grid = torch.tensor([grid])
    x = torch.tensor([[[[0.4]]]])
    planes = reference.pack_bitplanes(torch.full((1, 9), levels, dtype=torch.uint8), kind, levels)
    arguments = [x, x_grid, kind, levels, planes, x_grid, kind, levels, [3, 3], [1, 1], [1] * 4, [1, 1], 1]
    arguments += [None, None, None, -INF, INF, None, 0, 0, None]
    y = backend.ops.lowbit_conv2d(*(a.to(backend.device) if isinstance(a, torch.Tensor) else a for a in arguments))
    value = reference.fake_quantize(x, x_grid, kind, levels).item()
    assert y.item() == pytest.approx(value * (grid[0] + grid[1] * levels), rel=1e-6)


def test_a_window_without_any_valid_tap_is_the_bias():
    problem = LowbitProblem((1, 2, 1, 1), 3, (1, 1), padding=(1, 1, 1, 1), extras="b")
    y = torch.ops.quantkernels.lowbit_conv2d(*problem.arguments())
    bias = problem.epilogue()[0]
    border = torch.ones(3, 3, dtype=torch.bool)
    border[1, 1] = False
    assert torch.equal(y[0][:, border], bias[:, None].expand(3, 8))


@pytest.mark.parametrize("kernel, padding", [(3, 1), (2, 0), (1, 0)])
def test_no_input_channels_give_the_bias(kernel, padding):
    x, planes = torch.zeros(2, 0, 5, 4, dtype=torch.uint8), torch.zeros(2, 3, 0, dtype=torch.int32)
    bias = torch.tensor([1.0, -2.0, 0.5])
    y = ops.lowbit_conv2d(x, UNIT, 0, 3, planes, UNIT, 0, 3, kernel, padding=padding, bias=bias)
    assert y.numel() > 0 and torch.equal(y, bias[:, None, None].expand_as(y))


@pytest.mark.parametrize("groups", [1, 2])
def test_sums_that_int32_cannot_hold(backend, groups):
    channels = 16513  # 2 * 16513 * 255 * 255 > 2^31
    x = torch.full((1, channels * groups, 1, 2), 255, dtype=torch.uint8)
    x[:, 1::2] = 254
    codes = torch.full((2 * groups, 2 * channels), 255, dtype=torch.uint8)
    planes = reference.pack_bitplanes(codes, 0, 255)
    arguments = [x, UNIT, 0, 255, planes, UNIT, 0, 255, [1, 2], [1, 1], [0, 0, 0, 1], [1, 1], groups]
    arguments += [None, None, None, -INF, INF, None, 0, 0, None]
    expected = reference.lowbit_conv2d(*arguments)
    y = backend.ops.lowbit_conv2d(*(a.to(backend.device) if isinstance(a, torch.Tensor) else a for a in arguments))
    assert expected.max() > 2**31 - 2**26
    assert_bit_equal(y, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_batch_that_many_tasks_share(layout):
    problem = LowbitProblem(
        (4, 40, 31, 29), 150, (3, 3), padding=(1, 1, 1, 1), layout=layout, extras="bs", special=False
    )
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.ops.quantkernels.lowbit_conv2d(*problem.arguments()))
    finally:
        torch.set_num_threads(threads)
    assert_bit_equal(results[0], reference.lowbit_conv2d(*problem.arguments()))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("w_quantizer", [(Kind.UNIFORM, 3), (Kind.UNIFORM, 255)], ids=str)
def test_a_window_of_one_pixel_and_many_channels(layout, w_quantizer):
    problem = LowbitProblem(
        (3, 70, 9, 11), 1050, (1, 1), (2, 2), w_quantizer=w_quantizer, layout=layout, extras="bs", special=False
    )
    assert_bit_equal(ops.lowbit_conv2d(*problem.arguments()), reference.lowbit_conv2d(*problem.arguments()))


def test_friendly_sizes():
    problem = LowbitProblem((2, 4, 9, 8), 5, (3, 3), (2, 2), (1, 1, 1, 1), special=False)
    head, full = problem.arguments()[:8], ops.lowbit_conv2d(*problem.arguments())
    assert torch.equal(ops.lowbit_conv2d(*head, 3, 2, 1), full)
    assert torch.equal(ops.lowbit_conv2d(*head, (3, 3), (2, 2), (1, 1), (1, 1)), full)
    tall = ops.lowbit_conv2d(*head, 3, padding=(2, 0))
    assert tall.shape == (2, 5, 11, 6) and torch.equal(tall, ops.lowbit_conv2d(*head, 3, padding=(2, 2, 0, 0)))
    with pytest.raises(ValueError, match=r"lowbit_conv2d: padding must be an int, 2 or 4 of them, got \(1, 2, 3\)"):
        ops.lowbit_conv2d(*head, 3, padding=(1, 2, 3))
    with pytest.raises(ValueError, match=r"lowbit_conv2d: stride must be an int or 2 of them, got \(1, 2, 3\)"):
        ops.lowbit_conv2d(*head, 3, stride=(1, 2, 3))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("extras", ["", "bso"])
def test_opcheck(backend, layout, extras):
    problem = LowbitProblem(
        (2, 4, 6, 5), 6, (3, 2), padding=(1, 1, 0, 1), layout=layout, extras=extras, groups=2, special=False
    )
    opcheck(backend.ops.lowbit_conv2d.default, problem.arguments(backend.device))


def test_compiles_without_graph_breaks():
    problem = LowbitProblem((2, 4, 6, 5), 6, (3, 3), padding=(1, 1, 1, 1), extras="bs", special=False)
    arguments = problem.arguments()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return ops.lowbit_conv2d(x * 2, *arguments[1:16]).relu()

    compiled = torch.compile(layer, fullgraph=True)
    for shape, layout in (((2, 4, 6, 5), torch.contiguous_format), ((1, 4, 3, 9), torch.channels_last)):
        x = torch.randn(shape).contiguous(memory_format=layout)
        expected = layer(x)
        assert_bit_equal(compiled(x), expected)
        assert compiled(x).stride() == expected.stride()


def test_no_gradient_passes():
    arguments = LowbitProblem((2, 4, 6, 5), 6, (3, 3)).arguments()[:9]
    for leaf in (0, 1, 5):
        arguments[leaf].requires_grad_()
    assert not ops.lowbit_conv2d(*arguments).requires_grad


@pytest.mark.skipif(build_info()["cpu_isa"] == "portable", reason="there is one instruction set here")
def test_every_instruction_set_gives_the_same_bits():
    script = "import test_conv as c, test_matmul as m; print(m.digest('lowbit_conv2d', c.VARIED))"
    paths = [os.path.dirname(__file__), *sys.path]
    digests = set()
    for isa in ("portable", "avx2", build_info()["cpu_isa"]):
        environment = os.environ | {"QK_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
        run = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        digests.add(run.stdout)
    assert len(digests) == 1


HUGE = 2**31
COMPLAINTS = {
    "x-type": (
        {"x": torch.zeros(2, 4, 6, 6).double()},
        "x must be float32, float16, bfloat16, or uint8 codes, got Double",
    ),
    "x-dim": ({"x": torch.zeros(4, 6, 6)}, r"x must be of shape \[batch, channels, height, width\], got \[4, 6, 6\]"),
    "kernel_size": ({"kernel_size": (3, 0)}, r"kernel_size must be 2 numbers from 1 to 2147483647, got \[3, 0\]"),
    "stride": ({"stride": (0, 1)}, r"stride must be 2 numbers from 1 to 2147483647, got \[0, 1\]"),
    "dilation": ({"dilation": -1}, r"dilation must be 2 numbers from 1 to 2147483647, got \[-1, -1\]"),
    "padding": ({"padding": (0, 0, -1, 0)}, r"padding must be 4 numbers from 0 to 2147483647, got \[0, 0, -1, 0\]"),
    "padding-huge": ({"padding": HUGE}, r"padding must be 4 numbers from 0 to 2147483647, got \[2147483648, .*\]"),
    "kernel-huge": (
        {"kernel_size": HUGE - 1},
        "kernel_size must be of at most 2147483647 weights an output channel, got ",
    ),
    "groups-zero": ({"groups": 0}, "groups must be a divisor of x's 4 channels, got 0"),
    "groups-in": ({"groups": 3}, "groups must be a divisor of x's 4 channels, got 3"),
    "groups-out": (
        {"groups": 2, "planes": torch.zeros(2, 5, 1, dtype=torch.int32)},
        r"planes must be of a number of output channels that groups \(2\) divides, got 5",
    ),
    "planes-words": (
        {"planes": torch.zeros(2, 6, 1, dtype=torch.int32)},
        r"planes must be of shape \[2, out_channels, 2\] for rows of 36 codes with w_levels 3, got \[2, 6, 1\]",
    ),
    "too-small": (
        {"dilation": (3, 1)},
        r"x must be at least as large as the dilated kernel \(7\) in height with its padding, got 6",
    ),
    "w_grid": ({"w_grid": UNIT.repeat(4, 1)}, r"w_grid must be of shape \[6, 3\], got \[4, 3\]"),
    "bias": ({"bias": torch.zeros(4)}, r"bias must be of shape \[6\], got \[4\]"),
    "out_levels": ({"out_grid": UNIT, "out_kind": 2}, "out_levels must be 2 for a ternary quantizer, got 0"),
}


@pytest.mark.parametrize("name", COMPLAINTS)
def test_complaints_name_op_argument_expected_and_got(name):
    changes, message = COMPLAINTS[name]
    arguments = {
        "x": torch.zeros(2, 4, 6, 6),
        "x_grid": UNIT,
        "x_kind": 0,
        "x_levels": 3,
        "planes": torch.zeros(2, 6, 2, dtype=torch.int32),
        "w_grid": UNIT,
        "w_kind": 0,
        "w_levels": 3,
        "kernel_size": 3,
    }
    with pytest.raises(RuntimeError, match=f"^lowbit_conv2d: {message}"):
        ops.lowbit_conv2d(**(arguments | changes))

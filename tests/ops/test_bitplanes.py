"""Codes and bit-planes on every backend: encode, pack_bitplanes, unpack_bitplanes, quantize_pack."""

from __future__ import annotations

import pytest
import torch
from properties import HealthCheck, given, settings, st
from torch.library import opcheck

from quantkernels import ops, reference
from quantkernels.ops import Kind
from quantkernels.testing import Problem, assert_bit_equal, pairwise, problems
from quantkernels.testing.inputs import DTYPES, QUANTIZERS, lay_out

pytestmark = pytest.mark.ops("pack_bitplanes", "unpack_bitplanes", "quantize_pack")
# Around the words' ends, and long enough for every vector width.
COLUMNS = (0, 1, 31, 32, 33, 64, 70, 511, 1030)
SIZES = st.tuples(st.integers(0, 5), st.integers(0, 200))


@pytest.mark.ops("encode")
@pytest.mark.parametrize("problem", problems(stes=[0]), ids=str)
def test_encode(backend, problem):
    x, grid = problem.x(backend.device), problem.grid(backend.device)
    kind, levels, _, axis = problem.quantizer
    codes = backend.ops.encode(x, grid, kind, levels, axis)
    assert_bit_equal(codes, reference.encode(x.cpu(), grid.cpu(), kind, levels, axis))
    assert codes.stride() == torch.empty_like(x).stride()


@pytest.mark.ops("encode", "fake_quantize")
@pytest.mark.parametrize("kind, levels", QUANTIZERS)
def test_decoded_codes_are_the_fake_quantized_values(backend, kind, levels):
    problem = Problem((6, 50), axis=0, kind=kind, levels=levels)
    x, grid = problem.x(backend.device), problem.grid(backend.device)
    codes = backend.ops.encode(x, grid, kind, levels, 0)
    decoded = grid[:, :1] + grid[:, 1:2] * codes.float()
    assert_bit_equal(decoded, backend.ops.fake_quantize(x, grid, kind, levels, 0, 0))


def packing_cases() -> list[dict]:
    return pairwise(
        rows=(0, 1, 5),
        columns=COLUMNS,
        quantizer=QUANTIZERS,
        dtype=DTYPES,
        per_row=(False, True),
        layout=("contiguous", "transposed", "sliced"),
    )


def name_of(case: dict) -> str:
    kind, levels = case["quantizer"]
    grid = "per_row" if case["per_row"] else "one_grid"
    dtype = str(case["dtype"]).removeprefix("torch.")
    return f"{case['rows']}x{case['columns']}-{Kind(kind).name.lower()}{levels}-{dtype}-{grid}-{case['layout']}"


@pytest.mark.parametrize("case", packing_cases(), ids=name_of)
def test_pack_unpack_and_both_at_once(backend, case):
    kind, levels = case["quantizer"]
    axis = 0 if case["per_row"] else None
    problem = Problem((case["rows"], case["columns"]), case["dtype"], case["layout"], axis, kind, levels, special=True)
    x, grid = problem.x(backend.device), problem.grid(backend.device)
    planes, sums = backend.ops.quantize_pack(x, grid, kind, levels, axis)
    expected_planes, expected_sums = reference.quantize_pack(x.cpu(), grid.cpu(), kind, levels, axis)
    assert_bit_equal(planes, expected_planes)
    assert_bit_equal(sums, expected_sums)
    codes = reference.encode(x.cpu(), grid.cpu(), kind, levels, axis)
    laid_out = lay_out(codes, case["layout"]).to(backend.device)
    assert_bit_equal(backend.ops.pack_bitplanes(laid_out, kind, levels), expected_planes)
    assert_bit_equal(backend.ops.unpack_bitplanes(planes, kind, case["columns"]), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("levels", [1, 15, 255])
def test_codes_of_ties_and_of_what_no_integer_holds(backend, dtype, levels):
    generator = torch.Generator().manual_seed(levels)
    x = 3 * torch.randn(2, 1100, generator=generator)
    x[:, ::7] = torch.randint(-3, levels + 3, (2, 158), generator=generator) + 0.5
    inf, nan = float("inf"), float("nan")
    odd = torch.tensor([nan, -nan, inf, -inf, 3e38, -3e38, 65504.0, -65504.0, -0.0, 1e-40, 2.0**31, -(2.0**31)])
    x[:, 500:512] = odd
    x = x.to(dtype)
    for grid in ([[0.0, 1.0, 0.0]], [[-2.0, 0.3, 0.0]], [[1.0, 1e-30, 0.0]]):
        arguments = (torch.tensor(grid), Kind.UNIFORM, levels, None)
        planes, sums = backend.ops.quantize_pack(x.to(backend.device), arguments[0].to(backend.device), *arguments[1:])
        expected_planes, expected_sums = reference.quantize_pack(x, *arguments)
        assert_bit_equal(planes, expected_planes)
        assert_bit_equal(sums, expected_sums)


@pytest.mark.parametrize(
    "offset, step", [(-3.0, 0.4), (0.0, 2e-4), (-7e4, 1e4), (2.0, 1e-6), (1e-7, 6e-8), (-1.0, -0.1)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_codes_of_all_numbers_of_a_half_type(backend, dtype, offset, step):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(1, -1)
    arguments = (torch.tensor([[offset, step, 0.0]]), Kind.UNIFORM, 15, None)
    planes, sums = backend.ops.quantize_pack(x.to(backend.device), arguments[0].to(backend.device), *arguments[1:])
    expected_planes, expected_sums = reference.quantize_pack(x, *arguments)
    assert_bit_equal(planes, expected_planes)
    assert_bit_equal(sums, expected_sums)


# Symmetric (a code changes next to 0), from 0, around 0, beside 0, coarse, fine, and steps that are no steps.
RANGES = [(-3.0, 3.0), (0.0, 8.0), (-1.0, 0.0), (-0.37, 0.61), (-2.2, 1.9), (0.5, 2.0), (-5.0, -0.1), (-6e4, 6e4)]
RANGES += [
    (-1e-4, 3e-4),
    (-1e-7, 1e-7),
    (1.0, 1.0),
    (2.0, 1.0),
    (-1e30, 1e30),
    (float("nan"), 1.0),
    (0.0, float("inf")),
]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("low, high", RANGES)
def test_codes_of_many_halves_on_one_grid(low, high, bits):
    """The CPU packs them by tables; rows that end within a block, numbers that are not finite in some."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    finite = numbers[numbers.isfinite()]
    x = torch.cat([numbers, finite, finite[:4089]]).reshape(3, -1)
    levels = 2**bits - 1
    arguments = (torch.tensor([[low, (high - low) / levels, 0.0]]), Kind.UNIFORM, levels, None)
    for part in (x, x[0, :40].repeat(1, 4000)):
        for got, expected in zip(
            ops.quantize_pack(part, *arguments), reference.quantize_pack(part, *arguments), strict=True
        ):
            assert_bit_equal(got, expected)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_codes_of_all_halves_with_a_grid_a_row(bits):
    """A table for each row, of none to three boundaries between two numbers that it tells apart, or none at all."""
    generator = torch.Generator().manual_seed(bits)
    sizes = 10 ** torch.empty(32).uniform_(-5, 5, generator=generator)
    lows = torch.cat([sizes[:16] * torch.empty(16).uniform_(-2, 0, generator=generator), sizes[16:] * 0.7])
    ranges = torch.cat([torch.tensor(RANGES), torch.stack([lows, sizes], dim=1)])
    levels = 2**bits - 1
    grid = torch.stack([ranges[:, 0], (ranges[:, 1] - ranges[:, 0]) / levels, torch.zeros(len(ranges))], dim=1)
    numbers = torch.arange(-(2**15), 2**15 - 3).to(torch.int16).view(torch.float16)
    x = torch.stack([numbers[torch.randperm(len(numbers), generator=generator)] for _ in ranges])
    arguments = (grid, Kind.UNIFORM, levels, 0)
    for got, expected in zip(ops.quantize_pack(x, *arguments), reference.quantize_pack(x, *arguments), strict=True):
        assert_bit_equal(got, expected)


@given(size=SIZES, quantizer=st.sampled_from(QUANTIZERS), seed=st.integers(0, 2**16))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_packing_loses_nothing_and_pads_with_zeros(backend, size, quantizer, seed):
    (rows, columns), (kind, levels) = size, quantizer
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(levels + 1, size, dtype=torch.uint8, generator=generator)
    planes = backend.ops.pack_bitplanes(codes.to(backend.device), kind, levels).cpu()
    assert planes.shape == (reference.plane_count(kind, levels), rows, (columns + 31) // 32)
    padding = -columns % 32
    if padding and rows:
        assert (planes[:, :, -1].long() & 0xFFFFFFFF).max() < 1 << (32 - padding)
    assert_bit_equal(backend.ops.unpack_bitplanes(planes.to(backend.device), kind, columns), codes)


@given(bits=st.integers(1, 8), kept=st.integers(1, 8), columns=st.integers(1, 100), seed=st.integers(0, 2**16))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_first_planes_are_the_most_significant_bits(backend, bits, kept, columns, seed):
    kept = min(kept, bits)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (2, columns), dtype=torch.uint8, generator=generator)
    planes = backend.ops.pack_bitplanes(codes.to(backend.device), Kind.UNIFORM, 2**bits - 1)[:kept]
    assert_bit_equal(backend.ops.unpack_bitplanes(planes, Kind.UNIFORM, columns), codes >> (bits - kept))


def test_word_and_plane_order(backend):
    codes = torch.zeros(1, 40, dtype=torch.uint8, device=backend.device)
    codes[0, 0], codes[0, 31], codes[0, 33] = 1, 2, 3
    planes = backend.ops.pack_bitplanes(codes, Kind.UNIFORM, 3)
    assert planes.tolist() == [[[-(2**31), 2]], [[1, 2]]]  # first the plane of weight 2
    thermometer = backend.ops.pack_bitplanes(codes.clamp(max=2), Kind.TERNARY, 2)
    assert thermometer.tolist() == [[[1 - 2**31, 2]], [[-(2**31), 2]]]  # code >= 1, code >= 2


def test_opcheck(backend):
    problem = Problem((3, 40), axis=0, levels=7)
    x, grid = problem.x(backend.device), problem.grid(backend.device)
    opcheck(backend.ops.quantize_pack.default, (x, grid, Kind.UNIFORM, 7, 0))
    codes = backend.ops.encode(x, grid, Kind.UNIFORM, 7, 0)
    opcheck(backend.ops.pack_bitplanes.default, (codes, Kind.UNIFORM, 7))
    planes = backend.ops.pack_bitplanes(codes, Kind.UNIFORM, 7)
    opcheck(backend.ops.unpack_bitplanes.default, (planes, Kind.UNIFORM, 40))


@pytest.mark.ops("encode")
def test_opcheck_encode(backend):
    problem = Problem((3, 5, 4), layout="sliced", axis=1, levels=7)
    x, grid = problem.x(backend.device), problem.grid(backend.device)
    opcheck(backend.ops.encode.default, (x, grid, Kind.UNIFORM, 7, 1))


def test_complaints_name_op_argument_expected_and_got(backend):
    ops, device = backend.ops, backend.device
    x, grid = torch.zeros(2, 40, device=device), torch.zeros(1, 3, device=device)
    codes = torch.zeros(2, 40, dtype=torch.uint8, device=device)
    planes = torch.zeros(2, 2, 2, dtype=torch.int32, device=device)
    for message, call in (
        ("encode: x must be float32, float16 or bfloat16, got Byte", lambda: ops.encode(codes, grid, 0, 3, None)),
        ("encode: kind must be 0 .*, got 3", lambda: ops.encode(x, grid, 3, 0, None)),
        ("pack_bitplanes: codes must be Byte, got Float", lambda: ops.pack_bitplanes(x, 0, 3)),
        (
            r"pack_bitplanes: codes must be of shape \[rows, columns\], got \[40\]",
            lambda: ops.pack_bitplanes(codes[0], 0, 3),
        ),
        ("unpack_bitplanes: planes must be Int, got Byte", lambda: ops.unpack_bitplanes(codes, 0, 40)),
        ("unpack_bitplanes: columns must be .*, got 70", lambda: ops.unpack_bitplanes(planes, 0, 70)),
        ("unpack_bitplanes: planes must be .*, got", lambda: ops.unpack_bitplanes(planes, Kind.BINARY, 40)),
        ("quantize_pack: axis must be None or 0, got 1", lambda: ops.quantize_pack(x, grid, 0, 3, 1)),
        (
            r"quantize_pack: x must be of shape \[rows, columns\], got \[2, 40, 1\]",
            lambda: ops.quantize_pack(x[..., None], grid, 0, 3, None),
        ),
    ):
        with pytest.raises(RuntimeError, match=f"^{message}"):
            call()
